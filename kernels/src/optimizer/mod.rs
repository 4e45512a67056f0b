//! Optimizers over flat buffers: one step changes values in place, from their gradients and a state.
//!
//! An [`UpdateRule`] is the formula, a [`StateFormat`] the storage of the state, and [`OptimizerState`] holds the state of every
//! parameter. [`OptimizerState::apply`] takes any `f32` values of some parameters, not only those in [`Params`], so that
//! quantized weights can be decoded, updated and written back one after another.
//!
//! g is scaled by the factor of [`Clip`] first; wd is 0 for parameters that take no part in weight decay. In `f32`:
//!
//! - [`UpdateRule::AdamW`] (Loshchilov & Hutter, arXiv:1711.05101), with PyTorch's order of operations:
//!   p ← p·(1 − lr·wd); m ← β₁m + (1 − β₁)g; v ← β₂v + (1 − β₂)g²;
//!   p ← p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + eps)
//! - [`UpdateRule::Lion`] (Chen et al., arXiv:2302.06675):
//!   p ← p·(1 − lr·wd) − lr·sign(β₁m + (1 − β₁)g); m ← β₂m + (1 − β₂)g
//! - [`UpdateRule::Sgd`], as PyTorch's with decay in the gradient: g ← g + wd·p; m ← momentum·m + g; p ← p − lr·m
//!
//! Where the state has 8 bits, sums of products are fused, and AdamW's order is that of bitsandbytes, whose decay comes
//! last: the head of `blockwise.rs` has the formulas.
//!
//! # Dtypes
//! Parameters and gradients in `f32`, the state as its format says; the bias corrections in `f64`.

pub(crate) mod blockwise;
mod clip;
mod cpu;
mod cuda;
pub(crate) mod dynamic_map;
mod portable;
mod saved;
mod state;

pub use blockwise::maps;
pub use clip::Clip;
pub use saved::{StateError, StateTensor};
pub(crate) use state::StepCoefficients;
pub use state::{OptimizerState, StateBytes};

use core::ops::Range;

use crate::{Grads, Group, Params};

/// The update rule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum UpdateRule {
    /// Adam with decoupled weight decay.
    AdamW {
        /// Decay of the first moment.
        beta1: f64,
        /// Decay of the second moment.
        beta2: f64,
        /// Added to the root of the second moment.
        eps: f64,
    },
    /// The sign of a momentum, with decoupled weight decay.
    Lion {
        /// Weight of the momentum against the gradient in a step.
        beta1: f64,
        /// Decay of the momentum.
        beta2: f64,
    },
    /// Gradient descent.
    Sgd {
        /// Decay of the momentum; 0 for none, which then takes no memory.
        momentum: f64,
    },
}

/// The format of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StateFormat {
    /// State in `f32`.
    F32,
    /// 8-bit blocks of 256 elements with an `f32` scale, as in bitsandbytes. Parameters with fewer than 4,096 elements have
    /// state in `f32`. If parameters are neither on the CPU nor on CUDA, the blocks are on the host, and each step copies
    /// the values there and back.
    Blockwise8,
    /// The blocks of [`Blockwise8`](Self::Blockwise8) in page-locked host memory, which CUDA kernels read and write over
    /// the bus.
    Host8,
}

/// Learning rates, by group of parameters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LearningRates {
    /// Rate of [`Group::Default`].
    pub default: f64,
    /// Rate of [`Group::Embedding`].
    pub embedding: f64,
}

impl LearningRates {
    /// Returns the rate of a group.
    pub fn of(self, group: Group) -> f64 {
        match group {
            Group::Default => self.default,
            Group::Embedding => self.embedding,
        }
    }
}

impl From<f64> for LearningRates {
    /// One for all.
    fn from(rate: f64) -> Self {
        Self { default: rate, embedding: rate }
    }
}

/// One step's numbers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct UpdateStep {
    /// The number of this step, from 1 on.
    pub t: u64,
    /// Learning rates.
    pub rates: LearningRates,
    /// Weight decay, for the parameters that take part in it.
    pub weight_decay: f64,
}

impl UpdateStep {
    /// Learning rate and weight decay of some parameters.
    fn of(&self, decays: bool, group: Group) -> (f64, f64) {
        (self.rates.of(group), if decays { self.weight_decay } else { 0.0 })
    }
}

/// Clips the gradients by their global norm and changes all parameters by one step.
///
/// When the norm is not finite nothing changes. On CUDA the host does not wait for the norm.
pub fn clipped_step(
    params: &mut Params,
    grads: &Grads,
    state: &mut OptimizerState,
    step: &UpdateStep,
    max_grad_norm: f64,
) -> Clip {
    let clip = Clip::of(grads, 1.0, max_grad_norm);
    apply(params, grads, state, step, &clip);
    clip
}

/// Changes all parameters by one step.
pub fn apply(params: &mut Params, grads: &Grads, state: &mut OptimizerState, step: &UpdateStep, clip: &Clip) {
    apply_range(params, 0..params.numel(), grads, state, step, clip);
}

/// Clips the gradients of some parameters by their own norm and changes these parameters by one step. Their gradients lie
/// in one buffer, as [`Grads::ranges`] says.
///
/// When the norm is not finite nothing changes. On CUDA the host does not wait for the norm.
pub fn clipped_range_step(
    params: &mut Params,
    range: Range<usize>,
    grads: &Grads,
    state: &mut OptimizerState,
    step: &UpdateStep,
    max_grad_norm: f64,
) -> Clip {
    let clip = Clip::of_values(&grads.of(range.clone()), 1.0, max_grad_norm);
    apply_range(params, range, grads, state, step, &clip);
    clip
}

/// Changes the parameters of a shard by one step, and not the copies of their values: `state` is one of the shard
/// ([`OptimizerState::of_shard`]), `grads` has the sums of its gradients.
pub fn apply_shard(params: &mut Params, grads: &Grads, state: &mut OptimizerState, step: &UpdateStep, clip: &Clip) {
    params.change_values(state.shard(), step.t as u32, |piece, values| {
        state.apply(piece.clone(), values, &grads.of(piece), step, clip);
    });
}

fn apply_range(
    params: &mut Params,
    range: Range<usize>,
    grads: &Grads,
    state: &mut OptimizerState,
    step: &UpdateStep,
    clip: &Clip,
) {
    params.change(range, step.t as u32, |piece, values| {
        state.apply(piece.clone(), values, &grads.of(piece), step, clip);
    });
}
