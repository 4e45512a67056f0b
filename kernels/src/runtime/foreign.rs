//! Memory of another library in the same context, and the order between its streams and ours.

use cudarc::driver::sys;

use super::driver::{Handle, driver, lock};
use super::{Array, Buffer, Cuda, DType, MemoryUse, event};

/// The events that order the streams of the context, one for each direction.
#[derive(Default)]
pub(super) struct Crossings {
    inward: Option<Handle<sys::CUevent>>,
    outward: Option<Handle<sys::CUevent>>,
}

impl Cuda {
    /// Makes the compute stream wait for everything queued on any stream of the context so far.
    pub fn wait_for_context(&self) {
        self.run("waiting for the context", || {
            let mut crossings = lock(&self.0.crossings);
            let event = existing(&mut crossings.inward)?;
            driver!(cuCtxRecordEvent(self.context(), event))?;
            driver!(cuStreamWaitEvent(self.compute(), event, 0))
        });
    }

    /// Makes everything that is queued on any stream of the context from now on wait for the compute stream.
    pub fn context_waits(&self) {
        self.run("ordering the context", || {
            let mut crossings = lock(&self.0.crossings);
            let event = existing(&mut crossings.outward)?;
            driver!(cuEventRecord(event, self.compute()))?;
            driver!(cuCtxWaitEvent(self.context(), event))
        });
    }
}

/// Returns the event, made at its first use.
fn existing(event: &mut Option<Handle<sys::CUevent>>) -> Result<sys::CUevent, super::driver::Failed> {
    if event.is_none() {
        *event = Some(event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?);
    }
    Ok(event.expect("made just before").0)
}

impl Crossings {
    /// Destroys the events.
    pub(super) fn release(&mut self) {
        for event in [self.inward.take(), self.outward.take()].into_iter().flatten() {
            let _ = driver!(cuEventDestroy_v2(event.0));
        }
    }
}

impl Array {
    /// A matrix in memory of another library, whose rows begin every `ld` elements. `owner` keeps the memory, and is
    /// dropped with the last handle of the matrix.
    ///
    /// Operations never write into it; they take other memory, because they cannot know who else reads it.
    pub fn foreign(
        cuda: &Cuda,
        address: u64,
        [rows, cols]: [usize; 2],
        ld: usize,
        dtype: DType,
        owner: Box<dyn Send + Sync>,
    ) -> Self {
        let elements = if rows == 0 { 0 } else { (rows - 1) * ld + cols };
        let buffer = Buffer::foreign(cuda, address, elements * dtype.bytes(), MemoryUse::Activations, owner);
        Self::in_buffer(buffer, [rows, cols], ld, dtype)
    }

    /// Copies the values over those of a matrix of the same size, which may be foreign, rounded to its dtype.
    pub fn write_to(&self, target: &Self) {
        super::elementwise::copy_into(self, target);
    }
}
