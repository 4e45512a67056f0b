//! Keys and values of the tokens so far.

use rekindle_kernels::{Rows, Tensor};

/// The keys and values of one layer, with space for more.
#[derive(Debug)]
pub struct LayerKvCache {
    k: Rows,
    v: Rows,
}

impl LayerKvCache {
    /// An empty cache for `capacity` tokens.
    pub fn new(capacity: usize) -> Self {
        Self { k: Rows::new(capacity), v: Rows::new(capacity) }
    }

    /// Appends keys and values `[new, width]`; returns all so far, `[tokens, width]`.
    pub fn append(&mut self, k: Tensor<2>, v: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        (self.k.append(k), self.v.append(v))
    }
}
