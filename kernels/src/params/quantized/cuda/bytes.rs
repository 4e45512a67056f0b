//! Memory that several quantized weights may share.

use std::sync::Arc;

use crate::runtime::{Buffer, Cuda, CudaError, MemoryUse};

/// Bytes of a buffer that may contain others too. Cloning gives another handle of the same memory.
#[derive(Clone, Debug)]
pub(super) struct Bytes {
    pub(super) buffer: Arc<Buffer>,
    pub(super) first: usize,
    pub(super) len: usize,
}

impl Bytes {
    pub(super) fn whole(buffer: Buffer) -> Self {
        Self { first: 0, len: buffer.bytes(), buffer: Arc::new(buffer) }
    }

    pub(super) fn floats(cuda: &Cuda, values: &[f32]) -> Self {
        let buffer = cuda.alloc(4 * values.len(), MemoryUse::QuantizedWeights);
        if !cuda.is_planned() {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            cuda.upload(&buffer, &bytes);
        }
        Self::whole(buffer)
    }

    pub(super) fn ptr(&self) -> u64 {
        self.buffer.ptr() + self.first as u64
    }

    pub(super) fn part(&self, first: usize, len: usize) -> Self {
        assert!(first + len <= self.len, "bytes {first}..{} of {}", first + len, self.len);
        Self { buffer: Arc::clone(&self.buffer), first: self.first + first, len }
    }

    /// The parts one behind another, in the same memory where they are adjacent already.
    pub(super) fn joined(parts: &[Self]) -> Self {
        let touch = |[a, b]: &[Self; 2]| Arc::ptr_eq(&a.buffer, &b.buffer) && a.first + a.len == b.first;
        let len = parts.iter().map(|part| part.len).sum();
        if parts.array_windows().all(touch) {
            return Self { len, ..parts[0].clone() };
        }
        let cuda = parts[0].buffer.cuda();
        let whole = cuda.alloc(len, MemoryUse::QuantizedWeights);
        let mut at = 0;
        for part in parts {
            cuda.copy(&part.buffer, part.first, &whole, at, part.len);
            at += part.len;
        }
        Self::whole(whole)
    }

    /// Moves the parts into adjacent memory, which is returned.
    pub(super) fn adjoin(parts: &mut [&mut Self]) -> Self {
        let whole = Self::joined(&parts.iter().map(|part| (**part).clone()).collect::<Vec<_>>());
        let mut at = 0;
        for part in parts {
            **part = whole.part(at, part.len);
            at += part.len;
        }
        whole
    }

    pub(super) fn download(&self) -> Result<Vec<u8>, CudaError> {
        let mut bytes = vec![0; self.len];
        self.buffer.cuda().download_at(&self.buffer, self.first, &mut bytes)?;
        Ok(bytes)
    }
}
