//! Tensors without values: what a computation on the CPU allocates is known before there are any weights.
//!
//! On [`Device::Meta`](crate::Device::Meta) the code of a training step runs as on the CPU, and nothing is computed. Each
//! operation has a `meta.rs` beside its `cpu.rs`: it makes the results that the CPU's makes, where it would make them, and
//! charges the scratch memory that the CPU's uses. So the account of a step follows from the step itself.

use std::sync::{Arc, Mutex, MutexGuard};

use burn::tensor::DType;

use crate::runtime::{MemoryLedger, MemoryStats, MemoryUse};

/// A device that stands for the CPU, counts memory and computes nothing. Cloning gives another handle of the same count.
#[derive(Clone, Debug, Default)]
pub struct MetaDevice(Arc<Mutex<MemoryLedger>>);

/// Memory that is counted until this is dropped.
#[derive(Debug)]
pub struct MetaMemory {
    device: MetaDevice,
    usage: MemoryUse,
    bytes: usize,
}

impl MetaDevice {
    /// Counts memory until the result is dropped.
    #[must_use]
    pub fn charge(&self, usage: MemoryUse, bytes: usize) -> MetaMemory {
        self.ledger().charge(usage, bytes);
        MetaMemory { device: self.clone(), usage, bytes }
    }

    /// Counts scratch memory of an operation until the result is dropped.
    #[must_use]
    pub(crate) fn scratch(&self, bytes: usize) -> MetaMemory {
        self.charge(MemoryUse::Scratch, bytes)
    }

    /// Returns how much memory is in use, and for what.
    pub fn memory(&self) -> MemoryStats {
        self.ledger().stats()
    }

    /// Begins a new measurement of [`MemoryStats::high_water`].
    pub fn reset_high_water(&self) {
        self.ledger().reset();
    }

    /// Returns the bytes that were in use when the first tensor for `usage` came, since the start or
    /// [`reset_high_water`](Self::reset_high_water).
    pub fn in_use_before(&self, usage: MemoryUse) -> Option<usize> {
        self.ledger().in_use_before(usage)
    }

    fn ledger(&self) -> MutexGuard<'_, MemoryLedger> {
        // The counts are right after a panic elsewhere too.
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl MetaMemory {
    pub(crate) fn device(&self) -> &MetaDevice {
        &self.device
    }
}

impl Drop for MetaMemory {
    fn drop(&mut self) {
        self.device.ledger().release(self.usage, self.bytes);
    }
}

/// The shape, the layout and the dtype of a matrix, and a share of the memory that it would have. A vector has one row.
#[derive(Clone, Debug)]
pub struct MetaTensor {
    memory: Arc<MetaMemory>,
    /// Elements before the first.
    offset: usize,
    rows: usize,
    cols: usize,
    /// Elements from row to row.
    stride: usize,
    dtype: DType,
}

impl MetaTensor {
    /// A matrix in memory of its own.
    pub(crate) fn new(device: &MetaDevice, [rows, cols]: [usize; 2], dtype: DType, usage: MemoryUse) -> Self {
        let memory = Arc::new(device.charge(usage, rows * cols * dtype.size()));
        Self { memory, offset: 0, rows, cols, stride: cols, dtype }
    }

    /// A result of these sizes beside another tensor, of its dtype.
    pub(crate) fn sized(&self, dims: [usize; 2]) -> Self {
        Self::new(self.device(), dims, self.dtype, MemoryUse::Activations)
    }

    /// A result of another tensor's sizes and dtype.
    pub(crate) fn like(&self) -> Self {
        self.sized(self.dims())
    }

    /// An `f32` result of these sizes beside another tensor.
    pub(crate) fn f32_sized(&self, dims: [usize; 2]) -> Self {
        Self::new(self.device(), dims, DType::F32, MemoryUse::Activations)
    }

    pub(crate) fn device(&self) -> &MetaDevice {
        self.memory.device()
    }

    pub(crate) fn dims(&self) -> [usize; 2] {
        [self.rows, self.cols]
    }

    pub(crate) fn dtype(&self) -> DType {
        self.dtype
    }

    /// Some columns, in the same memory.
    pub(crate) fn columns(&self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.cols, "columns {first}..{} of {}", first + count, self.cols);
        Self { offset: self.offset + first, cols: count, ..self.clone() }
    }

    /// Some rows, in the same memory.
    pub(crate) fn row_range(&self, first: usize, count: usize) -> Self {
        assert!(first + count <= self.rows, "rows {first}..{} of {}", first + count, self.rows);
        Self { offset: self.offset + first * self.stride, rows: count, ..self.clone() }
    }

    /// Some elements of a vector as a matrix, in the same memory.
    pub(crate) fn part(&self, first: usize, [rows, cols]: [usize; 2]) -> Self {
        assert!(self.rows == 1 && first + rows * cols <= self.cols, "{rows} × {cols} from {first} of {}", self.cols);
        Self { offset: self.offset + first, rows, cols, stride: cols, ..self.clone() }
    }

    /// The same elements in rows of another width: in the same memory if nothing lies between the rows.
    pub(crate) fn reshaped(&self, [rows, cols]: [usize; 2]) -> Self {
        assert_eq!(rows * cols, self.rows * self.cols, "{rows} × {cols} of {:?}", self.dims());
        Self { rows, cols, stride: cols, ..self.contiguous() }
    }

    /// The tensor as the CPU's slices read it: itself, or a copy if something lies between its rows.
    pub(crate) fn contiguous(&self) -> Self {
        if self.rows <= 1 || self.stride == self.cols { self.clone() } else { self.like() }
    }

    /// The tensor as the CPU takes a `Vec` out of it: its own memory if nothing else refers to it, or a copy.
    pub(crate) fn owned(self) -> Self {
        let own =
            Arc::strong_count(&self.memory) == 1 && self.rows * self.cols * self.dtype.size() == self.memory.bytes;
        if own { self } else { self.like() }
    }

    /// The result of an operation that Burn's CPU backend does in place where nothing else refers to the memory.
    pub(crate) fn elementwise(self) -> Self {
        let contiguous = self.rows <= 1 || self.stride == self.cols;
        let own = Arc::strong_count(&self.memory) == 1 && contiguous && self.offset == 0;
        if own { self } else { self.like() }
    }

    /// The values in a dtype: itself if they have it, or a copy.
    pub(crate) fn cast(self, dtype: DType) -> Self {
        if self.dtype == dtype {
            return self;
        }
        Self::new(self.device(), self.dims(), dtype, MemoryUse::Activations)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_shared_by_views_and_copied_where_the_cpu_copies() {
        let device = MetaDevice::default();
        let x = MetaTensor::new(&device, [4, 6], DType::F32, MemoryUse::Weights);
        let (columns, rows) = (x.columns(2, 3), x.row_range(1, 2));
        assert_eq!(device.memory().in_use, 96);
        assert_eq!(rows.contiguous().dims(), [2, 6]);
        assert_eq!(device.memory().high_water, 96, "rows are read where they are");
        assert_eq!(columns.contiguous().dims(), [4, 3]);
        assert_eq!(device.memory().high_water, 96 + 48, "columns are gathered");
        drop((columns, rows));
        let x = x.elementwise().owned();
        assert_eq!(device.memory().in_use, 96, "nothing else refers to it");
        let second = x.clone();
        let sum = x.elementwise();
        assert_eq!(device.memory().in_use, 192, "something else does");
        drop((second, sum));
        assert_eq!(device.memory().in_use, 0);
    }
}
