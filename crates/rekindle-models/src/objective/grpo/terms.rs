//! The loss of one completion, and its derivatives.

use rekindle_kernels::linear_cross_entropy::LogProbValues;

use super::{Grpo, GrpoLoss, ImportanceSamplingLevel, ImportanceSamplingMode};
use crate::objective::policy::{ClipCounts, Clipped, ClippedObjective, ScoredCompletion};
use crate::objective::{BatchLoss, Metric, StepTerms};

/// A loss of a token as a function of the logarithm of its ratio and of its log-probability.
#[derive(Clone, Copy, Debug, Default)]
struct TokenTerm {
    value: f64,
    /// ∂value/∂ln ρ.
    by_ratio: f64,
    /// ∂value/∂ln π, with ρ fixed.
    by_log_prob: f64,
}

impl TokenTerm {
    fn scaled(self, factor: f64) -> Self {
        let Self { value, by_ratio, by_log_prob } = self;
        Self { value: factor * value, by_ratio: factor * by_ratio, by_log_prob: factor * by_log_prob }
    }

    fn plus(self, other: Self) -> Self {
        Self {
            value: self.value + other.value,
            by_ratio: self.by_ratio + other.by_ratio,
            by_log_prob: self.by_log_prob + other.by_log_prob,
        }
    }
}

impl Grpo {
    /// Adds the loss of a completion, its weights and its metrics.
    pub(super) fn add_completion(
        &self,
        result: &mut BatchLoss,
        completion: &ScoredCompletion<'_>,
        log_probs: &LogProbValues,
        terms: &StepTerms,
    ) {
        let advantage = completion.completion.advantage;
        let is_sequence = self.importance_sampling_level == ImportanceSamplingLevel::Sequence;
        let mut log_ratios: Vec<f64> = completion.log_ratios().collect();
        if is_sequence {
            let mean = log_ratios.iter().sum::<f64>() / completion.length();
            log_ratios.fill(mean);
        }
        let corrections = self.corrections(result, completion);
        let gamma = (self.loss_type == GrpoLoss::Vespo).then(|| self.gamma_weight(completion, corrections.as_deref()));
        let corrections = corrections.filter(|_| gamma.is_none());
        let kept = if self.keeps(completion) { 1.0 } else { 0.0 };
        let share = self.share(completion, terms);
        let (mut by_ratio, mut kl_sum) = (0.0, 0.0);
        for (index, &token) in completion.tokens.iter().enumerate() {
            let (log_prob, ratio) = (completion.log_probs[index], log_ratios[index].exp());
            let mut factor = kept * corrections.as_ref().map_or(1.0, |corrections| corrections[index]);
            if terms.entropy_threshold.is_some_and(|least| f64::from(log_probs.entropy[token]) < least) {
                factor = 0.0;
            }
            let mut term = self.policy_term(ratio, advantage, log_prob, gamma).scaled(factor);
            if let Some(reference) = completion.reference.as_ref().filter(|_| self.beta != 0.0) {
                let kl = self.kl_term(reference[index] - log_prob, ratio);
                kl_sum += kl.value;
                term = term.plus(kl.scaled(self.beta));
            }
            result.sum += share * term.value;
            result.weights[token] -= (share * term.by_log_prob) as f32;
            match is_sequence {
                true => by_ratio += term.by_ratio,
                false => result.weights[token] -= (share * term.by_ratio) as f32,
            }
        }
        if is_sequence {
            // ∂ln ρ/∂ln π_t = 1 / n.
            for &token in &completion.tokens {
                result.weights[token] -= (share * by_ratio / completion.length()) as f32;
            }
        }
        // A completion has one ratio at the level of sequences, also if all of its tokens are masked.
        let metric_ratios = match (is_sequence, log_ratios.first()) {
            (true, Some(log_ratio)) => vec![log_ratio.exp()],
            (true, None) => vec![1.0],
            (false, _) => log_ratios.iter().map(|log_ratio| log_ratio.exp()).collect(),
        };
        self.add_metrics(result, &metric_ratios, advantage, gamma);
        if completion.reference.is_some() && self.beta != 0.0 {
            Metric::add(&mut result.metrics, [Metric::new("kl", kl_sum, completion.tokens.len())]);
        }
    }

    /// f(ρ, A) of a token; `gamma` is φ of `vespo`.
    fn policy_term(&self, ratio: f64, advantage: f64, log_prob: f64, gamma: Option<f64>) -> TokenTerm {
        let fixed = |weight: f64| TokenTerm {
            value: -weight * advantage * log_prob,
            by_log_prob: -weight * advantage,
            by_ratio: 0.0,
        };
        match self.loss_type {
            GrpoLoss::Vespo => fixed(gamma.unwrap_or(1.0)),
            GrpoLoss::Cispo => fixed(ratio.min(self.high())),
            GrpoLoss::Sapo => {
                let positive = advantage > 0.0;
                let temperature = if positive { self.sapo_temperature_pos } else { self.sapo_temperature_neg };
                let gate = 1.0 / (1.0 + (-temperature * (ratio - 1.0)).exp());
                TokenTerm {
                    value: -4.0 / temperature * gate * advantage,
                    by_ratio: -4.0 * gate * (1.0 - gate) * advantage * ratio,
                    by_log_prob: 0.0,
                }
            }
            GrpoLoss::Grpo | GrpoLoss::Bnpo | GrpoLoss::DrGrpo | GrpoLoss::Dapo | GrpoLoss::Luspo => {
                let Clipped { value, slope, .. } = self.clipped(ratio, advantage);
                TokenTerm { value, by_ratio: slope * ratio, by_log_prob: 0.0 }
            }
        }
    }

    fn clipped(&self, ratio: f64, advantage: f64) -> Clipped {
        ClippedObjective { low: self.epsilon, high: self.high(), delta: self.delta }.of(ratio, advantage)
    }

    /// e^d − d − 1, times ρ with a corrected bias.
    fn kl_term(&self, difference: f64, ratio: f64) -> TokenTerm {
        let value = difference.exp_m1() - difference;
        let slope = -difference.exp_m1();
        match self.use_bias_correction_kl {
            true => TokenTerm { value: value * ratio, by_ratio: value * ratio, by_log_prob: slope * ratio },
            false => TokenTerm { value, by_ratio: 0.0, by_log_prob: slope },
        }
    }

    /// The factor of a completion's Σ ℓ_t in the sum over completions.
    fn share(&self, completion: &ScoredCompletion<'_>, terms: &StepTerms) -> f64 {
        match self.loss_type {
            GrpoLoss::Grpo | GrpoLoss::Sapo => 1.0 / completion.length(),
            GrpoLoss::Bnpo => terms.per_token,
            GrpoLoss::DrGrpo => 1.0 / self.max_completion_length as f64,
            GrpoLoss::Dapo | GrpoLoss::Cispo | GrpoLoss::Vespo => 1.0 / completion.completion.mean_tokens,
            GrpoLoss::Luspo => 1.0,
        }
    }

    /// Returns false for a completion that is too far from the sampler's model.
    fn keeps(&self, completion: &ScoredCompletion<'_>) -> bool {
        let Some(threshold) = self.off_policy_mask_threshold else { return true };
        let sampler = completion.sampler.as_ref().unwrap_or(&completion.old);
        let differences = sampler.iter().zip(&completion.log_probs).map(|(sampler, log_prob)| sampler - log_prob);
        completion.completion.advantage >= 0.0 || differences.sum::<f64>() / completion.length() <= threshold
    }

    /// Returns c of each token, and adds its metrics; `None` without a correction.
    fn corrections(&self, result: &mut BatchLoss, completion: &ScoredCompletion<'_>) -> Option<Vec<f64>> {
        use ImportanceSamplingMode::{SequenceMask, SequenceTruncate, TokenMask, TokenTruncate};
        let sampler = completion.sampler.as_ref().filter(|_| self.importance_sampling_correction)?;
        let differences = completion.old.iter().zip(sampler).map(|(old, sampler)| old - sampler);
        let mode = self.importance_sampling_mode;
        let (least, most) =
            (self.importance_sampling_clip_min.unwrap_or(f64::NEG_INFINITY), self.importance_sampling_clip_max);
        let bounded = |ratio: f64| match mode {
            TokenTruncate | SequenceTruncate => ratio.max(least).min(most),
            TokenMask | SequenceMask if ratio < least || ratio > most => 0.0,
            TokenMask | SequenceMask => ratio,
        };
        let ratios: Vec<f64> = match mode.is_of_tokens() {
            true => differences.map(|difference| bounded(difference.exp())).collect(),
            false => vec![bounded(differences.sum::<f64>().exp())],
        };
        let extreme = |of: fn(f64, f64) -> f64| ratios.iter().copied().reduce(of);
        if let (Some(least), Some(most)) = (extreme(f64::min), extreme(f64::max)) {
            let metrics = [
                Metric::min("sampling/importance_sampling_ratio/min", least),
                Metric::new("sampling/importance_sampling_ratio/mean", ratios.iter().sum(), ratios.len()),
                Metric::max("sampling/importance_sampling_ratio/max", most),
            ];
            Metric::add(&mut result.metrics, metrics);
        }
        Some(if mode.is_of_tokens() { ratios } else { vec![ratios[0]; sampler.len()] })
    }

    /// φ(w) of `vespo`, with w = π / π_old · c of the whole completion.
    fn gamma_weight(&self, completion: &ScoredCompletion<'_>, corrections: Option<&[f64]>) -> f64 {
        /// Bounds of logarithms, as in TRL: ln 10⁻⁸ and 20.
        const MOST: f64 = 20.0;
        let least = 1e-8f64.ln();
        let mut sum: f64 = completion.log_ratios().map(|log_ratio| log_ratio.clamp(-MOST, MOST)).sum();
        sum += corrections.iter().copied().flatten().map(|ratio| ratio.ln().clamp(least, MOST)).sum::<f64>();
        let log_weight = sum.clamp(least, MOST);
        let is_negative = completion.completion.advantage < 0.0;
        let (k, lambda) = match is_negative {
            true => (self.vespo_k_neg, self.vespo_lambda_neg),
            false => (self.vespo_k_pos, self.vespo_lambda_pos),
        };
        let lambda = lambda.max(1e-4);
        let phi = (lambda + k * log_weight - lambda * log_weight.exp()).exp();
        if phi.is_finite() { phi } else { 0.0 }
    }

    fn add_metrics(&self, result: &mut BatchLoss, ratios: &[f64], advantage: f64, gamma: Option<f64>) {
        match self.loss_type {
            GrpoLoss::Grpo | GrpoLoss::Bnpo | GrpoLoss::DrGrpo | GrpoLoss::Dapo | GrpoLoss::Luspo => {
                let mut counts = ClipCounts::default();
                ratios.iter().for_each(|&ratio| counts.add(self.clipped(ratio, advantage)));
                result.add_clip_ratios(counts);
            }
            GrpoLoss::Cispo => {
                let clipped = ratios.iter().filter(|&&ratio| ratio > self.high() && advantage > 0.0).count();
                let metric = Metric::new("cispo_clip_ratio", clipped as f64, ratios.len());
                Metric::add(&mut result.metrics, [metric]);
            }
            GrpoLoss::Vespo => {
                let metric = Metric::new("vespo/phi_seq_mean", gamma.unwrap_or(1.0), 1);
                Metric::add(&mut result.metrics, [metric]);
            }
            GrpoLoss::Sapo => {}
        }
    }
}
