//! Marks on the compute stream that carry a time.

use cudarc::driver::sys;

use super::driver::{Failed, Handle, driver};
use super::{Cuda, CudaError};

/// A point in the order of the compute stream.
pub struct Event {
    cuda: Cuda,
    event: Handle<sys::CUevent>,
}

impl Cuda {
    /// Marks the end of everything queued so far.
    pub fn event(&self) -> Event {
        let mut event = Event { cuda: self.clone(), event: Handle(core::ptr::null_mut()) };
        self.run("event", || {
            event.event = create(sys::CUevent_flags::CU_EVENT_DEFAULT)?;
            driver!(cuEventRecord(event.event.0, self.compute()))
        });
        event
    }
}

impl Event {
    /// Waits for everything queued before this event.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.cuda.check()?;
        self.cuda.run("event", || driver!(cuEventSynchronize(self.event.0)));
        self.cuda.check()
    }

    /// Milliseconds on the device from an earlier event to this one, after waiting for this one.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn milliseconds_since(&self, earlier: &Event) -> Result<f32, CudaError> {
        let mut milliseconds = 0.0;
        self.cuda.check()?;
        self.cuda.run("event", || {
            driver!(cuEventSynchronize(self.event.0))?;
            driver!(cuEventElapsedTime_v2(&mut milliseconds, earlier.event.0, self.event.0))
        });
        self.cuda.check().map(|()| milliseconds)
    }
}

impl core::fmt::Debug for Event {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("Event")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if !self.event.0.is_null() {
            let _ = self.cuda.bind().and_then(|()| driver!(cuEventDestroy_v2(self.event.0)));
        }
    }
}

/// An event that belongs to no stream yet.
pub(super) fn create(flags: sys::CUevent_flags) -> Result<Handle<sys::CUevent>, Failed> {
    let mut event = core::ptr::null_mut();
    driver!(cuEventCreate(&mut event, flags as u32))?;
    Ok(Handle(event))
}
