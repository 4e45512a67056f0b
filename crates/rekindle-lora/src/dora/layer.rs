//! The DoRA layer (Liu et al., arXiv:2402.09353): the rows of W + s·B·A are scaled to trained magnitudes m.
//!
//! With g = m / ‖W + s·B·A‖ (one number per row; the gradient treats the norm as a constant, as in PEFT):
//! y = g ∘ z + (x − x̃)·Wᵀ + b, z = x̃·Wᵀ + s·(x̃·Aᵀ)·Bᵀ, where x̃ = dropout(x). The second term is PEFT's: the base path
//! has no dropout.
//!
//! # Gradients
//! dm = Σ_rows dy ∘ z / ‖W + s·B·A‖; dz = g ∘ dy. Saved: z, `[tokens, out]`.
//!
//! [`dora_norm`] computes the norms without forming W + s·B·A. On CUDA, `rekindle_kernels::stacked` has this layer for all
//! linears of a group.

use std::sync::{Arc, OnceLock};

use rekindle_kernels::{Device, Grads, ParamRef, Params, Tensor, Weight, from_f32, to_f32};

use super::norm::dora_norm;
use crate::LoraFactors;

/// The magnitude of one linear.
#[derive(Clone, Debug)]
pub(crate) struct Magnitude {
    pub(crate) at: ParamRef,
    /// ‖w‖² of every row of W, once it was needed.
    row_norms: Arc<OnceLock<Vec<f32>>>,
}

/// The factor g and the reciprocal norm, `[out]` each.
pub(crate) struct Gain {
    gain: Tensor<1>,
    reciprocal: Tensor<1>,
}

/// The state that the backward pass needs.
#[derive(Clone, Debug)]
pub(crate) struct MagnitudeSaved {
    z: Tensor<2>,
    gain: Tensor<1>,
    /// 1 / ‖W + s·B·A‖.
    reciprocal: Tensor<1>,
}

impl Magnitude {
    pub(crate) fn new(at: ParamRef) -> Self {
        Self { at, row_norms: Arc::default() }
    }

    /// Returns g for the current factors.
    pub(crate) fn gain(&self, params: &Params, weight: &Weight, a: ParamRef, b: ParamRef, scale: f32) -> Gain {
        let matrix = params.matrix(a);
        let device = matrix.device();
        let (r, out) = (a.dims()[0], weight.dims()[0]);
        let aw = to_f32(weight.nt(params, &matrix, None)); // [r, out]
        let wa: Vec<f32> = (0..out * r).map(|i| aw[i % r * out + i / r]).collect(); // [out, r]
        let factors = LoraFactors { r, a: params.values(a), b: params.values(b), magnitude: None };
        let row_norms = self.row_norms.get_or_init(|| weight.row_norms_squared());
        let norms = dora_norm(row_norms, &wa, &factors, f64::from(scale));
        let magnitude = params.values(self.at);
        // A row of norm zero has no direction. It stays zero, as in a merge.
        let reciprocal: Vec<f32> = norms.iter().map(|&norm| if norm > 0.0 { norm.recip() } else { 0.0 }).collect();
        let gain = magnitude.iter().zip(&reciprocal).map(|(m, reciprocal)| m * reciprocal).collect();
        Gain { gain: vector(gain, &device, params), reciprocal: vector(reciprocal, &device, params) }
    }
}

/// Returns y without its bias from z and, with dropout, from (x − x̃)·Wᵀ.
pub(crate) fn forward(z: Tensor<2>, beside: Option<Tensor<2>>, gain: Gain) -> (Tensor<2>, MagnitudeSaved) {
    let Gain { gain, reciprocal } = gain;
    let mut y = z.clone().scale_columns(&gain);
    if let Some(beside) = beside {
        y = y.plus(&beside);
    }
    (y, MagnitudeSaved { z, gain, reciprocal })
}

impl MagnitudeSaved {
    /// Returns the gradient of z, and adds that of the magnitude to `grads`.
    pub(crate) fn backward(&self, dy: &Tensor<2>, grads: &mut Grads, magnitude: ParamRef) -> Tensor<2> {
        let by_row = dy.clone().times(&self.z).scale_columns(&self.reciprocal);
        grads.add_row_sum(magnitude, &by_row);
        dy.clone().scale_columns(&self.gain)
    }
}

fn vector(values: Vec<f32>, device: &Device, params: &Params) -> Tensor<1> {
    let shape = [values.len()];
    from_f32(values, shape, device, params.dtype())
}
