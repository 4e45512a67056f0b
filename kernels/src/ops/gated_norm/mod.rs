//! RMSNorm of every head with a SiLU gate, on the result of a gated delta layer.
//!
//! With n = x · rstd, rstd = 1 / √(mean(x²) + eps) over a head: y = w ∘ n ∘ silu(z) (transformers' `Qwen3NextRMSNormGated`).
//! With h = dy ∘ silu(z) and ĝ = w ∘ h: dx = rstd · (ĝ − n · mean(ĝ ∘ n)), dz = dy ∘ w ∘ n ∘ silu'(z), dw = Σ h ∘ n.
//!
//! # Shapes
//! x, z, y `[tokens, heads · width]`; w `[width]`.
//!
//! # Dtypes
//! Statistics and the gate in `f32`; n and w ∘ n are rounded to the dtype of x.
//!
//! # Gradients
//! To x, z and, on demand, w. Saved: x and z.

mod cpu;
mod cuda;
mod meta;
mod portable;

use crate::tensor::pair;
use crate::{Backend, Device, Tensor};

/// Returns whether `device` computes heads of this width: on CUDA, a multiple of 8 up to 128.
pub fn supports(width: usize, device: &Device) -> bool {
    match device {
        Device::Burn(_) | Device::Meta(_) => true,
        Device::Cuda(_) => width.is_multiple_of(8) && width <= cuda::MAX_WIDTH,
    }
}

/// Returns y; on CUDA with `pad_cols` spare columns behind each row ([`stacked`](crate::ops::stacked)).
pub fn forward(x: &Tensor<2>, z: &Tensor<2>, weight: &Tensor<1>, eps: f64, pad_cols: usize) -> Tensor<2> {
    check(x, z, weight);
    match Backend::of(x) {
        Backend::Cpu => cpu::forward(x.burn(), z.burn(), weight.burn(), eps as f32).into(),
        Backend::Portable => portable::forward(x.burn(), z.burn(), weight.burn(), eps).into(),
        Backend::Cuda => cuda::forward(x.cuda(), z.cuda(), weight.cuda(), eps as f32, pad_cols).into(),
        Backend::Meta => meta::forward(x.meta(), z.meta(), weight.meta()).into(),
    }
}

/// Returns `(dx, dz)`.
pub fn backward(dy: &Tensor<2>, x: &Tensor<2>, z: &Tensor<2>, weight: &Tensor<1>, eps: f64) -> (Tensor<2>, Tensor<2>) {
    check(x, z, weight);
    match Backend::of(x) {
        Backend::Cpu => pair(cpu::backward(dy.burn(), x.burn(), z.burn(), weight.burn(), eps as f32)),
        Backend::Portable => pair(portable::backward(dy.burn(), x.burn(), z.burn(), weight.burn(), eps)),
        Backend::Cuda => pair(cuda::backward(dy.cuda(), x.cuda(), z.cuda(), weight.cuda(), eps as f32)),
        Backend::Meta => pair(meta::backward(dy.meta(), x.meta(), z.meta(), weight.meta())),
    }
}

/// Returns the gradient to w, in `f32` on CUDA.
pub fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, z: &Tensor<2>, weight: &Tensor<1>, eps: f64) -> Tensor<1> {
    check(x, z, weight);
    match Backend::of(x) {
        Backend::Cpu => cpu::weight_grad(dy.burn(), x.burn(), z.burn(), weight.burn(), eps as f32).into(),
        Backend::Portable => portable::weight_grad(dy.burn(), x.burn(), z.burn(), weight.burn(), eps).into(),
        Backend::Cuda => cuda::weight_grad(dy.cuda(), x.cuda(), z.cuda(), weight.cuda(), eps as f32).into(),
        Backend::Meta => meta::weight_grad(dy.meta(), x.meta(), z.meta(), weight.meta()).into(),
    }
}

fn check(x: &Tensor<2>, z: &Tensor<2>, weight: &Tensor<1>) {
    assert_eq!(x.dims(), z.dims(), "shapes of x and its gate");
    assert_eq!(x.dims()[1] % weight.dims()[0], 0, "whole heads of {} channels", weight.dims()[0]);
}
