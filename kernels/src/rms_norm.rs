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

use burn::tensor::Tensor;

use crate::{Path, cpu, portable};

/// Normalizes each row: `(y, rstd)`.
pub fn forward(x: &Tensor<2>, weight: &Tensor<1>, eps: f64) -> (Tensor<2>, Tensor<1>) {
    match Path::of(x) {
        Path::Cpu => cpu::rms_norm::forward(x, weight, eps as f32),
        Path::Portable => portable::rms_norm::forward(x, weight, eps),
    }
}

/// Adds `delta` to the residual stream and normalizes the sum: `(x + delta, y, rstd)`.
pub fn add_forward(x: &Tensor<2>, delta: Tensor<2>, weight: &Tensor<1>, eps: f64) -> (Tensor<2>, Tensor<2>, Tensor<1>) {
    let sum = delta + x.clone();
    let (y, rstd) = forward(&sum, weight, eps);
    (sum, y, rstd)
}

/// y again, from what [`forward`] saved.
pub fn recompute(x: &Tensor<2>, weight: &Tensor<1>, rstd: &Tensor<1>) -> Tensor<2> {
    match Path::of(x) {
        Path::Cpu => cpu::rms_norm::recompute(x, weight, rstd),
        Path::Portable => portable::rms_norm::recompute(x, weight, rstd),
    }
}

/// The gradient to x, plus `residual`, the gradient that reaches x beside the norm.
pub fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<1>,
    rstd: &Tensor<1>,
    residual: Option<Tensor<2>>,
) -> Tensor<2> {
    match Path::of(x) {
        Path::Cpu => cpu::rms_norm::backward(dy, x, weight, rstd, residual),
        Path::Portable => portable::rms_norm::backward(dy, x, weight, rstd, residual),
    }
}

/// The gradient to the weight, `[hidden]`.
pub fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<1> {
    match Path::of(x) {
        Path::Cpu => cpu::rms_norm::weight_grad(dy, x, rstd),
        Path::Portable => portable::rms_norm::weight_grad(dy, x, rstd),
    }
}
