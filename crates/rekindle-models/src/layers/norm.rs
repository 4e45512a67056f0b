//! Root-mean-square normalization with its weight.

use rekindle_kernels::{Grads, Params, Tensor, Weight, rms_norm};

use super::LayerBuilder;
use crate::Error;
use crate::parameters::LayerRole;
use crate::spec::NormSpec;

/// RMSNorm over the last axis: y = w ∘ x / √(mean(x²) + eps) (Zhang & Sennrich, arXiv:1910.07467).
///
/// # Shapes
/// x, y `[tokens, width]`, w `[width]`, rstd `[tokens]`.
///
/// # Dtypes
/// Statistics in f32; the normalized row is rounded to the compute dtype before it meets w.
///
/// # Gradients
/// To x and, where it is trained, to w. Saved: x and rstd; y can be recomputed from them.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// w, one row.
    pub weight: Weight,
    /// Added to the mean square.
    pub eps: f64,
}

impl RmsNorm {
    pub(crate) fn build(
        builder: &mut LayerBuilder<'_>,
        role: LayerRole,
        norm: &NormSpec,
        width: usize,
    ) -> Result<Self, Error> {
        Ok(Self { weight: builder.weight(role, &[width])?, eps: norm.eps })
    }

    /// Returns `(y, rstd)`; on CUDA y has room for `room` more columns.
    pub fn forward(&self, params: &Params, x: &Tensor<2>, room: usize) -> (Tensor<2>, Tensor<1>) {
        rms_norm::forward(x, &self.weight.vector(params), self.eps, room)
    }

    /// Adds `delta` to x and normalizes the sum: `(x + delta, y, rstd)`.
    pub fn add_forward(
        &self,
        params: &Params,
        x: &Tensor<2>,
        delta: Tensor<2>,
        room: usize,
    ) -> (Tensor<2>, Tensor<2>, Tensor<1>) {
        rms_norm::add_forward(x, delta, &self.weight.vector(params), self.eps, room)
    }

    /// Returns y again, from x and rstd.
    pub fn recompute(&self, params: &Params, x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<2> {
        rms_norm::recompute(x, &self.weight.vector(params), rstd)
    }

    /// Adds the gradient of w, if it is trained.
    pub fn backward_weight(&self, grads: &mut Grads, dy: &Tensor<2>, x: &Tensor<2>, rstd: &Tensor<1>) {
        if let Some(at) = self.weight.trained() {
            grads.add(at, rms_norm::weight_grad(dy, x, rstd).as_row());
        }
    }

    /// Returns the gradient to x plus `residual`, the gradient that reaches x beside the norm.
    pub fn backward_input(
        &self,
        params: &Params,
        dy: &Tensor<2>,
        x: &Tensor<2>,
        rstd: &Tensor<1>,
        residual: Option<Tensor<2>>,
        room: usize,
    ) -> Tensor<2> {
        rms_norm::backward(dy, x, &self.weight.vector(params), rstd, residual, room)
    }
}
