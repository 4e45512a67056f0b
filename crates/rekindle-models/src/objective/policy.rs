//! Sampled completions: their log-probabilities, probability ratios, and the clipped objective of policy gradients.

use rekindle_kernels::linear_cross_entropy::LogProbValues;

use super::answers::answer_tokens;
use super::{BatchLoss, Metric};
use crate::{Batch, SampledCompletion};

/// A sampled completion with log-probabilities of its tokens, each `[tokens of the completion]`.
#[derive(Clone, Debug)]
pub(super) struct ScoredCompletion<'a> {
    pub(super) completion: &'a SampledCompletion,
    /// The positions in the batch that predict the tokens.
    pub(super) tokens: Vec<usize>,
    /// ln π.
    pub(super) log_probs: Vec<f64>,
    /// ln π_old, as a training pass computes it.
    pub(super) old: Vec<f64>,
    /// The same as the sampler computed it.
    pub(super) sampler: Option<Vec<f64>>,
    /// ln π_ref.
    pub(super) reference: Option<Vec<f64>>,
}

/// Returns the completions of a batch.
///
/// # Panics
/// If [`Batch::completions`] does not have every document, or a list of log-probabilities every token.
pub(super) fn completions<'a>(
    batch: &'a Batch,
    log_probs: &LogProbValues,
    reference: Option<&LogProbValues>,
) -> Vec<ScoredCompletion<'a>> {
    assert_eq!(batch.completions.len(), batch.rows.len(), "every document has a sampled completion");
    let scored = batch.documents().zip(&batch.completions).map(|(document, completion)| {
        let tokens: Vec<usize> = answer_tokens(batch, document).collect();
        let of_batch =
            |values: &LogProbValues| tokens.iter().map(|&token| f64::from(values.log_probs[token])).collect();
        let given = |values: &Option<Vec<f32>>| {
            let values = values.as_ref()?;
            assert_eq!(values.len(), tokens.len(), "a log-probability of every token of the completion");
            Some(values.iter().map(|&value| f64::from(value)).collect::<Vec<_>>())
        };
        let log_probs: Vec<f64> = of_batch(log_probs);
        ScoredCompletion {
            old: given(&completion.old_log_probs).unwrap_or_else(|| log_probs.clone()),
            sampler: given(&completion.sampler_log_probs),
            reference: given(&completion.reference_log_probs).or_else(|| reference.map(of_batch)),
            completion,
            tokens,
            log_probs,
        }
    });
    scored.collect()
}

impl ScoredCompletion<'_> {
    /// Returns the number of tokens, at least 1.
    pub(super) fn length(&self) -> f64 {
        self.tokens.len().max(1) as f64
    }

    /// Returns ln π − ln π_old of each token.
    pub(super) fn log_ratios(&self) -> impl Iterator<Item = f64> + '_ {
        self.log_probs.iter().zip(&self.old).map(|(log_prob, old)| log_prob - old)
    }
}

/// The clipped objective −min(min(ρ, δ)·A, clip(ρ, 1 − ε, 1 + ε_high)·A) of a ratio ρ and an advantage A.
///
/// Source: Schulman et al., arXiv:1707.06347, equation 7; with δ, arXiv:2505.07291.
#[derive(Clone, Copy, Debug)]
pub(super) struct ClippedObjective {
    pub(super) low: f64,
    pub(super) high: f64,
    pub(super) delta: Option<f64>,
}

/// A value of [`ClippedObjective`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Clipped {
    pub(super) value: f64,
    /// ∂value/∂ρ.
    pub(super) slope: f64,
    /// True if A < 0 and ρ < 1 − ε.
    pub(super) is_low: bool,
    /// True if A > 0 and ρ > 1 + ε_high.
    pub(super) is_high: bool,
}

impl ClippedObjective {
    pub(super) fn of(self, ratio: f64, advantage: f64) -> Clipped {
        let most = self.delta.unwrap_or(f64::INFINITY);
        let (least_kept, most_kept) = (1.0 - self.low, 1.0 + self.high);
        // Not `clamp`: the bounds may be in any order, as in PyTorch.
        let clipped = ratio.max(least_kept).min(most_kept);
        let (first, second) = (ratio.min(most) * advantage, clipped * advantage);
        let slopes = (
            if ratio <= most { advantage } else { 0.0 },
            if (least_kept..=most_kept).contains(&ratio) { advantage } else { 0.0 },
        );
        let slope = match first.total_cmp(&second) {
            core::cmp::Ordering::Less => slopes.0,
            core::cmp::Ordering::Greater => slopes.1,
            core::cmp::Ordering::Equal => 0.5 * (slopes.0 + slopes.1),
        };
        let kept = ratio.min(most);
        Clipped {
            value: -first.min(second),
            slope: -slope,
            is_low: kept < least_kept && advantage < 0.0,
            is_high: kept > most_kept && advantage > 0.0,
        }
    }
}

/// Counts of clipped ratios of a completion.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ClipCounts {
    low: usize,
    high: usize,
    all: usize,
}

impl ClipCounts {
    pub(super) fn add(&mut self, clipped: Clipped) {
        self.low += usize::from(clipped.is_low);
        self.high += usize::from(clipped.is_high);
        self.all += 1;
    }
}

impl BatchLoss {
    /// Adds the shares of clipped ratios.
    pub(super) fn add_clip_ratios(&mut self, counts: ClipCounts) {
        let ClipCounts { low, high, all } = counts;
        let share = |clipped: usize| clipped as f64 / all as f64;
        let mean = |name, clipped: usize| Metric::new(name, clipped as f64, all);
        let means = [
            mean("clip_ratio/low_mean", low),
            mean("clip_ratio/high_mean", high),
            mean("clip_ratio/region_mean", low + high),
        ];
        Metric::add(&mut self.metrics, means);
        if all > 0 {
            let extremes =
                [Metric::min("clip_ratio/low_min", share(low)), Metric::max("clip_ratio/high_max", share(high))];
            Metric::add(&mut self.metrics, extremes);
        }
    }

    /// Adds the differences between the log-probabilities of a training pass and of the sampler.
    pub(super) fn add_sampler_differences(&mut self, completion: &ScoredCompletion<'_>) {
        let Some(sampler) = completion.sampler.as_ref().filter(|sampler| !sampler.is_empty()) else { return };
        let differences = || completion.old.iter().zip(sampler).map(|(old, sampler)| (old - sampler).abs());
        let metrics = [
            Metric::new("sampling/sampling_logp_difference/mean", differences().sum(), sampler.len()),
            Metric::max("sampling/sampling_logp_difference/max", differences().fold(0.0, f64::max)),
        ];
        Metric::add(&mut self.metrics, metrics);
    }
}

/// Returns a sentence for each of these numbers that is not above 0.
pub(super) fn not_positive(values: &[(&str, f64)]) -> Vec<String> {
    let wrong = values.iter().filter(|(_, value)| !(*value > 0.0 && value.is_finite()));
    wrong.map(|(name, value)| format!("{name} is {value}; it must be above 0")).collect()
}

/// Returns a sentence for each of these numbers that is below 0.
pub(super) fn negative(values: &[(&str, f64)]) -> Vec<String> {
    let wrong = values.iter().filter(|(_, value)| !(*value >= 0.0 && value.is_finite()));
    wrong.map(|(name, value)| format!("{name} is {value}; it must be at least 0")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_clipped_where_they_would_grow_the_objective() {
        let objective = ClippedObjective { low: 0.2, high: 0.3, delta: None };
        let of = |ratio, advantage| {
            let Clipped { value, slope, is_low, is_high } = objective.of(ratio, advantage);
            (value, slope, is_low, is_high)
        };
        assert_eq!(of(1.0, 2.0), (-2.0, -2.0, false, false), "both sides are equal");
        assert_eq!(of(1.5, 2.0), (-2.6, 0.0, false, true));
        assert_eq!(of(1.5, -2.0), (3.0, 2.0, false, false), "not clipped above for a negative advantage");
        assert_eq!(of(0.5, -2.0), (1.6, 0.0, true, false));
        assert_eq!(of(0.5, 2.0), (-1.0, -2.0, false, false));
        assert_eq!(of(9.0, 0.0), (0.0, 0.0, false, false));
        let two_sided = ClippedObjective { delta: Some(4.0), ..objective };
        assert_eq!(two_sided.of(9.0, -2.0).value, 8.0);
        assert_eq!(two_sided.of(9.0, -2.0).slope, 0.0);
    }
}
