//! The state of decoding: keys and values of the tokens so far.

use rekindle_kernels::{Rows, Tensor, from_f32};

/// The keys and values of one layer, with space for more; of a gated delta layer its state and the last inputs of its
/// convolution.
#[derive(Debug)]
pub struct LayerKvCache {
    k: Rows,
    v: Rows,
    recurrent: Option<RecurrentState>,
}

/// The state of a gated delta layer.
#[derive(Debug)]
struct RecurrentState {
    /// The last inputs of the convolution, `[taps - 1, channels]`.
    past: Tensor<2>,
    state: Tensor<2>,
}

impl LayerKvCache {
    /// An empty cache for `capacity` tokens.
    pub fn new(capacity: usize) -> Self {
        Self { k: Rows::new(capacity), v: Rows::new(capacity), recurrent: None }
    }

    /// Appends keys and values `[new, width]`; returns all so far, `[tokens, width]`.
    pub fn append(&mut self, k: Tensor<2>, v: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
        (self.k.append(k), self.v.append(v))
    }

    /// Takes the last `rows` inputs of the convolution, zeros at the start of the document, and the state after the tokens
    /// so far, `None` at the start. `like` is a matrix of as many channels.
    pub(super) fn take_recurrent(&mut self, rows: usize, like: &Tensor<2>) -> (Tensor<2>, Option<Tensor<2>>) {
        match self.recurrent.take() {
            Some(RecurrentState { past, state }) => (past, Some(state)),
            None => {
                let shape = [rows, like.dims()[1]];
                let zeros = from_f32(vec![0.0; shape[0] * shape[1]], shape, &like.device(), like.dtype());
                (zeros, None)
            }
        }
    }

    /// Puts the state after new tokens, whose inputs of the convolution came after `past`.
    pub(super) fn put_recurrent(&mut self, past: Tensor<2>, new: &Tensor<2>, state: Tensor<2>) {
        let (before, after) = (past.dims()[0], new.dims()[0]);
        let kept = before.saturating_sub(after);
        let last = new.rows(after - (before - kept), before - kept);
        let parts = if kept == 0 { vec![last] } else { vec![past.rows(before - kept, kept), last] };
        self.recurrent = Some(RecurrentState { past: Tensor::cat_rows(parts), state });
    }
}
