//! Kahneman–Tversky optimization: answers that are good or bad on their own.

use rekindle_kernels::linear_cross_entropy::LogProbValues;
use serde::{Deserialize, Serialize};

use super::answers::answers;
use super::dual::Dual;
use super::{BatchLoss, Metric, Objective, StepPasses, StepTerms};
use crate::{Batch, Error};

/// Kahneman–Tversky optimization: the mean over answers of w_d·(1 − σ(β·(r − z))) for desirable ones and of
/// w_u·(1 − σ(β·(z − r))) for undesirable ones, with r = ln π(y) − ln π_ref(y).
///
/// z = max(0, mean of r over mismatched answers) estimates KL(π ‖ π_ref) over the step: each prompt with the answer to another
/// one ([`Batch::mismatched`]). It has no gradient. [`Batch::answers`] says which documents are desirable.
///
/// # Gradients
/// ∂L/∂ln π of each answer, which each of its tokens receives.
///
/// Source: Ethayarajh et al., arXiv:2402.01306, equation 7; TRL 1.16, `KTOTrainer`. The golden is `tests/goldens/preferences`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kto {
    /// β, above 0: how strongly the model is held at the reference model. Default 0.1.
    pub beta: f64,
    /// The loss. Default kto.
    pub loss_type: KtoLoss,
    /// w_d, the weight of desirable answers. Default 1.
    pub desirable_weight: f64,
    /// w_u, the weight of undesirable answers. Default 1.
    pub undesirable_weight: f64,
}

/// A loss of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KtoLoss {
    /// That of [`Kto`].
    #[default]
    Kto,
    /// 1 − σ(βr) for desirable answers and σ(βr) for undesirable ones, without an estimate of KL, arXiv:2408.06266.
    ApoZeroUnpaired,
}

impl Default for Kto {
    fn default() -> Self {
        Self { beta: 0.1, loss_type: KtoLoss::Kto, desirable_weight: 1.0, undesirable_weight: 1.0 }
    }
}

/// Returns a sentence for a β that is not above 0.
pub(super) fn beta_problems(beta: f64) -> Vec<String> {
    let is_right = beta > 0.0 && beta.is_finite();
    if is_right { Vec::new() } else { vec![format!("beta is {beta}; it must be above 0")] }
}

impl Kto {
    /// Returns one sentence for each value that is out of range.
    pub fn problems(&self) -> Vec<String> {
        let weights = [("desirable_weight", self.desirable_weight), ("undesirable_weight", self.undesirable_weight)];
        let wrong = weights.into_iter().filter(|(_, weight)| !(weight.is_finite() && *weight >= 0.0));
        let wrong = wrong.map(|(name, weight)| format!("{name} is {weight}; it must be at least 0"));
        beta_problems(self.beta).into_iter().chain(wrong).collect()
    }
}

impl Objective for Kto {
    fn count(&self, batch: &Batch) -> usize {
        batch.rows.len()
    }

    fn needs_reference(&self) -> bool {
        true
    }

    fn step_terms(&self, step: &StepPasses<'_>) -> Result<StepTerms, Error> {
        let (mut sum, mut count) = (0.0, 0);
        for batch in step.batches.iter().filter_map(|batch| batch.mismatched.as_deref()) {
            let reference = step.reference(self, batch)?;
            let answers = answers(batch, &step.log_probs(batch)?, reference.as_ref(), None);
            count += answers.len();
            sum += answers.iter().map(super::answers::ScoredAnswer::log_ratio).sum::<f64>();
        }
        Ok(StepTerms { kl: (sum / count.max(1) as f64).max(0.0), ..StepTerms::default() })
    }

    /// # Panics
    /// If [`Batch::answers`] does not have every document.
    fn loss(
        &self,
        batch: &Batch,
        log_probs: &LogProbValues,
        reference: Option<&LogProbValues>,
        terms: &StepTerms,
    ) -> BatchLoss {
        assert_eq!(batch.answers.len(), batch.rows.len(), "every document is desirable or not");
        let mut result = BatchLoss::zero(batch);
        for answer in answers(batch, log_probs, reference, None) {
            let ratio = Dual::first(answer.log_prob) - answer.reference;
            let reward = self.beta * answer.log_ratio();
            let baseline = if self.loss_type == KtoLoss::Kto { terms.kl } else { 0.0 };
            let (loss, weight, names) = if answer.preferred {
                let loss = 1.0 - (self.beta * (ratio - baseline)).sigmoid();
                (loss, self.desirable_weight, ["rewards/chosen", "logps/chosen"])
            } else {
                let loss = 1.0 - (self.beta * (baseline - ratio)).sigmoid();
                (loss, self.undesirable_weight, ["rewards/rejected", "logps/rejected"])
            };
            result.sum += weight * loss.value;
            result.add_slope(batch, &answer, weight * loss.slope[0]);
            let metrics = [Metric::new(names[0], reward, 1), Metric::new(names[1], answer.log_prob, 1)];
            Metric::add(&mut result.metrics, metrics);
        }
        result.add_entropy(batch, log_probs);
        Metric::add(&mut result.metrics, [Metric::new("kl", terms.kl, 1)]);
        result
    }
}
