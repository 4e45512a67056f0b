//! DoRA as a layer (Liu et al., arXiv:2402.09353): the rows of W + s·B·A are brought to trained lengths m.
//!
//! With g = m / ‖W + s·B·A‖ (one number for each row, the norm a constant to the gradient, as in PEFT):
//! y = g ∘ z + (x − x̃)·Wᵀ + b, z = x̃·Wᵀ + s·(x̃·Aᵀ)·Bᵀ, where x̃ = dropout(x); the second term is PEFT's, which drops
//! nothing on the base model's own way.
//!
//! # Gradients
//! dm = Σ_rows dy ∘ z / ‖W + s·B·A‖; to z: g ∘ dy. Saved: z, `[tokens, out]`.
//!
//! The norms come from parts ([`dora_norm`]), so that W + s·B·A is never formed.

use std::sync::Arc;

use rekindle_kernels::{Device, Grads, ParamRef, Params, Tensor, Weight, from_f32, to_f32};

use crate::Factors;
use crate::dora::dora_norm;

/// The magnitude of one linear.
#[derive(Clone, Debug)]
pub(crate) struct Magnitude {
    pub(crate) at: ParamRef,
    /// ‖w‖² of every row of W.
    row_norms: Arc<Vec<f32>>,
}

/// What the factor g is made of, `[out]` each.
pub(crate) struct Gain {
    gain: Tensor<1>,
    reciprocal: Tensor<1>,
}

/// What the backward needs.
#[derive(Clone, Debug)]
pub(crate) struct MagnitudeSaved {
    z: Tensor<2>,
    gain: Tensor<1>,
    /// 1 / ‖W + s·B·A‖.
    reciprocal: Tensor<1>,
}

impl Magnitude {
    pub(crate) fn new(at: ParamRef, weight: &Weight) -> Self {
        Self { at, row_norms: Arc::new(weight.row_norms_squared()) }
    }

    /// g for the factors as they are now.
    pub(crate) fn gain(&self, params: &Params, weight: &Weight, a: ParamRef, b: ParamRef, scale: f32) -> Gain {
        let matrix = params.matrix(a);
        let device = matrix.device();
        let (r, out) = (a.dims()[0], weight.dims()[0]);
        let aw = to_f32(weight.nt(params, &matrix, None)); // [r, out]
        let wa: Vec<f32> = (0..out * r).map(|i| aw[i % r * out + i / r]).collect(); // [out, r]
        let factors = Factors { r, a: params.values(a), b: params.values(b), magnitude: None };
        let norms = dora_norm(&self.row_norms, &wa, &factors, f64::from(scale));
        let magnitude = params.values(self.at);
        // A row without length has no direction: it stays zero, as in a merge.
        let reciprocal: Vec<f32> = norms.iter().map(|&norm| if norm > 0.0 { norm.recip() } else { 0.0 }).collect();
        let gain = magnitude.iter().zip(&reciprocal).map(|(m, reciprocal)| m * reciprocal).collect();
        Gain { gain: vector(gain, &device, params), reciprocal: vector(reciprocal, &device, params) }
    }
}

/// y without its bias from z and, where there is dropout, from (x − x̃)·Wᵀ.
pub(crate) fn forward(z: Tensor<2>, beside: Option<Tensor<2>>, gain: Gain) -> (Tensor<2>, MagnitudeSaved) {
    let Gain { gain, reciprocal } = gain;
    let mut y = z.clone().scale_columns(&gain);
    if let Some(beside) = beside {
        y = y.plus(&beside);
    }
    (y, MagnitudeSaved { z, gain, reciprocal })
}

impl MagnitudeSaved {
    /// The gradient to z; adds that of the magnitude.
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
