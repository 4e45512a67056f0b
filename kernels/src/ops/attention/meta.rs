//! Memory of attention over slices.

use super::{AttentionGrads, Document, Heads, SavedIn, cpu};
use crate::tensor::MetaTensor;

pub(super) fn forward(
    q: &MetaTensor,
    k: &MetaTensor,
    v: &MetaTensor,
    heads: Heads,
    documents: &[Document],
) -> (MetaTensor, MetaTensor) {
    let _views = [q, k, v].map(MetaTensor::contiguous);
    let (o, lse) = (q.like(), q.f32_sized([heads.heads, q.dims()[0]]));
    let _scratch = q.device().scratch(cpu::forward_scratch(heads, documents));
    (o, lse)
}

pub(super) fn backward(
    d_o: &MetaTensor,
    saved: &SavedIn<'_, MetaTensor>,
    sinks: Option<&MetaTensor>,
    heads: Heads,
    documents: &[Document],
) -> AttentionGrads<MetaTensor, MetaTensor> {
    let &SavedIn { q, k, v, o, lse } = saved;
    let _views = [q, k, v, o, lse, d_o].map(MetaTensor::contiguous);
    let sinks = sinks.map(|sinks| sinks.f32_sized([1, heads.heads]));
    let grads = AttentionGrads { q: q.like(), k: k.like(), v: v.like(), sinks };
    let _scratch = d_o.device().scratch(cpu::backward_scratch(heads, documents));
    grads
}
