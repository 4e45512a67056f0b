//! Keys and values of the tokens so far.

use rekindle_kernels::{Rows, Tensor};

/// One block's keys and values, with room for more.
#[derive(Debug)]
pub(crate) struct LayerCache {
    k: Rows,
    v: Rows,
}

impl LayerCache {
    /// Empty, with room for `capacity` tokens.
    pub(crate) fn new(capacity: usize) -> Self {
        Self { k: Rows::new(capacity), v: Rows::new(capacity) }
    }

    /// Appends keys and values `[new, width]`; returns all so far, `[tokens, width]`.
    pub(crate) fn append(&mut self, k: Tensor<2>, v: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        (self.k.append(k), self.v.append(v))
    }
}
