//! Losses as functions of the log-probabilities of a batch's targets.

mod answers;
mod cpo;
mod dpo;
mod dual;
mod grpo;
mod kto;
mod names;
mod orpo;
mod policy;
mod reward;
mod rloo;
mod sft;

use core::fmt::Debug;
use std::borrow::Cow;
use std::collections::BTreeMap;

use rekindle_kernels::Grads;
use rekindle_kernels::linear_cross_entropy::{LogProbValues, Losses, TokenLogProbs, TokenWeights};
use serde::{Deserialize, Serialize};

use crate::loss::ApplyGradients;
use crate::{Batch, CausalLm, Error, StepKey};

pub use cpo::{Cpo, CpoLoss};
pub use dpo::{Divergence, Dpo, DpoLoss};
pub use grpo::{Grpo, GrpoLoss, ImportanceSamplingLevel, ImportanceSamplingMode};
pub use kto::{Kto, KtoLoss};
pub use names::OneOrMany;
pub use orpo::Orpo;
pub use reward::{RewardModel, ScoreObjective};
pub use rloo::Rloo;
pub use sft::Sft;

/// A loss to train with: a function of the log-probabilities of a batch's targets.
///
/// The loss of an optimizer step is the sum over its micro-batches of [`loss`](Self::loss), divided by the sum of
/// [`count`](Self::count). How a step is split into micro-batches does not change it: what all of them share is in
/// [`StepTerms`]. [`Sft`] and [`Dpo`] are examples; the model, the optimizer and the memory plan know nothing else of a loss.
pub trait Objective: Debug + Send + Sync {
    /// Returns the number of things that the loss is a mean over: labels, pairs, sequences.
    fn count(&self, batch: &Batch) -> usize;

    /// Returns the weights w of a loss Σ w_t·nll_t that does not depend on log-probabilities otherwise, `None` for any other
    /// loss. With them, a step computes the logits once instead of twice.
    fn fixed_weights<'a>(&'a self, batch: &'a Batch) -> Option<TokenWeights<'a>> {
        let _ = batch;
        None
    }

    /// Returns the loss of the scores of documents, for a model with a score head; `None` for a loss of log-probabilities.
    /// With it, [`loss`](Self::loss) is not called.
    fn of_scores(&self) -> Option<&dyn ScoreObjective> {
        None
    }

    /// Returns true if [`loss`](Self::loss) reads the log-probabilities of a reference model: those in
    /// [`Batch::answers`], or those of the base model without the adapter that is trained.
    fn needs_reference(&self) -> bool {
        false
    }

    /// Returns the number that logits are divided by before log-probabilities, above 0.
    fn temperature(&self) -> f32 {
        1.0
    }

    /// Returns true if [`loss`](Self::loss) reads [`StepTerms::sharpened`], which costs another pass of the head.
    fn needs_sharpened(&self) -> bool {
        false
    }

    /// Returns the log-probability of each document's answer as the loss reads it: what [`Answer::reference`] is for the
    /// reference model.
    ///
    /// [`Answer::reference`]: crate::Answer::reference
    fn answer_log_probs(&self, batch: &Batch, log_probs: &LogProbValues) -> Vec<f64> {
        answers::answers(batch, log_probs, None, None).iter().map(|answer| answer.log_prob).collect()
    }

    /// Returns what the loss of each micro-batch needs to know of the whole step.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    fn step_terms(&self, step: &StepPasses<'_>) -> Result<StepTerms, Error> {
        let _ = step;
        Ok(StepTerms::default())
    }

    /// Returns the summed loss of `batch` and its weights, from the log-probabilities of the model and, where the batch has
    /// none of its own, of the reference model.
    fn loss(
        &self,
        batch: &Batch,
        log_probs: &LogProbValues,
        reference: Option<&LogProbValues>,
        terms: &StepTerms,
    ) -> BatchLoss;
}

/// Values that the micro-batches of a step share, for objectives that are not a sum over documents.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepTerms {
    /// The [`count`](Objective::count) of the step divided by the number of tokens of a mean over tokens.
    pub per_token: f64,
    /// An estimate of KL(π ‖ π_ref).
    pub kl: f64,
    /// The entropy from which on a token has a gradient; `None` for all tokens.
    pub entropy_threshold: Option<f64>,
    /// By the row of a document, the value that it is compared with after sorting.
    pub partners: BTreeMap<u32, f64>,
    /// The log-probability of each target of the batch where the distribution is p² / Σ p² instead of p, `[tokens]`; empty
    /// unless the objective [needs it](Objective::needs_sharpened).
    pub sharpened: Vec<f32>,
}

impl StepTerms {
    /// Returns the terms of a batch, with log-probabilities at half the temperature if the objective needs them.
    fn with_sharpened(
        &self,
        objective: &dyn Objective,
        sharpened: impl FnOnce() -> Result<TokenLogProbs, Error>,
    ) -> Result<Cow<'_, Self>, Error> {
        if !objective.needs_sharpened() {
            return Ok(Cow::Borrowed(self));
        }
        Ok(Cow::Owned(Self { sharpened: sharpened()?.values().log_probs, ..self.clone() }))
    }
}

/// The micro-batches of a step, with forward passes over them.
#[derive(Clone, Copy, Debug)]
pub struct StepPasses<'a> {
    model: &'a CausalLm,
    /// The micro-batches.
    pub batches: &'a [Batch],
    key: Option<StepKey>,
    temperature: f32,
}

impl StepPasses<'_> {
    /// Returns the log-probabilities that the training pass of `batch` will have. Keeps nothing for a backward.
    ///
    /// # Errors
    /// As [`CausalLm::forward`].
    pub fn log_probs(&self, batch: &Batch) -> Result<LogProbValues, Error> {
        match self.key {
            None => Ok(self.model.log_probs_at(batch, self.temperature)?.values()),
            Some(_) => {
                let pass = self.model.forward(batch, self.key)?.at_temperature(self.temperature);
                Ok(self.model.log_probs_of(&pass).values())
            }
        }
    }

    /// Returns the log-probabilities of the reference model, or `None` if the batch has them.
    ///
    /// # Errors
    /// As [`CausalLm::base_log_probs`].
    pub fn reference(&self, objective: &dyn Objective, batch: &Batch) -> Result<Option<LogProbValues>, Error> {
        self.model.reference(objective, batch)
    }
}

/// The loss of a batch, before it is divided by the count of the step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchLoss {
    /// The sum.
    pub sum: f64,
    /// w_t = ∂sum/∂nll_t = −∂sum/∂log p_t, `[tokens]`; those of tokens without a target are not read.
    pub weights: Vec<f32>,
    /// Other means to report.
    pub metrics: Vec<Metric>,
}

/// A number to report, over the micro-batches of a step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Metric {
    /// The name, as TRL reports it.
    pub name: &'static str,
    /// The sum of a mean, or the extreme.
    pub sum: f64,
    /// The number of terms of a mean; 1 for an extreme.
    pub count: usize,
    kind: MetricKind,
}

/// The combination of a metric's values over the micro-batches of a step and over ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MetricKind {
    /// The mean of all terms.
    Mean,
    /// The smallest value.
    Min,
    /// The largest value.
    Max,
}

impl Metric {
    /// Returns a mean of `count` terms.
    pub fn new(name: &'static str, sum: f64, count: usize) -> Self {
        Self { name, sum, count, kind: MetricKind::Mean }
    }

    /// Returns a minimum.
    pub fn min(name: &'static str, value: f64) -> Self {
        Self { name, sum: value, count: 1, kind: MetricKind::Min }
    }

    /// Returns a maximum.
    pub fn max(name: &'static str, value: f64) -> Self {
        Self { name, sum: value, count: 1, kind: MetricKind::Max }
    }

    /// Returns the combination of its values.
    pub fn kind(&self) -> MetricKind {
        self.kind
    }

    /// Returns a metric whose values are combined otherwise.
    #[must_use]
    pub fn combined_as(self, kind: MetricKind) -> Self {
        Self { kind, ..self }
    }

    /// Adds metrics to others, by name.
    pub fn add(all: &mut Vec<Self>, more: impl IntoIterator<Item = Self>) {
        for metric in more {
            match all.iter_mut().find(|known| known.name == metric.name) {
                Some(known) => match metric.kind {
                    MetricKind::Mean => {
                        known.sum += metric.sum;
                        known.count += metric.count;
                    }
                    MetricKind::Min => known.sum = known.sum.min(metric.sum),
                    MetricKind::Max => known.sum = known.sum.max(metric.sum),
                },
                None => all.push(metric),
            }
        }
    }

    /// Returns names and values; a mean without terms has none.
    ///
    /// Where answers are not in pairs, `rewards/margins` is the difference of the mean rewards.
    pub fn means(all: &[Self]) -> Vec<(&'static str, f64)> {
        let counted = all.iter().filter(|metric| metric.count > 0);
        let mut means: Vec<_> = counted.map(|metric| (metric.name, metric.sum / metric.count as f64)).collect();
        let mean = |name: &str| means.iter().find(|(known, _)| *known == name).map(|(_, mean)| *mean);
        let margins = mean("rewards/chosen").zip(mean("rewards/rejected")).map(|(chosen, rejected)| chosen - rejected);
        if let (None, Some(margins)) = (mean("rewards/margins"), margins) {
            means.push(("rewards/margins", margins));
        }
        means
    }
}

/// The loss of a batch whose backward is queued. On CUDA it may still be on its way.
#[derive(Debug)]
pub struct PendingLoss {
    loss: Pending,
    router: Option<Metric>,
}

#[derive(Debug)]
enum Pending {
    Uniform(Losses, f32),
    Weighted(Losses, Vec<f32>),
    Known(BatchLoss),
}

impl PendingLoss {
    pub(crate) fn known(loss: BatchLoss) -> Self {
        Self { loss: Pending::Known(loss), router: None }
    }

    fn of(losses: Losses, weights: TokenWeights<'_>, router: Option<Metric>) -> Self {
        let loss = match weights {
            TokenWeights::Uniform(weight) => Pending::Uniform(losses, weight),
            TokenWeights::PerToken { .. } => {
                let weights = (0..losses.tokens()).map(|token| weights.of(token)).collect();
                Pending::Weighted(losses, weights)
            }
        };
        Self { loss, router }
    }

    /// Returns the summed loss and the other means to report, with the auxiliary loss of mixtures (`aux_loss`) if it is on,
    /// which the sum does not contain. Waits for the device.
    pub fn wait(self) -> (f64, Vec<Metric>) {
        let (sum, mut metrics) = match self.loss {
            Pending::Uniform(losses, weight) => (f64::from(weight) * losses.sum(), Vec::new()),
            Pending::Weighted(losses, weights) => {
                let losses = losses.values();
                (losses.iter().zip(&weights).map(|(&nll, &w)| f64::from(w) * f64::from(nll)).sum(), Vec::new())
            }
            Pending::Known(loss) => (loss.sum, loss.metrics),
        };
        metrics.extend(self.router);
        (sum, metrics)
    }
}

impl CausalLm {
    /// Returns what the micro-batches of a step share; `key` is that of their passes.
    ///
    /// # Errors
    /// As [`objective_backward`](Self::objective_backward).
    pub fn step_terms(
        &self,
        objective: &dyn Objective,
        batches: &[Batch],
        key: Option<StepKey>,
    ) -> Result<StepTerms, Error> {
        objective.step_terms(&StepPasses { model: self, batches, key, temperature: objective.temperature() })
    }

    /// Adds the gradients of `scale` · loss of `batch` to `grads`. `terms` are those of its step
    /// ([`step_terms`](Self::step_terms)).
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Argument`] for an objective with a reference model where the base model
    /// is not available.
    pub fn objective_backward(
        &self,
        objective: &dyn Objective,
        batch: &Batch,
        terms: &StepTerms,
        scale: f32,
        grads: &mut Grads,
        key: Option<StepKey>,
    ) -> Result<PendingLoss, Error> {
        if let Some(scores) = objective.of_scores() {
            return self.score_backward(scores, batch, scale, grads, key);
        }
        self.check_vocabulary_head()?;
        if let Some(weights) = objective.fixed_weights(batch) {
            let pass = self.forward(batch, key)?;
            let router = pass.router_loss();
            let losses = self.loss_and_backward(pass, weights.times(scale), grads)?;
            return Ok(PendingLoss::of(losses, weights, router));
        }
        let reference = self.reference(objective, batch)?;
        let pass = self.forward(batch, key)?.at_temperature(objective.temperature());
        let log_probs = self.log_probs_of(&pass);
        // p² / Σ p² is the softmax at half the temperature.
        let sharpened = || self.log_probs_of_at(&pass, objective.temperature() / 2.0);
        let terms = terms.with_sharpened(objective, || Ok(sharpened()))?;
        let loss = objective.loss(batch, &log_probs.values(), reference.as_ref(), &terms);
        let router = pass.router_loss();
        self.backward(pass, &log_probs, TokenWeights::from(&*loss.weights).times(scale), grads)?;
        Ok(PendingLoss { loss: Pending::Known(loss), router })
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
        terms: &StepTerms,
        scale: f32,
        key: Option<StepKey>,
        apply: ApplyGradients<'_>,
    ) -> Result<PendingLoss, Error> {
        if let Some(scores) = objective.of_scores() {
            return self.score_backward_applying(scores, batch, scale, key, apply);
        }
        self.check_vocabulary_head()?;
        if let Some(weights) = objective.fixed_weights(batch) {
            let pass = self.forward(batch, key)?;
            let router = pass.router_loss();
            let losses = self.loss_and_backward_applying(pass, weights.times(scale), apply)?;
            return Ok(PendingLoss::of(losses, weights, router));
        }
        let reference = self.reference(objective, batch)?;
        let pass = self.forward(batch, key)?.at_temperature(objective.temperature());
        let log_probs = self.log_probs_of(&pass);
        // p² / Σ p² is the softmax at half the temperature.
        let sharpened = || self.log_probs_of_at(&pass, objective.temperature() / 2.0);
        let terms = terms.with_sharpened(objective, || Ok(sharpened()))?;
        let loss = objective.loss(batch, &log_probs.values(), reference.as_ref(), &terms);
        let router = pass.router_loss();
        self.backward_applying(pass, &log_probs, TokenWeights::from(&*loss.weights).times(scale), apply)?;
        Ok(PendingLoss { loss: Pending::Known(loss), router })
    }

    /// Returns the loss of `batch` without dropout and without a backward.
    ///
    /// # Errors
    /// As [`objective_backward`](Self::objective_backward).
    pub fn objective_loss(
        &self,
        objective: &dyn Objective,
        batch: &Batch,
        terms: &StepTerms,
    ) -> Result<BatchLoss, Error> {
        if let Some(scores) = objective.of_scores() {
            return self.score_loss(scores, batch);
        }
        let reference = self.reference(objective, batch)?;
        let log_probs = self.log_probs_at(batch, objective.temperature())?.values();
        let sharpened = || self.log_probs_at(batch, objective.temperature() / 2.0);
        let terms = terms.with_sharpened(objective, sharpened)?;
        Ok(objective.loss(batch, &log_probs, reference.as_ref(), &terms))
    }

    /// The log-probabilities of the reference model, if the objective needs them and the batch has none.
    fn reference(&self, objective: &dyn Objective, batch: &Batch) -> Result<Option<LogProbValues>, Error> {
        if !objective.needs_reference() || batch.has_references() {
            return Ok(None);
        }
        if self.lora().is_none() {
            return Err(Error::Argument(format!(
                "{objective:?} needs a reference model, the base without its adapter, but this model has no adapter; \
                 train an adapter instead of all weights, or give the batch reference log-probabilities"
            )));
        }
        Ok(Some(self.base_log_probs_at(batch, objective.temperature())?.values()))
    }
}
