//! AdamW over flat buffers (Loshchilov & Hutter, arXiv:1711.05101), with PyTorch's order of operations:
//! p ← p·(1 − lr·wd); m ← β₁m + (1 − β₁)g; v ← β₂v + (1 − β₂)g²;
//! p ← p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps), g scaled by the clipping factor first.
//!
//! # Dtypes
//! Parameters, gradients and both moments in `f32`; the bias corrections in `f64`.

use burn::tensor::Tensor as BurnTensor;

use crate::cuda::ops;
use crate::{Device, Grads, Params, Path, Tensor, cpu, params, portable};

/// First and second moments of every parameter.
#[derive(Debug)]
pub struct State {
    m: Tensor<1>,
    v: Tensor<1>,
}

impl State {
    /// Zero moments for `numel` parameters.
    pub fn new(numel: usize, device: &Device) -> Self {
        let zeros = || params::zeros(numel, device, "optimizer state");
        Self { m: zeros(), v: zeros() }
    }

    /// Both moments in Burn's tensors.
    fn burn(&mut self) -> Moments<'_> {
        match (&mut self.m, &mut self.v) {
            (Tensor::Burn(m), Tensor::Burn(v)) => Moments { m, v },
            _ => panic!("the operands of one operation lie on one device"),
        }
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

/// [`State`] in Burn's tensors.
pub(crate) struct Moments<'a> {
    pub(crate) m: &'a mut BurnTensor<1>,
    pub(crate) v: &'a mut BurnTensor<1>,
}

/// The global norm of the gradients of a step, before they were clipped.
#[derive(Debug)]
pub struct Norm(Where);

#[derive(Debug)]
enum Where {
    Host(f64),
    Cuda(ops::adamw::Clip),
}

impl Norm {
    /// Its value. Waits for the device; after an error of the device it is NaN.
    pub fn value(&self) -> f64 {
        match &self.0 {
            Where::Host(norm) => *norm,
            Where::Cuda(clip) => clip.read().map_or(f64::NAN, |norm| norm.norm.into()),
        }
    }
}

/// Clips the gradients by their global norm and changes the parameters and moments by one step:
/// g ← g · grad_scale · min(1, `max_grad_norm` / (norm + 1e-6)), as PyTorch clips; 0 for no clipping.
///
/// When the norm is not finite nothing changes. On CUDA the host does not wait for the norm.
pub fn clipped_step(params: &mut Params, grads: &Grads, state: &mut State, step: &Step, max_grad_norm: f64) -> Norm {
    let Tensor::Cuda(g) = grads.flat() else {
        let norm = grads.norm() * step.grad_scale;
        if norm.is_finite() {
            let clip = if max_grad_norm > 0.0 { (max_grad_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
            self::step(params, grads, state, &Step { grad_scale: step.grad_scale * clip, ..*step });
        }
        return Norm(Where::Host(norm));
    };
    let clip = ops::adamw::norm(g, max_grad_norm as f32, step.grad_scale as f32);
    cuda_step(params, grads, state, step, &clip);
    Norm(Where::Cuda(clip))
}

/// Changes the parameters and moments by one step.
pub fn step(params: &mut Params, grads: &Grads, state: &mut State, step: &Step) {
    if let Tensor::Cuda(g) = grads.flat() {
        let clip = ops::adamw::norm(g, 0.0, step.grad_scale as f32);
        return cuda_step(params, grads, state, step, &clip);
    }
    for (range, decays) in params.decay_ranges() {
        let step = if decays { *step } else { Step { weight_decay: 0.0, ..*step } };
        match Path::of(grads.flat()) {
            Path::Cpu => cpu::adamw::step(params.flat_mut(), grads.flat().burn(), state.burn(), &step, range),
            _ => portable::adamw::step(params.flat_mut(), grads.flat().burn(), state.burn(), &step, range),
        }
    }
}

fn cuda_step(params: &mut Params, grads: &Grads, state: &State, step: &Step, clip: &ops::adamw::Clip) {
    for (range, decays) in params.decay_ranges() {
        let step = if decays { *step } else { Step { weight_decay: 0.0, ..*step } };
        let part = |flat: &Tensor<1>| flat.cuda().part(range.start, [1, range.len()]);
        let [p, g, m, v] = [params.flat(), grads.flat(), &state.m, &state.v].map(part);
        ops::adamw::step(&p, &g, &m, &v, &step.into(), clip);
    }
    params.refresh();
}

impl From<Step> for ops::adamw::Step {
    fn from(step: Step) -> Self {
        let (step_size, root_correction) = step.corrections();
        Self {
            keep: (1.0 - step.lr * step.weight_decay) as f32,
            step_size: step_size as f32,
            root_correction: root_correction as f32,
            beta1: [step.beta1 as f32, (1.0 - step.beta1) as f32],
            beta2: [step.beta2 as f32, (1.0 - step.beta2) as f32],
            eps: step.eps as f32,
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
