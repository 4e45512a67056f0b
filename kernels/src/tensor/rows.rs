//! A matrix that grows row by row: the keys or values of the tokens so far.

use burn::tensor::Tensor as BurnTensor;

use super::{MetaTensor, Tensor};
use crate::runtime::{Array, MemoryUse, elementwise};

/// Rows so far, with room for more.
#[derive(Debug)]
pub struct Rows {
    all: Option<Tensor<2>>,
    len: usize,
    capacity: usize,
}

impl Rows {
    /// None, with room for `capacity`.
    pub fn new(capacity: usize) -> Self {
        Self { all: None, len: 0, capacity }
    }

    /// Appends `new`; returns all rows so far.
    ///
    /// # Panics
    /// If there is no room left.
    pub fn append(&mut self, new: Tensor<2>) -> Tensor<2> {
        let [count, width] = new.dims();
        let (start, end) = (self.len, self.len + count);
        assert!(end <= self.capacity, "room for {} rows, and {end} come", self.capacity);
        self.len = end;
        match new {
            Tensor::Burn(new) => {
                let all = self.all.take().map_or_else(
                    || BurnTensor::zeros([self.capacity, width], (&new.device(), new.dtype())),
                    Tensor::into_burn,
                );
                // The only reference, so this writes in place.
                self.all = Some(all.slice_assign([start..end, 0..width], new).into());
            }
            Tensor::Cuda(new) => {
                let shape = [self.capacity, width];
                let all = self
                    .all
                    .get_or_insert_with(|| Array::empty(new.cuda(), shape, new.dtype(), MemoryUse::KvCache).into());
                elementwise::copy_into(&new, &all.cuda().row_range(start, count));
            }
            Tensor::Meta(new) => {
                let whole = || MetaTensor::new(new.device(), [self.capacity, width], new.dtype(), MemoryUse::KvCache);
                self.all.get_or_insert_with(|| whole().into());
            }
        }
        self.all.as_ref().expect("just put there").rows(0, end)
    }
}
