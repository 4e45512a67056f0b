//! Results that the host reads later, while the device goes on.

use super::driver::driver;
use super::{Buffer, Cuda, CudaError, Event, PinnedBuffer};

/// Words on their way from the device to the host, in the order of the compute stream.
#[derive(Debug)]
#[must_use = "the words are read by `wait`"]
pub struct ReadBack {
    host: PinnedBuffer,
    words: usize,
    /// `None` once the host has waited for it.
    done: Option<Event>,
}

impl Cuda {
    /// Begins to copy `words` 32-bit words from a byte of a buffer on, behind everything queued so far. Later work may
    /// overwrite them.
    pub fn read_back(&self, source: &Buffer, offset: usize, words: usize) -> ReadBack {
        self.refuse_recording("read back");
        let host = self.pinned(4 * words);
        if self.fits("read back", source, offset, 4 * words) {
            let (from, to) = (source.ptr() + offset as u64, host.host_ptr());
            self.run("read back", || driver!(cuMemcpyDtoHAsync_v2(to.cast(), from, 4 * words, self.compute())));
        }
        ReadBack { host, words, done: Some(self.event()) }
    }
}

impl ReadBack {
    /// Waits for the words and returns them.
    ///
    /// # Errors
    /// The error that sticks, if any.
    pub fn wait(mut self) -> Result<Vec<u32>, CudaError> {
        if let Some(done) = self.done.take() {
            done.wait()?;
        }
        let mut bytes = vec![0; 4 * self.words];
        self.host.read(&mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }
}

impl Drop for ReadBack {
    /// The memory is not given back before the copy has ended.
    fn drop(&mut self) {
        if let Some(done) = &self.done {
            let _ = done.wait();
        }
    }
}
