//! The gated activation of a feed-forward half, by [`Activation`]:
//!
//! | activation | act | z(g) |
//! |---|---|---|
//! | `Silu` (SwiGLU; Shazeer, arXiv:2002.05202) | g·σ(z(g)) ∘ u | g |
//! | `GeluTanh` (GeGLU with PyTorch's `gelu(approximate="tanh")`) | g·σ(z(g)) ∘ u | 2·√(2/π)·(g + 0.044715·g³) |
//! | `ClampedSwiglu` (gpt-oss) | g·σ(z(g)) ∘ (u + 1), with g at most `limit` and u within ±`limit` | alpha·g |
//!
//! 0.5·(1 + tanh(z/2)) = σ(z), so all three are g·σ(z(g)) with another z. With a = g·σ(z(g)):
//! dup = dact ∘ a; dgate = dact ∘ u ∘ σ(z)·(1 + g·z′·(1 − σ(z))). What is clamped gets no gradient.
//!
//! # Shapes
//! All `[tokens, intermediate]`.
//!
//! # Dtypes
//! Computed in `f32` on the CPU and on CUDA, rounded once.
//!
//! # Gradients
//! Saved: gate and up; the backward recomputes act.

mod cpu;
mod cuda;
mod meta;
mod portable;
#[cfg(feature = "wgpu")]
mod wgpu;

use crate::tensor::{on_wgpu, triple};
use crate::{Backend, Tensor};

/// The nonlinearity on the gate, and its product with up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// silu(gate) ∘ up.
    Silu,
    /// gelu(gate) ∘ up, in the tanh form.
    GeluTanh,
    /// gate·σ(alpha·gate) ∘ (up + 1), both clamped first.
    ClampedSwiglu {
        /// The slope in the sigmoid.
        alpha: f32,
        /// The bound of gate from above, and of up from both sides.
        limit: f32,
    },
}

/// Returns act; on CUDA with `pad_cols` spare columns behind each row ([`stacked`](crate::ops::stacked)).
pub fn forward(activation: Activation, gate: &Tensor<2>, up: &Tensor<2>, pad_cols: usize) -> Tensor<2> {
    on_wgpu!(wgpu::forward(activation, gate, up));
    match Backend::of(gate) {
        Backend::Cpu => cpu::forward(activation, gate.burn(), up.burn()).into(),
        Backend::Portable => portable::forward(activation, gate.burn(), up.burn()).into(),
        Backend::Cuda => cuda::forward(activation, gate.cuda(), up.cuda(), pad_cols).into(),
        Backend::Meta => meta::forward(gate.meta(), up.meta()).into(),
    }
}

/// Returns `(dgate, dup, act)`, written over gate, up and dact if nothing else refers to them.
pub fn backward(
    activation: Activation,
    dact: Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    on_wgpu!(wgpu::backward(activation, &dact, &gate, &up));
    match Backend::of(&gate) {
        Backend::Cpu => {
            let act = cpu::forward(activation, gate.burn(), up.burn());
            let (dgate, dup) = cpu::backward(activation, dact.burn(), gate.into_burn(), up.into_burn());
            triple((dgate, dup, act))
        }
        Backend::Portable => {
            let act = portable::forward(activation, gate.burn(), up.burn());
            let (dgate, dup) = portable::backward(activation, dact.burn(), gate.into_burn(), up.into_burn());
            triple((dgate, dup, act))
        }
        Backend::Cuda => triple(cuda::backward(activation, dact.into_cuda(), gate.into_cuda(), up.into_cuda())),
        Backend::Meta => triple(meta::backward(dact.meta(), gate.into_meta(), up.into_meta())),
    }
}

/// [`forward`] for a linear that multiplies in fp8 ([`fp8`](crate::fp8)): on CUDA the rows of act as codes lie beside them.
pub fn forward_with_codes(activation: Activation, gate: &Tensor<2>, up: &Tensor<2>, pad_cols: usize) -> Tensor<2> {
    match gate {
        Tensor::Cuda(gate) => cuda::forward_with_codes(activation, gate, up.cuda(), pad_cols).into(),
        Tensor::Burn(_) | Tensor::Meta(_) => forward(activation, gate, up, pad_cols),
    }
}

/// 2·√(2/π).
const GELU_SLOPE: f32 = 1.595_769;

/// The factor of g³.
const GELU_CUBE: f32 = 0.044_715;

/// The |g| from which σ(z(g)) of the GELU is 0 or 1 in `f32`; g³ of larger gates could overflow.
const GELU_BOUND: f32 = 16.0;
