//! A writer for the bytes of one tensor, in any file format.

use std::io::{self, Write};

/// A writer that accepts exactly the bytes of one tensor.
pub struct TensorWriter<'a> {
    out: &'a mut dyn Write,
    missing: u64,
    overrun: u64,
}

impl<'a> TensorWriter<'a> {
    /// Returns a writer to `out` that accepts this many bytes.
    pub fn new(out: &'a mut dyn Write, bytes: u64) -> Self {
        Self { out, missing: bytes, overrun: 0 }
    }

    /// Returns the number of bytes that are still to be written.
    pub fn missing(&self) -> u64 {
        self.missing
    }

    /// Returns the number of bytes that were refused, because the tensor has fewer.
    pub fn overrun(&self) -> u64 {
        self.overrun
    }
}

impl Write for TensorWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = bytes.len() as u64;
        if length > self.missing {
            self.overrun += length - self.missing;
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more bytes than the tensor has"));
        }
        let written = self.out.write(bytes)?;
        self.missing -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}
