//! Root-mean-square normalization, alone or together with the residual add before it.
//!
//! y = w ∘ x · rstd, rstd = 1 / √(mean(x²) + eps) per row (Zhang & Sennrich, arXiv:1910.07467).
//! With ĝ = w ∘ dy: dx = rstd · (ĝ − x · rstd² · mean(ĝ ∘ x)), dw = Σ_rows dy ∘ x · rstd.
//!
//! # Shapes
//! x, y `[tokens, hidden]`; weight `[hidden]`; rstd `[tokens]`.
//!
//! # Dtypes
//! Statistics in `f32` whatever the dtype of x; the normalized row is rounded to that dtype before it
//! meets the weight, as transformers' `LlamaRMSNorm` does.
//!
//! # Gradients
//! To x and, on demand, to the weight. Saved: x and rstd; y is cheap to make again.

use crate::cuda::ops;
use crate::{Path, Tensor, cpu, portable};

/// Normalizes each row: `(y, rstd)`; on CUDA y has room for `room` more columns ([`stacked`](crate::stacked)).
pub fn forward(x: &Tensor<2>, weight: &Tensor<1>, eps: f64, room: usize) -> (Tensor<2>, Tensor<1>) {
    match Path::of(x) {
        Path::Cpu => wrap(cpu::rms_norm::forward(x.burn(), weight.burn(), eps as f32)),
        Path::Portable => wrap(portable::rms_norm::forward(x.burn(), weight.burn(), eps)),
        Path::Cuda => wrap(ops::rms_norm::forward(x.cuda(), weight.cuda(), eps as f32, room)),
    }
}

/// Adds `delta` to the residual stream and normalizes the sum: `(x + delta, y, rstd)`; on CUDA y has room for `room`
/// more columns.
pub fn add_forward(
    x: &Tensor<2>,
    delta: Tensor<2>,
    weight: &Tensor<1>,
    eps: f64,
    room: usize,
) -> (Tensor<2>, Tensor<2>, Tensor<1>) {
    if let Tensor::Cuda(x) = x {
        let (sum, y, rstd) = ops::rms_norm::add_forward(x, delta.into_cuda(), weight.cuda(), eps as f32, room);
        return (sum.into(), y.into(), rstd.into());
    }
    let sum = delta.plus(x);
    let (y, rstd) = forward(&sum, weight, eps, room);
    (sum, y, rstd)
}

/// y again, from what [`forward`] saved.
pub fn recompute(x: &Tensor<2>, weight: &Tensor<1>, rstd: &Tensor<1>) -> Tensor<2> {
    match Path::of(x) {
        Path::Cpu => cpu::rms_norm::recompute(x.burn(), weight.burn(), rstd.burn()).into(),
        Path::Portable => portable::rms_norm::recompute(x.burn(), weight.burn(), rstd.burn()).into(),
        Path::Cuda => ops::rms_norm::recompute(x.cuda(), weight.cuda(), rstd.cuda()).into(),
    }
}

/// The gradient to x, plus `residual`, the gradient that reaches x beside the norm, in the memory of that where nothing
/// else holds it; elsewhere, on CUDA, with room for `room` more columns.
pub fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    rstd: &Tensor<1>,
    residual: Option<Tensor<2>>,
    room: usize,
) -> Tensor<2> {
    let path = Path::of(x);
    if path == Path::Cuda {
        let residual = residual.map(Tensor::into_cuda);
        return ops::rms_norm::backward(dy.cuda(), x.cuda(), weight.cuda(), rstd.cuda(), residual, room).into();
    }
    let residual = residual.map(Tensor::into_burn);
    let (dy, x, weight, rstd) = (dy.burn(), x.burn(), weight.burn(), rstd.burn());
    match path {
        Path::Cpu => cpu::rms_norm::backward(dy, x, weight, rstd, residual).into(),
        _ => portable::rms_norm::backward(dy, x, weight, rstd, residual).into(),
    }
}

/// The gradient to the weight, `[hidden]`, in `f32` on CUDA.
pub fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<1> {
    match Path::of(x) {
        Path::Cpu => cpu::rms_norm::weight_grad(dy.burn(), x.burn(), rstd.burn()).into(),
        Path::Portable => portable::rms_norm::weight_grad(dy.burn(), x.burn(), rstd.burn()).into(),
        Path::Cuda => ops::rms_norm::weight_grad(dy.cuda(), x.cuda(), rstd.cuda()).into(),
    }
}

fn wrap<A: Into<Tensor<2>>, B: Into<Tensor<1>>>((y, rstd): (A, B)) -> (Tensor<2>, Tensor<1>) {
    (y.into(), rstd.into())
}
