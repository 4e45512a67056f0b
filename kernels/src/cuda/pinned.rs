//! Host memory that the device copies to and from while it computes.

use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Handle, driver};
use super::{Buffer, Cuda, CudaError, event};

/// Page-locked host memory. Cloning gives another handle of the same memory.
#[derive(Clone)]
pub struct PinnedBuffer(Arc<Pinned>);

struct Pinned {
    cuda: Cuda,
    memory: Handle<*mut u8>,
    bytes: usize,
}

/// A copy on its way on the copy stream, which owns the device memory it works on.
///
/// [`Ticket::finish`], or dropping the ticket, makes later work of the compute stream wait for the copy; the host does
/// not wait. So the memory is in order again when it comes back, whether it is read or goes back to the arena.
#[must_use = "a dropped ticket makes the compute stream wait at once"]
pub struct Ticket {
    buffer: Option<Buffer>,
    done: Handle<sys::CUevent>,
    // A copy may still run when the ticket is gone; `Pinned` waits for the stream before it frees.
    _host: PinnedBuffer,
}

impl Cuda {
    /// Allocates page-locked host memory. The driver takes milliseconds for it: reuse it.
    pub fn pinned(&self, bytes: usize) -> PinnedBuffer {
        let mut memory = core::ptr::null_mut();
        self.run("allocating pinned host memory", || driver!(cuMemHostAlloc(&mut memory, bytes, 0)));
        PinnedBuffer(Arc::new(Pinned { cuda: self.clone(), memory: Handle(memory.cast()), bytes }))
    }

    /// Begins to copy a buffer to the host, once everything queued so far on the compute stream is done.
    pub fn copy_out(&self, source: Buffer, target: &PinnedBuffer) -> Ticket {
        let bytes = source.bytes();
        let (from, to) = (source.ptr(), target.0.memory.0);
        self.transfer("copy to host", source, target, |stream| {
            driver!(cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, stream))
        })
    }

    /// Begins to fill a buffer from the host, once everything queued so far on the compute stream is done. To overlap
    /// the copy with work, call this before that work is queued.
    pub fn copy_in(&self, source: &PinnedBuffer, target: Buffer) -> Ticket {
        let bytes = target.bytes();
        let (from, to) = (source.0.memory.0, target.ptr());
        self.transfer("copy from host", target, source, |stream| {
            driver!(cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, stream))
        })
    }

    fn transfer(
        &self,
        operation: &'static str,
        buffer: Buffer,
        host: &PinnedBuffer,
        copy: impl FnOnce(sys::CUstream) -> Result<(), super::driver::Failed>,
    ) -> Ticket {
        let mut done = Handle(core::ptr::null_mut());
        if buffer.bytes() > host.bytes() {
            let reason = format!("{buffer:?} is longer than the {} bytes of the pinned memory", host.bytes());
            self.fail(CudaError::Usage { operation: operation.into(), reason });
        }
        self.run(operation, || {
            let stream = self.0.copy.0;
            done = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            driver!(cuEventRecord(done.0, self.compute()))?;
            driver!(cuStreamWaitEvent(stream, done.0, 0))?;
            copy(stream)?;
            driver!(cuEventRecord(done.0, stream))
        });
        Ticket { buffer: Some(buffer), done, _host: host.clone() }
    }
}

impl Ticket {
    /// Makes later work of the compute stream wait for the copy, and gives the device memory back.
    pub fn finish(mut self) -> Buffer {
        self.order();
        self.buffer.take().expect("a ticket has its buffer until it is finished")
    }

    fn order(&mut self) {
        let done = core::mem::replace(&mut self.done.0, core::ptr::null_mut());
        if let Some(buffer) = &self.buffer
            && !done.is_null()
        {
            let cuda = buffer.cuda();
            cuda.run("waiting for a copy", || driver!(cuStreamWaitEvent(cuda.compute(), done, 0)));
            // The driver keeps an event that a stream still waits for until it is done.
            let _ = driver!(cuEventDestroy_v2(done));
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.order();
    }
}

impl PinnedBuffer {
    /// The length.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// Copies the beginning out, after waiting for the copies on their way.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn read(&self, target: &mut [u8]) -> Result<(), CudaError> {
        let length = target.len().min(self.settled()?);
        // SAFETY: `length` bytes of live memory, which no copy is writing and only `&mut self` writes from the host.
        unsafe { core::ptr::copy_nonoverlapping(self.0.memory.0, target.as_mut_ptr(), length) };
        Ok(())
    }

    /// Copies bytes to the beginning, after waiting for the copies on their way.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn write(&mut self, source: &[u8]) -> Result<(), CudaError> {
        let length = source.len().min(self.settled()?);
        // SAFETY: as in `read`.
        unsafe { core::ptr::copy_nonoverlapping(source.as_ptr(), self.0.memory.0, length) };
        Ok(())
    }

    /// Waits for the copy stream; how many bytes there are.
    fn settled(&self) -> Result<usize, CudaError> {
        let cuda = &self.0.cuda;
        cuda.check()?;
        cuda.run("waiting for a copy", || driver!(cuStreamSynchronize(cuda.0.copy.0)));
        cuda.check().map(|()| if self.0.memory.0.is_null() { 0 } else { self.0.bytes })
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if !self.memory.0.is_null() {
            let _ = self.cuda.bind();
            let _ = driver!(cuStreamSynchronize(self.cuda.0.copy.0));
            let _ = driver!(cuMemFreeHost(self.memory.0.cast()));
        }
    }
}
