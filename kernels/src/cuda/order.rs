//! Order between the compute stream and other users of the device, such as a tensor library.
//!
//! They share the primary context. Memory that one of them wrote and the other reads, or that passes from one to the
//! other, needs one of these calls in between, on a thread where the other's launches have reached the driver.

use cudarc::driver::sys;

use super::driver::driver;
use super::{Cuda, event};

impl Cuda {
    /// Makes later work of the compute stream wait for what others have queued so far in the context.
    pub fn wait_for_others(&self) {
        self.run("waiting for other streams", || {
            let event = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            let ordered = driver!(cuCtxRecordEvent(self.context(), event.0))
                .and_then(|()| driver!(cuStreamWaitEvent(self.compute(), event.0, 0)));
            ordered.and(driver!(cuEventDestroy_v2(event.0)))
        });
    }

    /// Makes what others will queue in the context wait for what the compute stream has so far.
    pub fn hold_others(&self) {
        self.run("holding other streams", || {
            let event = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            let ordered = driver!(cuEventRecord(event.0, self.compute()))
                .and_then(|()| driver!(cuCtxWaitEvent(self.context(), event.0)));
            ordered.and(driver!(cuEventDestroy_v2(event.0)))
        });
    }
}
