//! Reward models: a score of answers, trained on pairs.

use rekindle_kernels::linear_cross_entropy::LogProbValues;
use serde::{Deserialize, Serialize};

use super::dual::Dual;
use super::{BatchLoss, Metric, Objective, StepTerms};
use crate::Batch;

/// A loss of the scores that a reward model gives documents.
pub trait ScoreObjective: core::fmt::Debug {
    /// Returns the summed loss of `batch` (its `weights` are empty) and ∂sum/∂score of each document.
    fn loss(&self, batch: &Batch, scores: &[f64]) -> (BatchLoss, Vec<f64>);
}

/// The loss of a reward model: the mean over pairs of −ln σ(r_chosen − r_rejected − m) + c·(r_chosen + r_rejected)².
///
/// r is the score of a document ([`CausalLm::scores`](crate::CausalLm::scores)), m the margin of the pair
/// ([`Batch::margins`]; 0 without one) and c the coefficient. Documents 2i and 2i + 1 of a batch are the chosen and the
/// rejected answer of pair i.
///
/// # Gradients
/// With g = σ(−(r_chosen − r_rejected − m)) and s = 2c·(r_chosen + r_rejected): ∂L/∂r_chosen = −g + s, ∂L/∂r_rejected = g + s.
///
/// Source: Bradley–Terry's model as in Ouyang et al., arXiv:2203.02155, equation 1; margins of Touvron et al.,
/// arXiv:2307.09288, equation 2; centering of Eisenstein et al., arXiv:2312.09244, equation 2; TRL 1.16, `RewardTrainer`.
/// The golden is `tests/goldens/reward`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RewardModel {
    /// c, at least 0; TRL recommends 0.01. Default: none, which is 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub center_rewards_coefficient: Option<f64>,
}

impl RewardModel {
    /// Returns one sentence for each value that is out of range.
    pub fn problems(&self) -> Vec<String> {
        let coefficient = self.center_rewards_coefficient.filter(|&c| !(c >= 0.0 && c.is_finite()));
        let problem = |c| format!("center_rewards_coefficient is {c}; it must be a finite number, 0 or above");
        coefficient.map(problem).into_iter().collect()
    }
}

impl Objective for RewardModel {
    fn count(&self, batch: &Batch) -> usize {
        batch.rows.len() / 2
    }

    fn of_scores(&self) -> Option<&dyn ScoreObjective> {
        Some(self)
    }

    /// # Panics
    /// Always: the loss is one of scores.
    fn loss(&self, _: &Batch, _: &LogProbValues, _: Option<&LogProbValues>, _: &StepTerms) -> BatchLoss {
        unreachable!("the loss of a reward model is one of scores")
    }
}

impl ScoreObjective for RewardModel {
    /// # Panics
    /// If the number of documents is odd.
    fn loss(&self, batch: &Batch, scores: &[f64]) -> (BatchLoss, Vec<f64>) {
        let (pairs, rest) = scores.as_chunks::<2>();
        assert!(rest.is_empty(), "documents come in pairs");
        let center = self.center_rewards_coefficient.unwrap_or(0.0);
        let mut loss = BatchLoss::default();
        let mut slopes = Vec::with_capacity(scores.len());
        for (pair, &[chosen, rejected]) in pairs.iter().enumerate() {
            let margin = batch.margins.get(pair).copied().unwrap_or(0.0);
            let difference = Dual::first(chosen) - Dual::second(rejected) - Dual::constant(margin);
            let preference = difference.ln_sigmoid();
            let sum = chosen + rejected;
            loss.sum += center * sum * sum - preference.value;
            slopes.extend(preference.slope.map(|slope| 2.0 * center * sum - slope));
            let metrics = [
                Metric::min("min_reward", chosen.min(rejected)),
                Metric::new("mean_reward", sum, 2),
                Metric::max("max_reward", chosen.max(rejected)),
                Metric::new("accuracy", f64::from(u8::from(chosen > rejected)), 1),
                Metric::new("margin", chosen - rejected, 1),
            ];
            Metric::add(&mut loss.metrics, metrics);
        }
        (loss, slopes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(pairs: usize, margins: Vec<f64>) -> Batch {
        let documents = (0..2 * pairs).map(|_| (&[1, 2][..], &[1, 2][..]));
        Batch { margins, ..Batch::from_rows(documents, 0) }
    }

    #[test]
    fn slopes_are_derivatives() {
        let objective = RewardModel { center_rewards_coefficient: Some(0.3) };
        let batch = batch(2, vec![0.5, -1.0]);
        let scores = [0.7, -0.2, -1.5, 2.0];
        let (loss, slopes) = ScoreObjective::loss(&objective, &batch, &scores);
        for (index, slope) in slopes.iter().enumerate() {
            let at = |step: f64| {
                let mut scores = scores;
                scores[index] += step;
                ScoreObjective::loss(&objective, &batch, &scores).0.sum
            };
            let numeric = (at(1e-5) - at(-1e-5)) / 2e-5;
            assert!((numeric - slope).abs() < 1e-8, "{index}: {numeric} {slope}");
        }
        // −ln σ(0.9 − 0.5) + 0.3·0.25 − ln σ(−3.5 + 1) + 0.3·0.25, by hand.
        assert!((loss.sum - (0.513_015_252_4 + 0.075 + 2.578_889_734_3 + 0.075)).abs() < 1e-9, "{}", loss.sum);
    }

    #[test]
    fn metrics_cover_both_answers() {
        let (loss, _) = ScoreObjective::loss(&RewardModel::default(), &batch(2, Vec::new()), &[1.0, 0.5, -1.0, 2.0]);
        let means = Metric::means(&loss.metrics);
        let expected =
            [("min_reward", -1.0), ("mean_reward", 0.625), ("max_reward", 2.0), ("accuracy", 0.5), ("margin", -1.25)];
        assert_eq!(means, expected);
    }

    #[test]
    fn bad_coefficients_are_refused() {
        let problems = RewardModel { center_rewards_coefficient: Some(-1.0) }.problems();
        assert_eq!(problems, ["center_rewards_coefficient is -1; it must be a finite number, 0 or above"]);
        assert!(RewardModel::default().problems().is_empty());
    }
}
