//! Host memory that the device copies to and from while it computes.

use std::collections::BTreeMap;
use std::sync::Arc;

use cudarc::driver::sys;

use super::driver::{Handle, driver, lock};
use super::error::bytes as show;
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
    _host: PinnedBuffer,
}

impl Cuda {
    /// Returns at least `bytes` of page-locked host memory. It reuses a dropped buffer that is long enough but less than
    /// twice as long, because the driver takes milliseconds to allocate.
    pub fn pinned(&self, bytes: usize) -> PinnedBuffer {
        let spare = lock(&self.0.pinned).take(bytes);
        let (memory, bytes) = spare.unwrap_or_else(|| {
            let mut memory = core::ptr::null_mut();
            if self.run("allocating pinned host memory", || driver!(cuMemHostAlloc(&mut memory, bytes, 0))) {
                lock(&self.0.pinned).taken += bytes;
            }
            (Handle(memory.cast()), bytes)
        });
        PinnedBuffer(Arc::new(Pinned { cuda: self.clone(), memory, bytes }))
    }

    /// Bytes of page-locked host memory that the driver gave, in use or kept for the next who asks.
    pub fn pinned_bytes(&self) -> usize {
        lock(&self.0.pinned).taken
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
        self.refuse_recording(operation);
        if buffer.bytes() > host.bytes() {
            let reason = format!("{buffer:?} is longer than the {} bytes of the pinned memory", host.bytes());
            self.fail(CudaError::Usage { operation: operation.into(), reason });
        }
        self.run(operation, || {
            let stream = self.copies();
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
    /// The device that copies from and to it.
    pub fn cuda(&self) -> &Cuda {
        &self.0.cuda
    }

    /// The length.
    pub fn bytes(&self) -> usize {
        self.0.bytes
    }

    /// The address on the host.
    pub(super) fn host_ptr(&self) -> *mut u8 {
        self.0.memory.0
    }

    /// The address that kernels read and write it by: with unified addressing all pinned memory has one.
    pub fn device_ptr(&self) -> u64 {
        let mut address = 0;
        if !self.0.memory.0.is_null() {
            let host = self.0.memory.0.cast();
            self.0
                .cuda
                .run("mapping pinned host memory", || driver!(cuMemHostGetDevicePointer_v2(&mut address, host, 0)));
        }
        address
    }

    /// Copies the beginning out, after waiting for the copies on their way.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn read(&self, target: &mut [u8]) -> Result<(), CudaError> {
        self.read_at(0, target)
    }

    /// Copies bytes to the beginning, after waiting for the copies on their way.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn write(&mut self, source: &[u8]) -> Result<(), CudaError> {
        self.write_at(0, source)
    }

    /// Copies from a byte on, after waiting for the copies on their way; kernels that write here are the caller's to wait
    /// for.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn read_at(&self, offset: usize, target: &mut [u8]) -> Result<(), CudaError> {
        let bytes = self.settled()?;
        let offset = offset.min(bytes);
        let length = target.len().min(bytes - offset);
        // SAFETY: `length` bytes of live memory, which no copy is writing and only `&mut self` writes from the host.
        unsafe { core::ptr::copy_nonoverlapping(self.0.memory.0.add(offset), target.as_mut_ptr(), length) };
        Ok(())
    }

    /// Copies bytes to where they begin with a byte, as [`read_at`](Self::read_at) does.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn write_at(&mut self, offset: usize, source: &[u8]) -> Result<(), CudaError> {
        let bytes = self.settled()?;
        let offset = offset.min(bytes);
        let length = source.len().min(bytes - offset);
        // SAFETY: as in `read_at`.
        unsafe { core::ptr::copy_nonoverlapping(source.as_ptr(), self.0.memory.0.add(offset), length) };
        Ok(())
    }

    /// Waits for the copy stream; how many bytes there are.
    fn settled(&self) -> Result<usize, CudaError> {
        let cuda = &self.0.cuda;
        cuda.check()?;
        cuda.run("waiting for a copy", || driver!(cuStreamSynchronize(cuda.copies())));
        cuda.check().map(|()| if self.0.memory.0.is_null() { 0 } else { self.0.bytes })
    }
}

impl core::fmt::Debug for PinnedBuffer {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "PinnedBuffer({})", show(self.0.bytes))
    }
}

impl core::fmt::Debug for Ticket {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_tuple("Ticket").field(&self.buffer).finish()
    }
}

impl Drop for Pinned {
    /// A copy may be on its way: the next one is queued behind it, and the host looks only after waiting.
    fn drop(&mut self) {
        if !self.memory.0.is_null() || self.cuda.is_planned() {
            lock(&self.cuda.0.pinned).by_length.entry(self.bytes).or_default().push(self.memory);
        }
    }
}

/// Page-locked memory that nobody uses, by length.
#[derive(Default)]
pub(super) struct Spare {
    by_length: BTreeMap<usize, Vec<Handle<*mut u8>>>,
    /// Bytes that the driver gave, in use or not.
    taken: usize,
}

impl Spare {
    fn take(&mut self, bytes: usize) -> Option<(Handle<*mut u8>, usize)> {
        let (&length, spare) =
            self.by_length.range_mut(bytes..=bytes.saturating_mul(2)).find(|(_, spare)| !spare.is_empty())?;
        spare.pop().map(|memory| (memory, length))
    }

    /// Gives all of it back to the driver. The copy stream must have finished.
    pub(super) fn release(&mut self) {
        for (length, memory) in core::mem::take(&mut self.by_length) {
            self.taken -= length * memory.len();
            for memory in memory.into_iter().filter(|memory| !memory.0.is_null()) {
                let _ = driver!(cuMemFreeHost(memory.0.cast()));
            }
        }
    }
}
