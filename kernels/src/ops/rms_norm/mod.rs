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

mod cpu;
mod cuda;
mod meta;
mod portable;

use crate::tensor::pair;
use crate::{Backend, Tensor};

/// Normalizes each row and returns `(y, rstd)`; on CUDA y has `pad_cols` spare columns behind each row
/// ([`stacked`](crate::ops::stacked)).
pub fn forward(x: &Tensor<2>, weight: &Tensor<1>, eps: f64, pad_cols: usize) -> (Tensor<2>, Tensor<1>) {
    match Backend::of(x) {
        Backend::Cpu => pair(cpu::forward(x.burn(), weight.burn(), eps as f32)),
        Backend::Portable => pair(portable::forward(x.burn(), weight.burn(), eps)),
        Backend::Cuda => pair(cuda::forward(x.cuda(), weight.cuda(), eps as f32, pad_cols)),
        Backend::Meta => pair(meta::forward(x.meta(), weight.meta())),
    }
}

/// Adds `delta` to the residual stream, normalizes the sum and returns `(x + delta, y, rstd)`; on CUDA y has `pad_cols`
/// spare columns behind each row.
pub fn add_forward(
    x: &Tensor<2>,
    delta: Tensor<2>,
    weight: &Tensor<1>,
    eps: f64,
    pad_cols: usize,
) -> (Tensor<2>, Tensor<2>, Tensor<1>) {
    match Backend::of(x) {
        Backend::Cpu | Backend::Portable | Backend::Meta => {
            let sum = delta.plus(x);
            let (y, rstd) = forward(&sum, weight, eps, pad_cols);
            (sum, y, rstd)
        }
        Backend::Cuda => {
            let (sum, y, rstd) = cuda::add_forward(x.cuda(), delta.into_cuda(), weight.cuda(), eps as f32, pad_cols);
            (sum.into(), y.into(), rstd.into())
        }
    }
}

/// Recomputes y from what [`forward`] saved.
pub fn recompute(x: &Tensor<2>, weight: &Tensor<1>, rstd: &Tensor<1>) -> Tensor<2> {
    match Backend::of(x) {
        Backend::Cpu => cpu::recompute(x.burn(), weight.burn(), rstd.burn()).into(),
        Backend::Portable => portable::recompute(x.burn(), weight.burn(), rstd.burn()).into(),
        Backend::Cuda => cuda::recompute(x.cuda(), weight.cuda(), rstd.cuda()).into(),
        Backend::Meta => meta::recompute(x.meta(), weight.meta(), rstd.meta()).into(),
    }
}

/// Returns the gradient to x plus `residual`, the gradient that reaches x past the norm. The result overwrites `residual`
/// if nothing else refers to it; a new matrix on CUDA has `pad_cols` spare columns behind each row.
pub fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    rstd: &Tensor<1>,
    residual: Option<Tensor<2>>,
    pad_cols: usize,
) -> Tensor<2> {
    match Backend::of(x) {
        Backend::Cpu => {
            let residual = residual.map(Tensor::into_burn);
            cpu::backward(dy.burn(), x.burn(), weight.burn(), rstd.burn(), residual).into()
        }
        Backend::Portable => {
            let residual = residual.map(Tensor::into_burn);
            portable::backward(dy.burn(), x.burn(), weight.burn(), rstd.burn(), residual).into()
        }
        Backend::Cuda => {
            let residual = residual.map(Tensor::into_cuda);
            cuda::backward(dy.cuda(), x.cuda(), weight.cuda(), rstd.cuda(), residual, pad_cols).into()
        }
        Backend::Meta => {
            let residual = residual.map(Tensor::into_meta);
            meta::backward(dy.meta(), x.meta(), weight.meta(), rstd.meta(), residual).into()
        }
    }
}

/// Returns the gradient to the weight, `[hidden]`, in `f32` on CUDA.
pub fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<1> {
    match Backend::of(x) {
        Backend::Cpu => cpu::weight_grad(dy.burn(), x.burn(), rstd.burn()).into(),
        Backend::Portable => portable::weight_grad(dy.burn(), x.burn(), rstd.burn()).into(),
        Backend::Cuda => cuda::weight_grad(dy.cuda(), x.cuda(), rstd.cuda()).into(),
        Backend::Meta => meta::weight_grad(dy.meta(), x.meta(), rstd.meta()).into(),
    }
}
