//! AdamW over flat buffers (Loshchilov & Hutter, arXiv:1711.05101), with PyTorch's order of operations:
//! p ← p·(1 − lr·wd); m ← β₁m + (1 − β₁)g; v ← β₂v + (1 − β₂)g²;
//! p ← p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps), g scaled by the clipping factor first.
//!
//! # Dtypes
//! Parameters, gradients and both moments in `f32`; the bias corrections in `f64`.

use burn::tensor::{DType, Device, Tensor};

use crate::{Grads, Params, Path, cpu, portable};

/// First and second moments of every parameter.
#[derive(Clone, Debug)]
pub struct State {
    pub(crate) m: Tensor<1>,
    pub(crate) v: Tensor<1>,
}

impl State {
    /// Zero moments for `numel` parameters.
    pub fn new(numel: usize, device: &Device) -> Self {
        let zeros = Tensor::zeros([numel], (device, DType::F32));
        Self { m: zeros.clone(), v: zeros }
    }
}

/// One step's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Step {
    /// The number of this step, from 1 on.
    pub t: u64,
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay, for the parameters that take part in it.
    pub weight_decay: f64,
    /// What gradients are multiplied with first: 1, or less when they are clipped.
    pub grad_scale: f64,
}

/// Changes the parameters and moments by one step.
pub fn step(params: &mut Params, grads: &Grads, state: &mut State, step: &Step) {
    for (range, decays) in params.decay_ranges() {
        let step = if decays { *step } else { Step { weight_decay: 0.0, ..*step } };
        match Path::of(grads.flat()) {
            Path::Cpu => cpu::adamw::step(params.flat_mut(), grads.flat(), state, &step, range),
            Path::Portable => portable::adamw::step(params.flat_mut(), grads.flat(), state, &step, range),
        }
    }
}

impl Step {
    /// `(lr / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ))`.
    pub(crate) fn corrections(&self) -> (f64, f64) {
        let correct = |beta: f64| 1.0 - beta.powf(self.t as f64);
        (self.lr / correct(self.beta1), correct(self.beta2).sqrt().recip())
    }
}
