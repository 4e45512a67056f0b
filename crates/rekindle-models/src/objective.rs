//! Losses as functions of the log-probabilities of a batch's targets.

mod dpo;
mod sft;

use core::fmt::Debug;

use rekindle_kernels::Grads;
use rekindle_kernels::linear_cross_entropy::{LogProbValues, Losses, TokenWeights};

use crate::loss::ApplyGradients;
use crate::{Batch, CausalLm, Error, StepKey};

pub use dpo::Dpo;
pub use sft::Sft;

/// A loss to train with: a function of the log-probabilities of a batch's targets.
///
/// The loss of an optimizer step is the sum over its micro-batches of [`loss`](Self::loss), divided by the sum of
/// [`count`](Self::count). [`Sft`] and [`Dpo`] are examples; the model, the optimizer and the memory plan know nothing else of
/// a loss.
pub trait Objective: Debug + Send + Sync {
    /// Returns the number of things that the loss is a mean over: labels, pairs, sequences.
    fn count(&self, batch: &Batch) -> usize;

    /// Returns the weights w of a loss Σ w_t·nll_t that does not depend on log-probabilities otherwise, `None` for any other
    /// loss. With them, a step computes the logits once instead of twice.
    fn fixed_weights<'a>(&'a self, batch: &'a Batch) -> Option<TokenWeights<'a>> {
        let _ = batch;
        None
    }

    /// Returns true if [`loss`](Self::loss) reads the log-probabilities of a reference model: the base model without the
    /// adapter that is trained.
    fn needs_reference(&self) -> bool {
        false
    }

    /// Returns the summed loss of `batch` and its weights, from the log-probabilities of the model and, where they are
    /// needed, of the reference model.
    fn loss(&self, batch: &Batch, log_probs: &LogProbValues, reference: Option<&LogProbValues>) -> BatchLoss;
}

/// The loss of a batch, before it is divided by the count of the step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchLoss {
    /// The sum.
    pub sum: f64,
    /// w_t = ∂sum/∂nll_t = −∂sum/∂log p_t, `[tokens]`; those of tokens without a target are not read.
    pub weights: Vec<f32>,
    /// Other sums to report, by name.
    pub metrics: Vec<(&'static str, f64)>,
}

/// The loss of a batch whose backward is queued. On CUDA it may still be on its way.
#[derive(Debug)]
pub struct PendingLoss(Pending);

#[derive(Debug)]
enum Pending {
    Uniform(Losses, f32),
    Weighted(Losses, Vec<f32>),
    Known(BatchLoss),
}

impl PendingLoss {
    fn of(losses: Losses, weights: TokenWeights<'_>) -> Self {
        Self(match weights {
            TokenWeights::Uniform(weight) => Pending::Uniform(losses, weight),
            TokenWeights::PerToken { .. } => {
                let weights = (0..losses.tokens()).map(|token| weights.of(token)).collect();
                Pending::Weighted(losses, weights)
            }
        })
    }

    /// Returns the summed loss and the other sums to report. Waits for the device.
    pub fn wait(self) -> (f64, Vec<(&'static str, f64)>) {
        match self.0 {
            Pending::Uniform(losses, weight) => (f64::from(weight) * losses.sum(), Vec::new()),
            Pending::Weighted(losses, weights) => {
                let losses = losses.values();
                (losses.iter().zip(&weights).map(|(&nll, &w)| f64::from(w) * f64::from(nll)).sum(), Vec::new())
            }
            Pending::Known(loss) => (loss.sum, loss.metrics),
        }
    }
}

impl CausalLm {
    /// Adds the gradients of `scale` · loss of `batch` to `grads`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Argument`] for an objective with a reference model where the base model
    /// is not available.
    pub fn objective_backward(
        &self,
        objective: &dyn Objective,
        batch: &Batch,
        scale: f32,
        grads: &mut Grads,
        key: Option<StepKey>,
    ) -> Result<PendingLoss, Error> {
        if let Some(weights) = objective.fixed_weights(batch) {
            let losses = self.forward_backward(batch, weights.times(scale), grads, key)?;
            return Ok(PendingLoss::of(losses, weights));
        }
        let reference = self.reference(objective, batch)?;
        let pass = self.forward(batch, key)?;
        let log_probs = self.log_probs_of(&pass);
        let loss = objective.loss(batch, &log_probs.values(), reference.as_ref());
        self.backward(pass, &log_probs, TokenWeights::from(&*loss.weights).times(scale), grads)?;
        Ok(PendingLoss(Pending::Known(loss)))
    }

    /// [`objective_backward`](Self::objective_backward) that applies gradients layer by layer, as
    /// [`forward_backward_applying`](Self::forward_backward_applying) does.
    ///
    /// # Errors
    /// As [`objective_backward`](Self::objective_backward).
    pub fn objective_backward_applying(
        &mut self,
        objective: &dyn Objective,
        batch: &Batch,
        scale: f32,
        key: Option<StepKey>,
        apply: ApplyGradients<'_>,
    ) -> Result<PendingLoss, Error> {
        if let Some(weights) = objective.fixed_weights(batch) {
            let losses = self.forward_backward_applying(batch, weights.times(scale), key, apply)?;
            return Ok(PendingLoss::of(losses, weights));
        }
        let reference = self.reference(objective, batch)?;
        let pass = self.forward(batch, key)?;
        let log_probs = self.log_probs_of(&pass);
        let loss = objective.loss(batch, &log_probs.values(), reference.as_ref());
        self.backward_applying(pass, &log_probs, TokenWeights::from(&*loss.weights).times(scale), apply)?;
        Ok(PendingLoss(Pending::Known(loss)))
    }

    /// The log-probabilities of the reference model, if the objective needs them.
    fn reference(&self, objective: &dyn Objective, batch: &Batch) -> Result<Option<LogProbValues>, Error> {
        if !objective.needs_reference() {
            return Ok(None);
        }
        if self.lora().is_none() {
            return Err(Error::Argument(format!(
                "{objective:?} needs a reference model, the base without its adapter, but this model has no adapter; \
                 train an adapter instead of all weights"
            )));
        }
        Ok(Some(self.base_log_probs(batch)?.values()))
    }
}
