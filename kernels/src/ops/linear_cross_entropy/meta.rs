//! Memory of the head and the loss on the CPU, chunk by chunk.

use burn::tensor::DType;

use super::chunks::chunk_rows;
use super::{LmHead, counted};
use crate::ops::matmul::{self, Form};
use crate::runtime::MemoryUse;
use crate::tensor::MetaTensor;
use crate::{Grads, ParamRef, Tensor};

/// A forward of either kind.
pub(super) fn forward(h: &MetaTensor, head: &LmHead, targets: &[i32]) {
    for rows in counted(targets).chunks(chunk_rows(head.vocab())) {
        let hidden = pick(h, rows);
        let _logits = logits(&hidden, head.weight.meta());
    }
}

/// A backward of either kind: the gradient lies in the place of the logits.
pub(super) fn backward(
    h: &MetaTensor,
    head: &LmHead,
    targets: &[i32],
    mut weight_grad: Option<(&mut Grads, ParamRef)>,
) -> MetaTensor {
    let weight = head.weight.meta();
    let rows = counted(targets);
    let mut parts = Vec::new();
    for rows in rows.chunks(chunk_rows(head.vocab())) {
        let hidden = pick(h, rows);
        let dlogits = logits(&hidden, weight);
        parts.push(matmul::meta::product(&dlogits, weight, Form::Nn));
        if let Some((grads, param)) = weight_grad.as_mut() {
            grads.add_tn(*param, 1.0, &Tensor::Meta(dlogits), &Tensor::Meta(hidden));
        }
    }
    if rows.len() == targets.len() && !rows.is_empty() {
        return h.sized([rows.len(), h.dims()[1]]);
    }
    let zeros = h.like();
    if rows.is_empty() {
        return zeros;
    }
    let _together = h.sized([rows.len(), h.dims()[1]]);
    drop(parts);
    // Burn's zeros are copied before they are first written.
    h.like()
}

/// The logits of some rows, with what the product packs on the way.
fn logits(hidden: &MetaTensor, weight: &MetaTensor) -> MetaTensor {
    let dims = [hidden.dims()[0], weight.dims()[0]];
    let logits = MetaTensor::new(hidden.device(), dims, DType::F32, MemoryUse::Logits);
    let _scratch = matmul::meta::scratch(hidden, weight, Form::Nt);
    logits
}

/// Rows that lie together are a view, others are gathered.
fn pick(h: &MetaTensor, rows: &[usize]) -> MetaTensor {
    let (first, last) = (rows[0], rows[rows.len() - 1]);
    if last - first + 1 == rows.len() { h.row_range(first, rows.len()) } else { h.sized([rows.len(), h.dims()[1]]) }
}
