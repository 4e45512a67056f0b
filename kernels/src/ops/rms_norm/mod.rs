//! Root-mean-square normalization, alone or together with the residual addition before or after it.
//!
//! y = g ∘ x · rstd, rstd = 1 / √(mean(x²) + eps) per row (Zhang & Sennrich, arXiv:1910.07467); [`Gain`] says what g is.
//! With ĝ = g ∘ dy: dx = rstd · (ĝ − x · rstd² · mean(ĝ ∘ x)), dw = Σ_rows dy ∘ x · rstd.
//!
//! # Shapes
//! x, y `[tokens, hidden]`; weight `[hidden]`; rstd `[tokens]`.
//!
//! # Dtypes
//! Statistics in `f32` whatever the dtype of x. With [`Gain::Plain`] the normalized row is rounded to that dtype before it
//! is multiplied with the weight; otherwise y is rounded once.
//!
//! The residual stream may be f32 beside a weight of 16 bits: y has the weight's dtype, rounded once, and a gradient to x
//! the dtype of x. For a norm before the residual addition, x has the weight's dtype, and the sum and dy are f32.
//!
//! # Gradients
//! To x and, on demand, to the weight. Saved: x and rstd; y is cheap to recompute.

mod cpu;
mod cuda;
mod gain;
mod meta;
mod mixed;
mod portable;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;

pub use gain::Gain;
pub(crate) use gain::GainForm;

use burn::tensor::DType;

use crate::tensor::{on_wgpu, pair};
use crate::{Backend, Tensor};

/// The path of an operation on `x` beside a tensor of this dtype: the CPU's loops take f32 alone.
fn backend(x: &Tensor<2>, beside: DType) -> Backend {
    match Backend::of(x) {
        Backend::Cpu if beside != DType::F32 => Backend::Portable,
        backend => backend,
    }
}

/// The dtype of y.
fn result(x: &Tensor<2>, gain: &Gain) -> DType {
    gain.weight().map_or(x.dtype(), Tensor::dtype)
}

/// Normalizes each row and returns `(y, rstd)`; on CUDA y has `pad_cols` spare columns behind each row
/// ([`stacked`](crate::ops::stacked)).
pub fn forward(x: &Tensor<2>, gain: &Gain, eps: f64, pad_cols: usize) -> (Tensor<2>, Tensor<1>) {
    on_wgpu!(wgpu::forward(x, gain, eps));
    let (form, weight, dtype) = (gain.form(), gain.weight(), result(x, gain));
    match backend(x, dtype) {
        Backend::Cpu => pair(cpu::forward(x.burn(), form, weight.map(Tensor::burn), eps as f32)),
        Backend::Portable => pair(portable::forward(x.burn(), form, weight.map(Tensor::burn), eps)),
        Backend::Cuda => pair(cuda::forward(x.cuda(), form, weight.map(Tensor::cuda), eps as f32, pad_cols)),
        Backend::Meta => pair(meta::forward(x.meta(), dtype)),
    }
}

/// Adds `delta` to the residual stream, normalizes the sum and returns `(x + delta, y, rstd)`; on CUDA y has `pad_cols`
/// spare columns behind each row.
pub fn add_forward(
    x: &Tensor<2>,
    delta: Tensor<2>,
    gain: &Gain,
    eps: f64,
    pad_cols: usize,
) -> (Tensor<2>, Tensor<2>, Tensor<1>) {
    on_wgpu!(wgpu::add_forward(x, &delta, gain, eps));
    match backend(x, result(x, gain)) {
        Backend::Cpu | Backend::Portable | Backend::Meta => {
            let sum = delta.plus(x);
            let (y, rstd) = forward(&sum, gain, eps, pad_cols);
            (sum, y, rstd)
        }
        Backend::Cuda => {
            let (delta, weight) = (delta.into_cuda(), gain.weight().map(Tensor::cuda));
            let (sum, y, rstd) = cuda::add_forward(x.cuda(), delta, gain.form(), weight, eps as f32, pad_cols);
            (sum.into(), y.into(), rstd.into())
        }
    }
}

/// Normalizes each row of x, adds the result, rounded, to `residual`, and returns `(residual + y, rstd)`.
pub fn forward_add(x: &Tensor<2>, gain: &Gain, eps: f64, residual: &Tensor<2>) -> (Tensor<2>, Tensor<1>) {
    match Backend::of(x) {
        Backend::Cuda if residual.dtype() == x.dtype() => {
            let weight = gain.weight().map(Tensor::cuda);
            pair(cuda::forward_add(x.cuda(), gain.form(), weight, eps as f32, residual.cuda()))
        }
        Backend::Cpu | Backend::Portable | Backend::Cuda | Backend::Meta => {
            let (y, rstd) = forward(x, gain, eps, 0);
            (y.plus(residual), rstd)
        }
    }
}

/// The gain of a norm, and what is added to the mean square.
#[derive(Clone, Copy, Debug)]
pub struct GainEps<'a> {
    /// g.
    pub gain: &'a Gain,
    /// Added to the mean square.
    pub eps: f64,
}

/// [`forward_add`] with `first`, then [`forward`] of the sum with `second`: `(residual + y₁, rstd₁, y₂, rstd₂)`. On CUDA y₂
/// has `pad_cols` spare columns behind each row, and the two are one launch if both gains have one form.
pub fn forward_add_forward(
    x: &Tensor<2>,
    first: GainEps<'_>,
    residual: &Tensor<2>,
    second: GainEps<'_>,
    pad_cols: usize,
) -> (Tensor<2>, Tensor<1>, Tensor<2>, Tensor<1>) {
    let is_fused = first.gain.form() == second.gain.form() && residual.dtype() == x.dtype();
    if Backend::of(x) == Backend::Cuda && is_fused {
        let weights = [first, second].map(|norm| norm.gain.weight().map(Tensor::cuda));
        let eps = [first, second].map(|norm| norm.eps as f32);
        let results = cuda::forward_add_forward(x.cuda(), first.gain.form(), weights, eps, residual.cuda(), pad_cols);
        let (sum, rstd1, y, rstd2) = results;
        return (sum.into(), rstd1.into(), y.into(), rstd2.into());
    }
    let (sum, rstd1) = forward_add(x, first.gain, first.eps, residual);
    let (y, rstd2) = forward(&sum, second.gain, second.eps, pad_cols);
    (sum, rstd1, y, rstd2)
}

/// Recomputes y from what [`forward`] saved.
pub fn recompute(x: &Tensor<2>, gain: &Gain, rstd: &Tensor<1>) -> Tensor<2> {
    on_wgpu!(wgpu::recompute(x, gain, rstd));
    let (form, weight, dtype) = (gain.form(), gain.weight(), result(x, gain));
    match backend(x, dtype) {
        Backend::Cpu => cpu::recompute(x.burn(), form, weight.map(Tensor::burn), rstd.burn()).into(),
        Backend::Portable => portable::recompute(x.burn(), form, weight.map(Tensor::burn), rstd.burn()).into(),
        Backend::Cuda => cuda::recompute(x.cuda(), form, weight.map(Tensor::cuda), rstd.cuda()).into(),
        Backend::Meta => meta::recompute(x.meta(), rstd.meta(), dtype).into(),
    }
}

/// Returns the gradient to x plus `residual`, the gradient that reaches x past the norm. The result overwrites `residual`
/// if nothing else refers to it; a new matrix on CUDA has `pad_cols` spare columns behind each row.
pub fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    gain: &Gain,
    rstd: &Tensor<1>,
    residual: Option<Tensor<2>>,
    pad_cols: usize,
) -> Tensor<2> {
    on_wgpu!(wgpu::backward(dy, x, gain, rstd, residual.as_ref()));
    let (form, weight) = (gain.form(), gain.weight());
    match backend(x, dy.dtype()) {
        Backend::Cpu => {
            let residual = residual.map(Tensor::into_burn);
            cpu::backward(dy.burn(), x.burn(), form, weight.map(Tensor::burn), rstd.burn(), residual).into()
        }
        Backend::Portable => {
            let residual = residual.map(Tensor::into_burn);
            portable::backward(dy.burn(), x.burn(), form, weight.map(Tensor::burn), rstd.burn(), residual).into()
        }
        Backend::Cuda => {
            let (weight, residual) = (weight.map(Tensor::cuda), residual.map(Tensor::into_cuda));
            cuda::backward(dy.cuda(), x.cuda(), form, weight, rstd.cuda(), residual, pad_cols).into()
        }
        Backend::Meta => {
            let residual = residual.map(Tensor::into_meta);
            meta::backward(dy.meta(), x.meta(), rstd.meta(), residual).into()
        }
    }
}

/// Returns the gradient to the weight, `[hidden]`, in `f32` on CUDA.
pub fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<1> {
    match backend(x, dy.dtype()) {
        Backend::Cpu => cpu::weight_grad(dy.burn(), x.burn(), rstd.burn()).into(),
        Backend::Portable => portable::weight_grad(dy.burn(), x.burn(), rstd.burn()).into(),
        Backend::Cuda => cuda::weight_grad(dy.cuda(), x.cuda(), rstd.cuda()).into(),
        Backend::Meta => meta::weight_grad(dy.meta(), x.meta(), rstd.meta()).into(),
    }
}
