//! The walk over chunks of rows on the CPU and in Burn's operations.

use burn::tensor::{IndexingUpdateOp, Tensor};

use super::LmHead;
use crate::tensor::indices;
use crate::{Grads, ParamRef};

/// Logits held at once, but never fewer than 64 rows of them: 8 Mi values, 32 MiB.
const CHUNK_LOGITS: usize = 8 << 20;

/// Rows of one chunk of logits: bounded by their size, a multiple of 64 where more than one chunk is needed.
pub(super) fn chunk_rows(vocab: usize) -> usize {
    (CHUNK_LOGITS / vocab).max(64) / 64 * 64
}

/// Some of the rows that have a target.
pub(super) struct Chunk {
    /// The hidden states of the rows.
    pub(super) hidden: Tensor<2>,
    /// The targets of the rows.
    pub(super) targets: Vec<u32>,
    /// The range of the rows among all rows that have a target.
    pub(super) range: core::ops::Range<usize>,
}

/// The rows of `h` at `counted`, in chunks.
pub(super) fn chunks<'a>(
    h: &'a Tensor<2>,
    head: &LmHead,
    targets: &'a [i32],
    counted: &'a [usize],
) -> impl Iterator<Item = Chunk> + 'a {
    let size = chunk_rows(head.vocab());
    counted.chunks(size).enumerate().map(move |(index, rows)| {
        let (first, last) = (rows[0], rows[rows.len() - 1]);
        let hidden = if last - first + 1 == rows.len() {
            h.clone().narrow(0, first, rows.len())
        } else {
            h.clone().select(0, indices(rows.iter().copied(), h))
        };
        let targets = rows.iter().map(|&t| targets[t] as u32).collect();
        Chunk { hidden, targets, range: index * size..index * size + rows.len() }
    })
}

/// The gradient to h from that of each chunk to h·Wᵀ; adds that to W to `weight_grad`.
pub(super) fn gradient(
    h: &Tensor<2>,
    head: &LmHead,
    targets: &[i32],
    counted: &[usize],
    mut dlogits: impl FnMut(&Chunk) -> Tensor<2>,
    mut weight_grad: Option<(&mut Grads, ParamRef)>,
) -> Tensor<2> {
    let mut parts = Vec::new();
    for chunk in chunks(h, head, targets, counted) {
        let dlogits = crate::Tensor::from(dlogits(&chunk));
        parts.push(crate::ops::matmul::nn(&dlogits, &head.weight).into_burn());
        if let Some((grads, param)) = weight_grad.as_mut() {
            grads.add_tn(*param, 1.0, &dlogits, &chunk.hidden.into());
        }
    }
    if counted.len() == targets.len() && !counted.is_empty() {
        return Tensor::cat(parts, 0);
    }
    let zeros = Tensor::zeros(h.dims(), (&h.device(), h.dtype()));
    if counted.is_empty() {
        return zeros;
    }
    let at = indices(counted.iter().copied(), h);
    zeros.select_assign(0, at, Tensor::cat(parts, 0), IndexingUpdateOp::Add)
}
