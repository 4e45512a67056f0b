//! The gated activation of the feed-forward half: act = silu(gate) ∘ up, silu(g) = g · σ(g)
//! (Shazeer, arXiv:2002.05202).
//!
//! dup = dact ∘ silu(gate); dgate = dact ∘ up ∘ σ(gate) · (1 + gate · (1 − σ(gate))).
//!
//! # Shapes
//! All `[tokens, intermediate]`.
//!
//! # Gradients
//! Saved: gate and up; the backward recomputes act.

mod cpu;
mod cuda;
mod meta;
mod portable;

use crate::tensor::triple;
use crate::{Backend, Tensor};

/// Returns `silu(gate) ∘ up`; on CUDA with `pad_cols` spare columns behind each row ([`stacked`](crate::ops::stacked)).
pub fn forward(gate: &Tensor<2>, up: &Tensor<2>, pad_cols: usize) -> Tensor<2> {
    match Backend::of(gate) {
        Backend::Cpu => cpu::forward(gate.burn(), up.burn()).into(),
        Backend::Portable => portable::forward(gate.burn(), up.burn()).into(),
        Backend::Cuda => cuda::forward(gate.cuda(), up.cuda(), pad_cols).into(),
        Backend::Meta => meta::forward(gate.meta(), up.meta()).into(),
    }
}

/// Returns `(dgate, dup, act)`, written over gate, up and dact if nothing else refers to them.
pub fn backward(dact: Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    match Backend::of(&gate) {
        Backend::Cpu => {
            let act = cpu::forward(gate.burn(), up.burn());
            let (dgate, dup) = cpu::backward(dact.burn(), gate.into_burn(), up.into_burn());
            triple((dgate, dup, act))
        }
        Backend::Portable => {
            let act = portable::forward(gate.burn(), up.burn());
            let (dgate, dup) = portable::backward(dact.burn(), gate.into_burn(), up.into_burn());
            triple((dgate, dup, act))
        }
        Backend::Cuda => triple(cuda::backward(dact.into_cuda(), gate.into_cuda(), up.into_cuda())),
        Backend::Meta => triple(meta::backward(dact.meta(), gate.into_meta(), up.into_meta())),
    }
}
