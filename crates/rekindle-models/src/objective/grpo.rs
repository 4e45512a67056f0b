//! Group relative policy optimization and its relatives.

mod terms;

use rekindle_kernels::linear_cross_entropy::LogProbValues;
use serde::{Deserialize, Serialize};

use super::policy::{completions, negative, not_positive};
use super::{BatchLoss, Objective, StepPasses, StepTerms};
use crate::{Batch, Error};

/// Group relative policy optimization and its relatives: GRPO, Dr. GRPO, DAPO, BNPO, GSPO, CISPO, SAPO, LUSPO and VESPO, with
/// the names and formulas of TRL's `GRPOConfig`.
///
/// A completion with the advantage A ([`Batch::completions`]) has in each of its tokens t the loss
/// ℓ_t = m·c_t·f(ρ_t, A) + β·KL_t, where [`GrpoLoss`] lists f and the mean of ℓ_t, and
///
/// - ρ_t = π / π_old of the token, or of the whole completion ([`ImportanceSamplingLevel`]);
/// - c_t corrects for the sampler ([`ImportanceSamplingMode`]): π_old / π_sampler, bounded and without a gradient;
/// - m is 0 for completions that [`off_policy_mask_threshold`](Self::off_policy_mask_threshold) drops and for tokens below
///   [`top_entropy_quantile`](Self::top_entropy_quantile), else 1;
/// - KL_t = (e^d − d − 1)·ρ_t with d = ln π_ref − ln π.
///
/// A step in which π_old is the model itself has ρ = 1, but the gradient of ρ.
///
/// # Gradients
/// ∂L/∂ln π of each token. Advantages, π_old, π_ref and the sampler have none.
///
/// Source: Shao et al., arXiv:2402.03300; TRL 1.16, `GRPOTrainer`. The golden is `tests/goldens/grpo`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Grpo {
    /// The loss. Default dapo.
    pub loss_type: GrpoLoss,
    /// β, the weight of the divergence from the reference model, at least 0; 0 needs no reference. Default 0.
    pub beta: f64,
    /// ε, the lower bound of clipping. Default 0.2.
    pub epsilon: f64,
    /// ε_high, the upper bound of clipping; of `cispo`, the largest ratio. Default: `epsilon`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub epsilon_high: Option<f64>,
    /// δ, the largest ratio where the advantage is negative, above 1 + ε_high. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delta: Option<f64>,
    /// The level of probability ratios. Default token.
    pub importance_sampling_level: ImportanceSamplingLevel,
    /// If true, KL is multiplied by ρ, which makes its gradient unbiased (arXiv:2512.02556). Default true.
    pub use_bias_correction_kl: bool,
    /// The number that logits are divided by, in sampling and in training, above 0. Default 1.
    pub temperature: f64,
    /// The maximum number of tokens of a completion, which `dr_grpo` divides by. Default 512.
    pub max_completion_length: usize,
    /// The share of tokens, those of the highest entropy in a step, that have a gradient, from 0 to 1 (arXiv:2506.01939).
    /// Default 1.
    pub top_entropy_quantile: f64,
    /// The mean of ln π_sampler − ln π over a completion, above which one with a negative advantage is dropped
    /// (arXiv:2512.02556). Default: none is dropped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub off_policy_mask_threshold: Option<f64>,
    /// τ of `sapo` for advantages that are not positive, above 0. Default 1.05.
    pub sapo_temperature_neg: f64,
    /// τ of `sapo` for positive advantages, above 0. Default 1.
    pub sapo_temperature_pos: f64,
    /// k of `vespo` for advantages from 0 on. Default 2.
    pub vespo_k_pos: f64,
    /// λ of `vespo` for advantages from 0 on. Default 3.
    pub vespo_lambda_pos: f64,
    /// k of `vespo` for negative advantages. Default 3.
    pub vespo_k_neg: f64,
    /// λ of `vespo` for negative advantages. Default 2.
    pub vespo_lambda_neg: f64,
    /// If true, the loss corrects for the sampler where [`Batch::completions`] have its log-probabilities. Default true.
    pub importance_sampling_correction: bool,
    /// The form of the correction. Default `sequence_mask`.
    pub importance_sampling_mode: ImportanceSamplingMode,
    /// The largest correction. Default 3.
    pub importance_sampling_clip_max: f64,
    /// The smallest correction. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub importance_sampling_clip_min: Option<f64>,
}

/// A loss f of a token, and the mean over tokens. n is the number of a completion's tokens, and means over completions are
/// over those of the step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GrpoLoss {
    /// The clipped objective −min(min(ρ, δ)·A, clip(ρ, 1 − ε, 1 + ε_high)·A); the mean over completions of Σ_t ℓ_t / n,
    /// arXiv:2402.03300.
    Grpo,
    /// The clipped objective; the sum over all tokens of the step, divided by their number.
    Bnpo,
    /// The clipped objective; the mean over completions of Σ_t ℓ_t / `max_completion_length`, arXiv:2503.20783.
    DrGrpo,
    /// The clipped objective; the mean over completions of Σ_t ℓ_t / n̄, where n̄ is the mean of n over all completions that were
    /// sampled together, arXiv:2503.14476.
    #[default]
    Dapo,
    /// −min(ρ, ε_high)·A·ln π without a gradient of ρ; the mean of `dapo`, arXiv:2506.13585.
    Cispo,
    /// −4/τ·σ(τ·(ρ − 1))·A; the mean of `grpo`, arXiv:2511.20347.
    Sapo,
    /// The clipped objective; the mean over completions of Σ_t ℓ_t, arXiv:2602.05261.
    Luspo,
    /// −φ(w)·A·ln π with φ = e^λ·w^k·e^(−λw) without a gradient, w = π / π_sampler of the whole completion; the mean of `dapo`,
    /// arXiv:2602.10693.
    Vespo,
}

/// The level of the ratio ρ of probabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSamplingLevel {
    /// A ratio for each token.
    #[default]
    Token,
    /// The geometric mean over a completion's tokens (GSPO, arXiv:2507.18071).
    Sequence,
}

/// The correction c for the difference between the sampler and the model that is trained: the ratio π_old / π_sampler of tokens
/// or of whole completions, which is replaced where it is out of bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImportanceSamplingMode {
    /// Replaces the ratio of each token by the bound.
    TokenTruncate,
    /// Replaces the ratio of each token by 0.
    TokenMask,
    /// Replaces the ratio of each completion by the bound.
    SequenceTruncate,
    /// Replaces the ratio of each completion by 0.
    #[default]
    SequenceMask,
}

impl ImportanceSamplingMode {
    fn is_of_tokens(self) -> bool {
        matches!(self, Self::TokenTruncate | Self::TokenMask)
    }
}

impl Default for Grpo {
    fn default() -> Self {
        Self {
            loss_type: GrpoLoss::default(),
            beta: 0.0,
            epsilon: 0.2,
            epsilon_high: None,
            delta: None,
            importance_sampling_level: ImportanceSamplingLevel::default(),
            use_bias_correction_kl: true,
            temperature: 1.0,
            max_completion_length: 512,
            top_entropy_quantile: 1.0,
            off_policy_mask_threshold: None,
            sapo_temperature_neg: 1.05,
            sapo_temperature_pos: 1.0,
            vespo_k_pos: 2.0,
            vespo_lambda_pos: 3.0,
            vespo_k_neg: 3.0,
            vespo_lambda_neg: 2.0,
            importance_sampling_correction: true,
            importance_sampling_mode: ImportanceSamplingMode::default(),
            importance_sampling_clip_max: 3.0,
            importance_sampling_clip_min: None,
        }
    }
}

/// Returns a sentence for a maximum length without a token.
pub(super) fn length_problems(max_completion_length: usize) -> Option<String> {
    (max_completion_length == 0).then(|| "max_completion_length is 0; it must be at least 1".to_owned())
}

impl Grpo {
    /// Returns one sentence for each value that is out of range.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = not_positive(&[
            ("temperature", self.temperature),
            ("sapo_temperature_neg", self.sapo_temperature_neg),
            ("sapo_temperature_pos", self.sapo_temperature_pos),
            ("importance_sampling_clip_max", self.importance_sampling_clip_max),
        ]);
        problems.extend(negative(&[
            ("beta", self.beta),
            ("epsilon", self.epsilon),
            ("epsilon_high", self.high()),
            ("vespo_k_pos", self.vespo_k_pos),
            ("vespo_lambda_pos", self.vespo_lambda_pos),
            ("vespo_k_neg", self.vespo_k_neg),
            ("vespo_lambda_neg", self.vespo_lambda_neg),
            ("importance_sampling_clip_min", self.importance_sampling_clip_min.unwrap_or(0.0)),
        ]));
        problems.extend(length_problems(self.max_completion_length));
        if !(0.0..=1.0).contains(&self.top_entropy_quantile) {
            let quantile = self.top_entropy_quantile;
            problems.push(format!("top_entropy_quantile is {quantile}; it must be from 0 to 1"));
        }
        if let Some(delta) = self.delta.filter(|delta| delta.is_nan() || *delta <= 1.0 + self.high()) {
            problems
                .push(format!("delta is {delta}; it must be above 1 + epsilon_high, which is {}", 1.0 + self.high()));
        }
        if self.loss_type == GrpoLoss::Cispo && self.epsilon_high.is_none() {
            problems.push(
                "loss_type \"cispo\" needs epsilon_high, the largest ratio; its paper and TRL recommend 5".to_owned(),
            );
        }
        let is_sequence = self.importance_sampling_level == ImportanceSamplingLevel::Sequence;
        if self.loss_type == GrpoLoss::Vespo && is_sequence {
            problems.push(
                "loss_type \"vespo\" weights whole completions itself; set importance_sampling_level = \"token\""
                    .to_owned(),
            );
        }
        if self.loss_type == GrpoLoss::Vespo
            && self.importance_sampling_correction
            && !self.importance_sampling_mode.is_of_tokens()
        {
            problems.push(
                "loss_type \"vespo\" needs importance_sampling_mode = \"token_truncate\" or \"token_mask\"".to_owned(),
            );
        }
        if let Some(least) = self.importance_sampling_clip_min.filter(|&min| min >= self.importance_sampling_clip_max) {
            problems.push(format!(
                "importance_sampling_clip_min is {least}; it must be below importance_sampling_clip_max, which is {}",
                self.importance_sampling_clip_max
            ));
        }
        problems
    }

    fn high(&self) -> f64 {
        self.epsilon_high.unwrap_or(self.epsilon)
    }
}

impl Objective for Grpo {
    fn count(&self, batch: &Batch) -> usize {
        batch.rows.len()
    }

    fn needs_reference(&self) -> bool {
        self.beta != 0.0
    }

    fn temperature(&self) -> f32 {
        self.temperature as f32
    }

    fn step_terms(&self, step: &StepPasses<'_>) -> Result<StepTerms, Error> {
        let rows: usize = step.batches.iter().map(|batch| batch.rows.len()).sum();
        let tokens: usize = step.batches.iter().map(Batch::counted).sum();
        let mut terms = StepTerms { per_token: rows as f64 / tokens.max(1) as f64, ..StepTerms::default() };
        if self.top_entropy_quantile < 1.0 {
            let mut entropies = Vec::new();
            for batch in step.batches {
                let values = step.log_probs(batch)?;
                entropies
                    .extend((0..batch.tokens()).filter(|&token| batch.is_answer(token)).map(|t| values.entropy[t]));
            }
            terms.entropy_threshold = Some(quantile(entropies, 1.0 - self.top_entropy_quantile));
        }
        Ok(terms)
    }

    /// # Panics
    /// If [`Batch::completions`] does not have every document.
    fn loss(
        &self,
        batch: &Batch,
        log_probs: &LogProbValues,
        reference: Option<&LogProbValues>,
        terms: &StepTerms,
    ) -> BatchLoss {
        let mut result = BatchLoss::zero(batch);
        for completion in completions(batch, log_probs, reference) {
            self.add_completion(&mut result, &completion, log_probs, terms);
            result.add_sampler_differences(&completion);
        }
        result.add_entropy(batch, log_probs);
        result
    }
}

/// Returns the quantile at `share`, interpolated linearly between neighbours; +∞ without values.
fn quantile(mut values: Vec<f32>, share: f64) -> f64 {
    values.sort_by(f32::total_cmp);
    let Some(last) = values.len().checked_sub(1) else { return f64::INFINITY };
    let place = share * last as f64;
    let (below, above) = (place.floor() as usize, (place.ceil() as usize).min(last));
    let [low, high] = [below, above].map(|index| f64::from(values[index]));
    low + (place - below as f64) * (high - low)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_lie_between_values() {
        assert_eq!(quantile(vec![4.0, 1.0, 2.0, 3.0], 0.5), 2.5);
        assert_eq!(quantile(vec![4.0, 1.0, 2.0, 3.0], 1.0), 4.0);
        assert_eq!(quantile(vec![], 0.5), f64::INFINITY);
    }

    #[test]
    fn values_out_of_range_are_named() {
        assert_eq!(Grpo::default().problems(), [""; 0]);
        let problems = |change: fn(&mut Grpo)| {
            let mut grpo = Grpo::default();
            change(&mut grpo);
            grpo.problems().join("; ")
        };
        assert_eq!(problems(|grpo| grpo.temperature = 0.0), "temperature is 0; it must be above 0");
        assert_eq!(problems(|grpo| grpo.beta = -1.0), "beta is -1; it must be at least 0");
        assert!(problems(|grpo| grpo.delta = Some(1.1)).contains("above 1 + epsilon_high, which is 1.2"));
        assert!(problems(|grpo| grpo.loss_type = GrpoLoss::Cispo).contains("needs epsilon_high"));
        assert!(problems(|grpo| grpo.loss_type = GrpoLoss::Vespo).contains("\"token_truncate\""));
        assert!(problems(|grpo| grpo.importance_sampling_clip_min = Some(3.0)).contains("below importance"));
        assert!(problems(|grpo| grpo.top_entropy_quantile = 1.5).contains("from 0 to 1"));
    }
}
