//! The state that layers keep between the tokens of sequences.

use std::collections::HashMap;

use rekindle_kernels::paged_attention::KvPages;
use rekindle_kernels::{Tensor, from_f32};

/// The state of one layer for all sequences that are decoded together.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one a layer")]
pub enum LayerState {
    /// Keys and values of any number of sequences, in pages.
    Pages(KvPages),
    /// The states of gated delta layers, one for each sequence.
    Recurrent(RecurrentStates),
}

/// The states of one gated delta layer, by sequence.
#[derive(Debug, Default)]
pub struct RecurrentStates {
    by_sequence: HashMap<u64, RecurrentState>,
}

/// The state of a gated delta layer after the tokens of a sequence.
#[derive(Clone, Debug)]
struct RecurrentState {
    /// The last inputs of the convolution, `[taps - 1, channels]`.
    past: Tensor<2>,
    state: Tensor<2>,
}

impl RecurrentStates {
    /// Takes the last `rows` inputs of the convolution, zeros at the start of a sequence, and the state after the tokens so
    /// far, `None` at the start. `like` is a matrix of as many channels.
    pub(super) fn take(
        &mut self,
        sequence: u64,
        is_start: bool,
        rows: usize,
        like: &Tensor<2>,
    ) -> (Tensor<2>, Option<Tensor<2>>) {
        match self.by_sequence.remove(&sequence).filter(|_| !is_start) {
            Some(RecurrentState { past, state }) => (past, Some(state)),
            None => {
                assert!(is_start, "sequence {sequence} has earlier tokens and no state");
                let shape = [rows, like.dims()[1]];
                let zeros = from_f32(vec![0.0; shape[0] * shape[1]], shape, &like.device(), like.dtype());
                (zeros, None)
            }
        }
    }

    /// Puts the state after new tokens, whose inputs of the convolution came after `past`.
    pub(super) fn put(&mut self, sequence: u64, past: Tensor<2>, new: &Tensor<2>, state: Tensor<2>) {
        let (before, after) = (past.dims()[0], new.dims()[0]);
        let kept = before.saturating_sub(after);
        let last = new.rows(after - (before - kept), before - kept);
        let parts = if kept == 0 { vec![last] } else { vec![past.rows(before - kept, kept), last] };
        self.by_sequence.insert(sequence, RecurrentState { past: Tensor::cat_rows(parts), state });
    }

    /// Gives a sequence the state of another one.
    pub(crate) fn copy(&mut self, from: u64, to: u64) {
        if let Some(state) = self.by_sequence.get(&from).cloned() {
            self.by_sequence.insert(to, state);
        }
    }

    /// Removes the state of a sequence.
    pub(crate) fn remove(&mut self, sequence: u64) {
        self.by_sequence.remove(&sequence);
    }
}
