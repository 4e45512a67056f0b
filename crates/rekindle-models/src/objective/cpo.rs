//! Contrastive preference optimization, SimPO and AlphaPO: preferences without a reference model.

use rekindle_kernels::linear_cross_entropy::LogProbValues;
use serde::{Deserialize, Serialize};

use super::answers::{answers, pairs, pairs_per_chosen_token};
use super::dual::Dual;
use super::{BatchLoss, Metric, Objective, StepPasses, StepTerms};
use crate::{Batch, Error};

/// Contrastive preference optimization: the mean over pairs of a function of Δ = s_chosen − s_rejected, plus `cpo_alpha` times
/// the mean negative log-likelihood of the tokens of the chosen answers.
///
/// s is an answer's log-probability: the sum over its tokens, and their mean for `simpo` and `ipo`. [`CpoLoss`] lists the
/// functions. With α = `alphapo_alpha` ≠ 0, s is replaced by (1 − e^(−αs)) / α (AlphaPO, arXiv:2501.03884). Documents 2i and 2i + 1 of a
/// batch are the chosen and the rejected answer of pair i.
///
/// # Gradients
/// ∂L/∂s of both answers, and those of the likelihood. There is no reference model.
///
/// Source: Xu et al., arXiv:2401.08417; Meng et al., arXiv:2405.14734 (SimPO); TRL 1.16, `CPOTrainer`. The golden is
/// `tests/goldens/preferences`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Cpo {
    /// β, above 0: the scale of Δ. Default 0.1; SimPO's paper uses 2 to 2.5.
    pub beta: f64,
    /// The loss. Default sigmoid.
    pub loss_type: CpoLoss,
    /// ε, the assumed share of swapped pairs, of `sigmoid` and `simpo`. Default 0.
    pub label_smoothing: f64,
    /// The weight of the negative log-likelihood of the chosen answers. Default 1; 0 for SimPO.
    pub cpo_alpha: f64,
    /// γ, the margin of `simpo`. Default 0.5.
    pub simpo_gamma: f64,
    /// AlphaPO's α, `alpha` in TRL; 0 leaves log-probabilities as they are. Default 0.
    pub alphapo_alpha: f64,
}

/// A loss of a pair.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CpoLoss {
    /// −(1 − ε)·ln σ(βΔ) − ε·ln σ(−βΔ).
    #[default]
    Sigmoid,
    /// max(0, 1 − βΔ).
    Hinge,
    /// (Δ − 1 / 2β)² on means over tokens.
    Ipo,
    /// As `sigmoid` with βΔ − γ, on means over tokens.
    Simpo,
}

impl Default for Cpo {
    fn default() -> Self {
        Self {
            beta: 0.1,
            loss_type: CpoLoss::Sigmoid,
            label_smoothing: 0.0,
            cpo_alpha: 1.0,
            simpo_gamma: 0.5,
            alphapo_alpha: 0.0,
        }
    }
}

impl Cpo {
    /// Returns SimPO: the loss `simpo` without the likelihood of the chosen answers.
    pub fn simpo() -> Self {
        Self { loss_type: CpoLoss::Simpo, cpo_alpha: 0.0, ..Self::default() }
    }

    /// Returns one sentence for each value that is out of range.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = super::kto::beta_problems(self.beta);
        let epsilon = self.label_smoothing;
        if !(0.0..1.0).contains(&epsilon) {
            problems.push(format!("label_smoothing is {epsilon}; it must be at least 0 and below 1"));
        } else if epsilon > 0.0 && matches!(self.loss_type, CpoLoss::Hinge | CpoLoss::Ipo) {
            problems.push("label_smoothing has an effect only with loss_type sigmoid and simpo; remove it".to_owned());
        }
        for (name, value) in [("cpo_alpha", self.cpo_alpha), ("simpo_gamma", self.simpo_gamma)] {
            if !(value.is_finite() && value >= 0.0) {
                problems.push(format!("{name} is {value}; it must be at least 0"));
            }
        }
        if !self.alphapo_alpha.is_finite() {
            problems.push(format!("alphapo_alpha is {}; it must be finite", self.alphapo_alpha));
        }
        problems
    }

    /// An answer's reward, without β.
    fn reward(&self, log_prob: Dual) -> Dual {
        if self.alphapo_alpha == 0.0 {
            log_prob
        } else {
            (1.0 / self.alphapo_alpha) * (1.0 - (-self.alphapo_alpha * log_prob).exp())
        }
    }

    fn pair_loss(&self, difference: Dual) -> Dual {
        let margin = if self.loss_type == CpoLoss::Simpo { self.simpo_gamma } else { 0.0 };
        let (logit, epsilon) = (self.beta * difference - margin, self.label_smoothing);
        match self.loss_type {
            CpoLoss::Sigmoid | CpoLoss::Simpo => {
                -(1.0 - epsilon) * logit.ln_sigmoid() - epsilon * (-logit).ln_sigmoid()
            }
            CpoLoss::Hinge => (1.0 - logit).relu(),
            CpoLoss::Ipo => (difference - 0.5 / self.beta).square(),
        }
    }
}

impl Objective for Cpo {
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
            if self.cpo_alpha > 0.0 {
                let weight = self.cpo_alpha * terms.per_token;
                let nll = result.add_nll(batch, chosen.document.clone(), log_probs, weight);
                Metric::add(&mut result.metrics, [Metric::new("nll_loss", nll, chosen.tokens)]);
            }
            let is_mean = matches!(self.loss_type, CpoLoss::Ipo | CpoLoss::Simpo);
            let lengths = [chosen, rejected].map(|answer| if is_mean { answer.tokens.max(1) as f64 } else { 1.0 });
            let log_probs = [chosen.log_prob / lengths[0], rejected.log_prob / lengths[1]];
            let better = self.reward(Dual::first(log_probs[0]));
            let worse = self.reward(Dual::second(log_probs[1]));
            let loss = self.pair_loss(better - worse);
            result.sum += loss.value;
            result.add_slope(batch, chosen, loss.slope[0] / lengths[0]);
            result.add_slope(batch, rejected, loss.slope[1] / lengths[1]);
            result.add_pair_metrics([self.beta * better.value, self.beta * worse.value], log_probs);
        }
        result.add_entropy(batch, log_probs);
        result
    }
}
