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

use burn::tensor::Tensor;

use crate::{Path, cpu, portable};

/// `silu(gate) ∘ up`.
pub fn forward(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    match Path::of(gate) {
        Path::Cpu => cpu::swiglu::forward(gate, up),
        Path::Portable => portable::swiglu::forward(gate, up),
    }
}

/// `(dgate, dup)`, written over gate and up where nothing else holds them.
pub fn backward(dact: &Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    match Path::of(&gate) {
        Path::Cpu => cpu::swiglu::backward(dact, gate, up),
        Path::Portable => portable::swiglu::backward(dact, gate, up),
    }
}
