//! REINFORCE leave-one-out.

use rekindle_kernels::linear_cross_entropy::LogProbValues;
use serde::{Deserialize, Serialize};

use super::policy::{ClipCounts, ClippedObjective, completions, negative, not_positive};
use super::{BatchLoss, Objective, StepTerms};
use crate::Batch;

/// REINFORCE leave-one-out: the mean over completions of −min(ρA, clip(ρ, 1 − ε, 1 + ε_high)·A), with ρ = π(y) / π_old(y) of
/// the whole completion.
///
/// The advantage A of a completion is its reward minus the mean reward of the other completions of its prompt
/// ([`Batch::completions`]). The penalty β·(ln π_old(y) − ln π_ref(y)) is a part of the reward.
///
/// # Gradients
/// ∂L/∂ln π of each completion, which each of its tokens receives. Rewards have none, the penalty included.
///
/// Source: Ahmadian et al., arXiv:2402.14740; TRL 1.16, `RLOOTrainer`. The golden is `tests/goldens/grpo`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Rloo {
    /// β, the weight of the penalty for the distance from the reference model, at least 0; 0 needs no reference. Default 0.05.
    pub beta: f64,
    /// ε, the lower bound of clipping. Default 0.2.
    pub epsilon: f64,
    /// ε_high, the upper bound of clipping. Default: `epsilon`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon_high: Option<f64>,
    /// The number that logits are divided by, in sampling and in training, above 0. Default 1.
    pub temperature: f64,
    /// The maximum number of tokens of a completion. Default 512.
    pub max_completion_length: usize,
}

impl Default for Rloo {
    fn default() -> Self {
        Self { beta: 0.05, epsilon: 0.2, epsilon_high: None, temperature: 1.0, max_completion_length: 512 }
    }
}

impl Rloo {
    /// Returns one sentence for each value that is out of range.
    pub fn problems(&self) -> Vec<String> {
        let high = self.epsilon_high.unwrap_or(self.epsilon);
        let mut problems = not_positive(&[("temperature", self.temperature)]);
        problems.extend(negative(&[("beta", self.beta), ("epsilon", self.epsilon), ("epsilon_high", high)]));
        problems.extend(super::grpo::length_problems(self.max_completion_length));
        problems
    }
}

impl Objective for Rloo {
    fn count(&self, batch: &Batch) -> usize {
        batch.rows.len()
    }

    fn temperature(&self) -> f32 {
        self.temperature as f32
    }

    /// # Panics
    /// If [`Batch::completions`] does not have every document.
    fn loss(&self, batch: &Batch, log_probs: &LogProbValues, _: Option<&LogProbValues>, _: &StepTerms) -> BatchLoss {
        let mut result = BatchLoss::zero(batch);
        let high = self.epsilon_high.unwrap_or(self.epsilon);
        let objective = ClippedObjective { low: self.epsilon, high, delta: None };
        for completion in completions(batch, log_probs, None) {
            let ratio = completion.log_ratios().sum::<f64>().exp();
            let clipped = objective.of(ratio, completion.completion.advantage);
            result.sum += clipped.value;
            for &token in &completion.tokens {
                result.weights[token] -= (clipped.slope * ratio) as f32;
            }
            let mut counts = ClipCounts::default();
            counts.add(clipped);
            result.add_clip_ratios(counts);
            result.add_sampler_differences(&completion);
        }
        result.add_entropy(batch, log_probs);
        result
    }
}
