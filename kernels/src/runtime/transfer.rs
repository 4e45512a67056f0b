//! Copies between host and device, and fills.

use super::driver::driver;
use super::{Buffer, Cuda, CudaError, MemoryUse};

impl Cuda {
    /// Copies host bytes to the beginning of a buffer. The source may change as soon as this returns.
    pub fn upload(&self, target: &Buffer, source: &[u8]) {
        self.upload_at(target, 0, source);
    }

    /// Copies host bytes into a buffer, from a byte on.
    pub fn upload_at(&self, target: &Buffer, offset: usize, source: &[u8]) {
        self.refuse_recording("upload");
        if self.fits("upload", target, offset, source.len()) {
            // The driver stages memory that is not pinned before it returns.
            self.run("upload", || {
                driver!(cuMemcpyHtoDAsync_v2(
                    target.ptr() + offset as u64,
                    source.as_ptr().cast(),
                    source.len(),
                    self.compute()
                ))
            });
        }
    }

    /// A new buffer with these bytes.
    pub fn uploaded(&self, source: &[u8], usage: MemoryUse) -> Buffer {
        let buffer = self.alloc(source.len(), usage);
        self.upload(&buffer, source);
        buffer
    }

    /// Copies the beginning of a buffer to the host, after waiting for everything queued so far.
    ///
    /// # Errors
    /// The error that sticks, if any; `target` is then undefined.
    pub fn download(&self, source: &Buffer, target: &mut [u8]) -> Result<(), CudaError> {
        self.download_at(source, 0, target)
    }

    /// Copies from a byte of a buffer on.
    ///
    /// # Errors
    /// As [`Cuda::download`].
    pub fn download_at(&self, source: &Buffer, offset: usize, target: &mut [u8]) -> Result<(), CudaError> {
        self.refuse_recording("download");
        self.check()?;
        if self.is_planned() {
            target.fill(0);
        }
        if self.fits("download", source, offset, target.len()) {
            self.run("download", || {
                let from = source.ptr() + offset as u64;
                driver!(cuMemcpyDtoHAsync_v2(target.as_mut_ptr().cast(), from, target.len(), self.compute()))?;
                driver!(cuStreamSynchronize(self.compute()))
            });
        }
        self.check()
    }

    /// Copies bytes from one buffer to another.
    pub fn copy(&self, source: &Buffer, from: usize, target: &Buffer, to: usize, bytes: usize) {
        if self.fits("copy", source, from, bytes) && self.fits("copy", target, to, bytes) {
            let (from, to) = (source.ptr() + from as u64, target.ptr() + to as u64);
            self.run("copy", || driver!(cuMemcpyDtoDAsync_v2(to, from, bytes, self.compute())));
        }
    }

    /// Fills a part of a buffer with a byte.
    pub fn fill(&self, target: &Buffer, offset: usize, bytes: usize, value: u8) {
        if self.fits("fill", target, offset, bytes) {
            let at = target.ptr() + offset as u64;
            self.run("fill", || driver!(cuMemsetD8Async(at, value, bytes, self.compute())));
        }
    }

    /// Memory of zeros.
    pub fn zeros(&self, bytes: usize, usage: MemoryUse) -> Buffer {
        let buffer = self.alloc(bytes, usage);
        self.fill(&buffer, 0, bytes, 0);
        buffer
    }

    /// Returns whether there is anything to do, and the range lies within the buffer.
    pub(super) fn fits(&self, operation: &str, buffer: &Buffer, offset: usize, bytes: usize) -> bool {
        if self.has_failed() || bytes == 0 {
            return false;
        }
        let fits = offset.checked_add(bytes).is_some_and(|end| end <= buffer.bytes());
        if !fits {
            let reason = format!("{bytes} bytes from byte {offset} do not fit into {buffer:?}");
            self.fail(CudaError::Usage { operation: operation.into(), reason });
        }
        fits
    }
}
