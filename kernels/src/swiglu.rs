//! The gated activation of the feed-forward half: act = silu(gate) ∘ up, silu(g) = g · σ(g)
//! (Shazeer, arXiv:2002.05202).
//!
//! dup = dact ∘ silu(gate); dgate = dact ∘ up ∘ σ(gate) · (1 + gate · (1 − σ(gate))).
//!
//! # Shapes
//! All `[tokens, intermediate]`.
//!
//! # Gradients
//! Saved: gate and up; act is made again where it is needed.

use crate::cuda::ops;
use crate::{Path, Tensor, cpu, portable};

/// `silu(gate) ∘ up`.
pub fn forward(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    match Path::of(gate) {
        Path::Cpu => cpu::swiglu::forward(gate.burn(), up.burn()).into(),
        Path::Portable => portable::swiglu::forward(gate.burn(), up.burn()).into(),
        Path::Cuda => ops::swiglu::forward(gate.cuda(), up.cuda()).into(),
    }
}

/// `(dgate, dup)`, written over gate and up where nothing else holds them.
pub fn backward(dact: &Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    match Path::of(&gate) {
        Path::Cpu => wrap(cpu::swiglu::backward(dact.burn(), gate.into_burn(), up.into_burn())),
        Path::Portable => wrap(portable::swiglu::backward(dact.burn(), gate.into_burn(), up.into_burn())),
        Path::Cuda => wrap(ops::swiglu::backward(dact.cuda(), gate.into_cuda(), up.into_cuda())),
    }
}

fn wrap<A: Into<Tensor<2>>>((dgate, dup): (A, A)) -> (Tensor<2>, Tensor<2>) {
    (dgate.into(), dup.into())
}
