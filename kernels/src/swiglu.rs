//! The gated activation of the feed-forward half: act = silu(gate) ∘ up, silu(g) = g · σ(g)
//! (Shazeer, arXiv:2002.05202).
//!
//! dup = dact ∘ silu(gate); dgate = dact ∘ up ∘ σ(gate) · (1 + gate · (1 − σ(gate))).
//!
//! # Shapes
//! All `[tokens, intermediate]`.
//!
//! # Gradients
//! Saved: gate and up; the backward makes act again on the way.

use crate::cuda::ops;
use crate::{Path, Tensor, cpu, portable};

/// `silu(gate) ∘ up`; on CUDA with room for `room` more columns ([`stacked`](crate::stacked)).
pub fn forward(gate: &Tensor<2>, up: &Tensor<2>, room: usize) -> Tensor<2> {
    match Path::of(gate) {
        Path::Cpu => cpu::swiglu::forward(gate.burn(), up.burn()).into(),
        Path::Portable => portable::swiglu::forward(gate.burn(), up.burn()).into(),
        Path::Cuda => ops::swiglu::forward(gate.cuda(), up.cuda(), room).into(),
    }
}

/// `(dgate, dup, act)`, written over gate, up and dact where nothing else holds them.
pub fn backward(dact: Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let path = Path::of(&gate);
    if path == Path::Cuda {
        let (dgate, dup, act) = ops::swiglu::backward(dact.into_cuda(), gate.into_cuda(), up.into_cuda());
        return (dgate.into(), dup.into(), act.into());
    }
    let act = forward(&gate, &up, 0);
    let (dact, gate, up) = (dact.burn(), gate.into_burn(), up.into_burn());
    let (dgate, dup) = match path {
        Path::Cpu => cpu::swiglu::backward(dact, gate, up),
        _ => portable::swiglu::backward(dact, gate, up),
    };
    (dgate.into(), dup.into(), act)
}
