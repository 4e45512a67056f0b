//! Odds ratio preference optimization: preferences without a reference model.

use rekindle_kernels::linear_cross_entropy::LogProbValues;
use serde::{Deserialize, Serialize};

use super::answers::{answers, pairs, pairs_per_chosen_token};
use super::dual::Dual;
use super::{BatchLoss, Metric, Objective, StepPasses, StepTerms};
use crate::{Batch, Error};

/// Odds ratio preference optimization: L = NLL − β · mean over pairs of ln σ(ln odds(chosen) − ln odds(rejected)).
///
/// odds(y) = p / (1 − p), where ln p is the mean log-probability of the answer's tokens. NLL is the mean negative
/// log-likelihood of all tokens of the chosen documents, prompts included ([`Batch::prompt_targets`]). Documents 2i and 2i + 1
/// of a batch are the chosen and the rejected answer of pair i.
///
/// # Gradients
/// ∂L/∂ln p of both answers, divided by their lengths, and those of the NLL. There is no reference model.
///
/// Source: Hong et al., arXiv:2403.07691, equations 4 to 7; TRL 1.16, `ORPOTrainer`. The golden is
/// `tests/goldens/preferences`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Orpo {
    /// β, above 0: the weight of the odds ratio (λ in the paper). Default 0.1.
    pub beta: f64,
}

impl Default for Orpo {
    fn default() -> Self {
        Self { beta: 0.1 }
    }
}

impl Orpo {
    /// Returns one sentence for each value that is out of range.
    pub fn problems(&self) -> Vec<String> {
        super::kto::beta_problems(self.beta)
    }
}

impl Objective for Orpo {
    fn count(&self, batch: &Batch) -> usize {
        batch.rows.len() / 2
    }

    fn step_terms(&self, step: &StepPasses<'_>) -> Result<StepTerms, Error> {
        Ok(StepTerms { per_token: pairs_per_chosen_token(step.batches), ..StepTerms::default() })
    }

    /// # Panics
    /// If the number of documents is odd.
    fn loss(
        &self,
        batch: &Batch,
        log_probs: &LogProbValues,
        _: Option<&LogProbValues>,
        terms: &StepTerms,
    ) -> BatchLoss {
        let answers = answers(batch, log_probs, None, None);
        let mut result = BatchLoss::zero(batch);
        for [chosen, rejected] in pairs(&answers) {
            let nll = result.add_nll(batch, chosen.document.clone(), log_probs, terms.per_token);
            let targets = chosen.document.clone().filter(|&token| batch.targets[token] != crate::IGNORED).count();
            let [better, worse] = [chosen, rejected].map(|answer| answer.log_prob / answer.tokens.max(1) as f64);
            let ln_odds = |ln_p: Dual| ln_p - ln_p.ln_1m_exp();
            let log_odds = ln_odds(Dual::first(better)) - ln_odds(Dual::second(worse));
            let ratio = log_odds.ln_sigmoid();
            result.sum -= self.beta * ratio.value;
            for (answer, slope) in [chosen, rejected].into_iter().zip(ratio.slope) {
                result.add_slope(batch, answer, -self.beta * slope / answer.tokens.max(1) as f64);
            }
            result.add_pair_metrics([self.beta * better, self.beta * worse], [better, worse]);
            let metrics = [
                Metric::new("nll_loss", nll, targets),
                Metric::new("log_odds_ratio", ratio.value, 1),
                Metric::new("log_odds_chosen", log_odds.value, 1),
            ];
            Metric::add(&mut result.metrics, metrics);
        }
        result.add_entropy(batch, log_probs);
        result
    }
}
