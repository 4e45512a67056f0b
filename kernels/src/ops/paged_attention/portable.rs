//! Attention over pages in Burn operations: the keys and values of each sequence are gathered, and attended to as one
//! document.

use burn::tensor::Tensor;

use super::{PAGE, PagedBatch};
use crate::attention::{Document, Heads};
use crate::ops::attention::portable as contiguous;
use crate::tensor::indices;

/// Writes the rows of new tokens into the pool.
pub(super) fn write(rows: &Tensor<2>, pool: &mut Tensor<2>, batch: &PagedBatch) {
    let width = rows.dims()[1];
    let mut all = take(pool);
    for sequence in &batch.sequences {
        for (tokens, at) in sequence.runs(sequence.past..sequence.past + sequence.new) {
            let part = rows.clone().narrow(0, sequence.row + tokens.start - sequence.past, tokens.len());
            all = all.slice_assign([at..at + tokens.len(), 0..width], part);
        }
    }
    *pool = all;
}

/// Copies the rows of a page.
pub(super) fn copy_page(pool: &mut Tensor<2>, from: usize, to: usize) {
    let width = pool.dims()[1];
    let page = pool.clone().narrow(0, from * PAGE, PAGE);
    *pool = take(pool).slice_assign([to * PAGE..(to + 1) * PAGE, 0..width], page);
}

pub(super) fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    batch: &PagedBatch,
) -> Tensor<2> {
    let mut outs = Vec::new();
    for sequence in batch.sequences.iter().filter(|sequence| sequence.new > 0) {
        let length = sequence.past + sequence.new;
        let rows = || (0..length).map(|token| sequence.pool_row(token));
        let (k, v) = (k.clone().select(0, indices(rows(), k)), v.clone().select(0, indices(rows(), v)));
        let q = q.clone().narrow(0, sequence.row, sequence.new);
        let document = [Document { query: 0, key: 0, queries: sequence.new, past: sequence.past }];
        outs.push(contiguous::forward(&q, &k, &v, sinks, heads, &document).0);
    }
    if outs.is_empty() { q.clone() } else { Tensor::cat(outs, 0) }
}

/// Takes a tensor out of its place, so that the only reference to it can be written in place.
fn take(tensor: &mut Tensor<2>) -> Tensor<2> {
    let empty = Tensor::zeros([0, 0], (&tensor.device(), tensor.dtype()));
    core::mem::replace(tensor, empty)
}
