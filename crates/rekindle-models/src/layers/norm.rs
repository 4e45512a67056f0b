//! RMSNorm and LayerNorm with their weight.

use rekindle_kernels::rms_norm::{self, Gain, GainEps};
use rekindle_kernels::rope::HeadNorm;
use rekindle_kernels::{DType, Device, Grads, Params, Tensor, Weight, center, from_f32};

use super::LayerBuilder;
use crate::Error;
use crate::parameters::LayerRole;
use crate::spec::{NormKind, NormSpec, NormWeight};

/// RMSNorm over the last axis: y = g ∘ x / √(mean(x²) + eps) (Zhang & Sennrich, arXiv:1910.07467), with g = w or 1 + w.
///
/// LayerNorm without a bias (Ba et al., arXiv:1607.06450) is the RMSNorm of x − mean(x), whose mean square is the variance of
/// x. In 16 bits x − mean(x) is rounded between the two.
///
/// # Shapes
/// x, y `[tokens, width]`, w `[width]`, rstd `[tokens]`.
///
/// # Dtypes
/// Statistics in f32; [`NormWeight`] says where y is rounded to the compute dtype.
///
/// # Gradients
/// To x and, where it is trained, to w. Saved: x and rstd; y and x − mean(x) can be recomputed from them.
#[derive(Clone, Debug)]
pub struct RmsNorm {
    /// w, one row.
    pub weight: Weight,
    /// The form of the factor g.
    pub form: NormWeight,
    /// Added to the mean square.
    pub eps: f64,
    /// True for LayerNorm.
    pub centered: bool,
}

/// Returns a norm of heads without a weight: its factor is 1.
pub(crate) fn plain_head_norm(head_dim: usize, eps: f64, device: &Device, dtype: DType) -> HeadNorm {
    let factor = from_f32(vec![1.0; head_dim], [1, head_dim], device, dtype).row_vector();
    HeadNorm { gain: Gain::Plain(factor), eps }
}

impl RmsNorm {
    /// A norm with its weight.
    pub(crate) fn new(weight: Weight, norm: &NormSpec) -> Self {
        Self { weight, form: norm.weight, eps: norm.eps, centered: norm.kind == NormKind::Layer }
    }

    pub(crate) fn build(
        builder: &mut LayerBuilder<'_>,
        role: LayerRole,
        norm: &NormSpec,
        width: usize,
    ) -> Result<Self, Error> {
        Ok(Self::new(builder.weight(role, &[width])?, norm))
    }

    /// Returns the factor g.
    pub fn gain(&self, params: &Params) -> Gain {
        let weight = self.weight.vector(params);
        match self.form {
            NormWeight::Plain => Gain::Plain(weight),
            NormWeight::RoundedAfter => Gain::RoundedAfter(weight),
            NormWeight::OnePlus => Gain::OnePlus(weight),
            NormWeight::None => Gain::None,
        }
    }

    /// Returns `(y, rstd)`; on CUDA y has room for `room` more columns.
    pub fn forward(&self, params: &Params, x: &Tensor<2>, room: usize) -> (Tensor<2>, Tensor<1>) {
        rms_norm::forward(&self.rms_input(x), &self.gain(params), self.eps, room)
    }

    /// x, or x − mean(x) in LayerNorm.
    fn rms_input(&self, x: &Tensor<2>) -> Tensor<2> {
        if self.centered { center::forward(x) } else { x.clone() }
    }

    /// Adds `delta` to x and normalizes the sum: `(x + delta, y, rstd)`.
    pub fn add_forward(
        &self,
        params: &Params,
        x: &Tensor<2>,
        delta: Tensor<2>,
        room: usize,
    ) -> (Tensor<2>, Tensor<2>, Tensor<1>) {
        if self.centered {
            let sum = delta.plus(x);
            let (y, rstd) = self.forward(params, &sum, room);
            return (sum, y, rstd);
        }
        rms_norm::add_forward(x, delta, &self.gain(params), self.eps, room)
    }

    /// Normalizes x and adds the result to `residual`: `(residual + y, rstd)`.
    pub fn forward_add(&self, params: &Params, x: &Tensor<2>, residual: &Tensor<2>) -> (Tensor<2>, Tensor<1>) {
        rms_norm::forward_add(&self.rms_input(x), &self.gain(params), self.eps, residual)
    }

    /// [`forward_add`](Self::forward_add), then `next` of the sum: `(residual + y, rstd, next(residual + y), rstd of next)`.
    pub fn forward_add_forward(
        &self,
        params: &Params,
        x: &Tensor<2>,
        residual: &Tensor<2>,
        next: &Self,
        room: usize,
    ) -> (Tensor<2>, Tensor<1>, Tensor<2>, Tensor<1>) {
        if next.centered {
            let (h, rstd) = self.forward_add(params, x, residual);
            let (y, next_rstd) = next.forward(params, &h, room);
            return (h, rstd, y, next_rstd);
        }
        let (first, second, x) = (self.gain(params), next.gain(params), &self.rms_input(x));
        let first = GainEps { gain: &first, eps: self.eps };
        rms_norm::forward_add_forward(x, first, residual, GainEps { gain: &second, eps: next.eps }, room)
    }

    /// Returns y again, from x and rstd.
    pub fn recompute(&self, params: &Params, x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<2> {
        rms_norm::recompute(&self.rms_input(x), &self.gain(params), rstd)
    }

    /// Adds the gradient of w, if it is trained.
    pub fn backward_weight(&self, grads: &mut Grads, dy: &Tensor<2>, x: &Tensor<2>, rstd: &Tensor<1>) {
        if let Some(at) = self.weight.trained() {
            grads.add(at, rms_norm::weight_grad(dy, &self.rms_input(x), rstd).as_row());
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
        if self.centered {
            let dx = rms_norm::backward(dy, &center::forward(x), &self.gain(params), rstd, None, 0);
            let dx = center::backward(&dx);
            return match residual {
                Some(residual) => residual.plus(&dx),
                None => dx,
            };
        }
        rms_norm::backward(dy, x, &self.gain(params), rstd, residual, room)
    }
}
