//! The sigmoid gate on the result of attention, whose logits come from the projection of the queries.
//!
//! A row of qg holds, for each head, its query and then its logits g (transformers' `Qwen3NextAttention`): y = o ∘ σ(g).
//! d_o = dy ∘ σ(g); dg = dy ∘ o ∘ σ(g) ∘ (1 − σ(g)).
//!
//! # Shapes
//! qg `[tokens, heads · 2 · head_dim]`; queries, o, y `[tokens, heads · head_dim]`.
//!
//! # Gradients
//! To o and qg. Saved: o and qg.

mod cpu;
mod cuda;
mod portable;

use crate::{Backend, Tensor};

/// Returns the queries.
pub fn queries(qg: &Tensor<2>, head_dim: usize) -> Tensor<2> {
    match qg {
        Tensor::Burn(qg) => portable::part(qg, head_dim, 0).into(),
        Tensor::Cuda(qg) => cuda::queries(qg, head_dim).into(),
        Tensor::Meta(qg) => qg.sized([qg.dims()[0], qg.dims()[1] / 2]).into(),
    }
}

/// Returns y; on CUDA with `pad_cols` spare columns behind each row ([`stacked`](crate::ops::stacked)).
pub fn forward(o: &Tensor<2>, qg: &Tensor<2>, head_dim: usize, pad_cols: usize) -> Tensor<2> {
    match Backend::of(o) {
        Backend::Cpu => cpu::gated(o.burn(), qg.burn(), head_dim).into(),
        Backend::Portable => portable::gated(o.burn(), qg.burn(), head_dim).into(),
        Backend::Cuda => cuda::gated(o.cuda(), qg.cuda(), head_dim, pad_cols).into(),
        Backend::Meta => o.meta().like().into(),
    }
}

/// Returns the gradient to o.
pub fn backward(dy: &Tensor<2>, qg: &Tensor<2>, head_dim: usize) -> Tensor<2> {
    forward(dy, qg, head_dim, 0)
}

/// Returns the gradient to qg from that to the queries and that to y.
pub fn join(dq: &Tensor<2>, dy: &Tensor<2>, o: &Tensor<2>, qg: &Tensor<2>, head_dim: usize) -> Tensor<2> {
    match Backend::of(o) {
        Backend::Cpu => cpu::join([dq.burn(), dy.burn(), o.burn(), qg.burn()], head_dim).into(),
        Backend::Portable => portable::join([dq.burn(), dy.burn(), o.burn(), qg.burn()], head_dim).into(),
        Backend::Cuda => cuda::join(dq.cuda(), dy.cuda(), o.cuda(), qg.cuda(), head_dim).into(),
        Backend::Meta => qg.meta().like().into(),
    }
}
