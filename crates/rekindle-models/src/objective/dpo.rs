//! Direct preference optimization and its relatives.

use std::collections::BTreeMap;

use rekindle_kernels::linear_cross_entropy::LogProbValues;
use serde::{Deserialize, Serialize};

use super::answers::{ScoredAnswer, answer_tokens, answers, pairs, pairs_per_chosen_token};
use super::dual::Dual;
use super::{BatchLoss, Objective, OneOrMany, StepPasses, StepTerms};
use crate::{Batch, Error};

/// Direct preference optimization: the mean over pairs of a function of the log-ratios
/// r = ln π(y) − ln π_ref(y) of the chosen and the rejected answer, with the names and formulas of TRL's `DPOConfig`.
///
/// ln π(y) is the sum of the log-probabilities of an answer's tokens. The reference model π_ref is the model before training:
/// the base model while an adapter is trained, or log-probabilities that were computed before ([`Batch::answers`]).
/// Documents 2i and 2i + 1 of a batch are the chosen and the rejected answer of pair i. [`DpoLoss`] lists the functions.
///
/// # Gradients
/// ∂L/∂ln π of both answers, which each of their tokens receives. The reference has none.
///
/// Source: Rafailov et al., arXiv:2305.18290, equation 7; TRL 1.16, `DPOTrainer`. The goldens are `tests/goldens/dpo` and
/// `tests/goldens/preferences`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Dpo {
    /// β, above 0: how strongly the model is held at the reference model. Default 0.1.
    pub beta: f64,
    /// The loss, or several to add. Default sigmoid.
    pub loss_type: OneOrMany<DpoLoss>,
    /// The weight of each loss. Default 1 each.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loss_weights: Option<Vec<f64>>,
    /// ε, the assumed share of swapped pairs: of `robust` and `aot` below 0.5, of `exo_pair` above 0. Default 0.
    pub label_smoothing: f64,
    /// The divergence from the reference model that the scores follow from. Default reverse KL: the scores are the
    /// log-ratios.
    pub f_divergence_type: Divergence,
    /// α of the divergence `alpha_divergence`. Default 0.5.
    pub f_alpha_divergence_coef: f64,
    /// The factor of the log-probabilities of tokens beyond the length of the pair's shorter answer, from 0 to 1 (LD-DPO,
    /// arXiv:2409.06411). Default: none, which is 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ld_alpha: Option<f64>,
    /// If true, the loss of a pair is multiplied by w(chosen)·w(rejected), where w is the geometric mean over an answer's tokens
    /// of p / Σ p² and has no gradient (WPO, arXiv:2406.11827, equation 2). Default false.
    pub use_weighting: bool,
    /// τ of `discopop`. Default 0.05.
    pub discopop_tau: f64,
}

/// A loss of a pair. With scores s (the log-ratios r, unless another [`Divergence`] is chosen), Δ = s_chosen − s_rejected,
/// lengths |c| and |r| in tokens, and the logistic function σ:
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    /// −ln σ(βΔ), arXiv:2305.18290.
    Sigmoid,
    /// −ln σ(β·(s_chosen / |c| − s_rejected / |r|)).
    SigmoidNorm,
    /// max(0, 1 − βΔ), arXiv:2309.06657.
    Hinge,
    /// (s_chosen / |c| − s_rejected / |r| − 1 / 2β)², arXiv:2310.12036.
    Ipo,
    /// σ(βΔ)·(ln σ(βΔ) − ln(1 − ε)) + σ(−βΔ)·(ln σ(−βΔ) − ln ε), arXiv:2402.00856.
    ExoPair,
    /// −ln σ(βr_chosen) − ½ ln σ(−βr_chosen) − ½ ln σ(−βr_rejected), arXiv:2402.05369.
    NcaPair,
    /// (−(1 − ε)·ln σ(βΔ) + ε·ln σ(−βΔ)) / (1 − 2ε), arXiv:2403.00409.
    Robust,
    /// −ln σ(βr_chosen) − ln σ(−βr_rejected), arXiv:2404.04656 without its running baseline.
    BcoPair,
    /// (r_chosen − ½ / β)² + (r_rejected + ½ / β)², arXiv:2405.00675.
    SppoHard,
    /// −(1 − ε)·ln σ(βδ) − ε·ln σ(−βδ), where δ is the difference of ln π(chosen) − ln π(rejected) and of the reference
    /// model's, each sorted over the pairs of a step, arXiv:2406.05882.
    Aot,
    /// As `aot`, where δ is the difference of r_chosen and r_rejected, each sorted over the pairs of a step.
    AotUnpaired,
    /// 1 − σ(βr_chosen) + σ(βr_rejected), arXiv:2408.06266, equation 7.
    ApoZero,
    /// σ(βr_chosen) + 1 − σ(β·(r_chosen − r_rejected)), arXiv:2408.06266, equation 8.
    ApoDown,
    /// −(1 − m)·ln σ(βΔ) + m·e^(−βΔ) with m = σ(βΔ / τ), arXiv:2406.08414.
    Discopop,
    /// The mean negative log-likelihood of the tokens of the chosen answers.
    Sft,
}

/// The divergence from the reference model that a score s(r) follows from, arXiv:2309.16240.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Divergence {
    /// s = r.
    #[default]
    ReverseKl,
    /// s = 1 − e^(−r).
    ForwardKl,
    /// s = ln 2 + ln σ(r).
    JsDivergence,
    /// s = (e^((α − 1)·r) − 1) / (α − 1).
    AlphaDivergence,
}

impl Default for Dpo {
    fn default() -> Self {
        Self {
            beta: 0.1,
            loss_type: DpoLoss::Sigmoid.into(),
            loss_weights: None,
            label_smoothing: 0.0,
            f_divergence_type: Divergence::default(),
            f_alpha_divergence_coef: 0.5,
            ld_alpha: None,
            use_weighting: false,
            discopop_tau: 0.05,
        }
    }
}

/// The log-probabilities of a pair: variables of the model, and numbers of the reference.
struct PairTerms {
    chosen: Dual,
    rejected: Dual,
    references: [f64; 2],
    lengths: [f64; 2],
}

impl Dpo {
    /// Returns one sentence for each value that is out of range.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = super::kto::beta_problems(self.beta);
        let has = |loss| self.loss_type.0.contains(&loss);
        if self.loss_type.0.is_empty() {
            problems.push("loss_type is an empty list; name at least one loss, such as \"sigmoid\"".to_owned());
        }
        if let Some(weights) = &self.loss_weights {
            if weights.len() != self.loss_type.0.len() {
                let losses = self.loss_type.0.len();
                problems.push(format!("loss_weights has {} values for {losses} of loss_type", weights.len()));
            }
            if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
                problems.push(format!("loss_weights holds {weight}; weights must be finite"));
            }
        }
        let epsilon = self.label_smoothing;
        if !(0.0..1.0).contains(&epsilon) {
            problems.push(format!("label_smoothing is {epsilon}; it must be at least 0 and below 1"));
        } else if has(DpoLoss::ExoPair) && epsilon == 0.0 {
            problems.push("loss_type \"exo_pair\" needs label_smoothing above 0; its paper recommends 1e-3".to_owned());
        } else if has(DpoLoss::Robust) && epsilon >= 0.5 {
            problems.push(format!("label_smoothing is {epsilon}; loss_type \"robust\" needs a value below 0.5"));
        }
        let smoothed = [DpoLoss::ExoPair, DpoLoss::Robust, DpoLoss::Aot, DpoLoss::AotUnpaired];
        if epsilon > 0.0 && !smoothed.iter().any(|loss| has(*loss)) {
            problems.push(
                "label_smoothing has an effect only with loss_type exo_pair, robust, aot or aot_unpaired; remove it, or \
                 use \"robust\""
                    .to_owned(),
            );
        }
        if let Some(alpha) = self.ld_alpha.filter(|alpha| !(0.0..=1.0).contains(alpha)) {
            problems.push(format!("ld_alpha is {alpha}; it must be from 0 to 1"));
        }
        if !(self.discopop_tau > 0.0 && self.discopop_tau.is_finite()) {
            problems.push(format!("discopop_tau is {}; it must be above 0", self.discopop_tau));
        }
        if !self.f_alpha_divergence_coef.is_finite() {
            problems.push(format!("f_alpha_divergence_coef is {}; it must be finite", self.f_alpha_divergence_coef));
        }
        if has(DpoLoss::Aot) && has(DpoLoss::AotUnpaired) {
            problems
                .push("loss_type holds both aot and aot_unpaired, which sort different values; keep one".to_owned());
        }
        let coupled = [DpoLoss::Aot, DpoLoss::AotUnpaired, DpoLoss::Sft];
        if self.use_weighting && coupled.iter().any(|loss| has(*loss)) {
            problems.push(
                "use_weighting = true gives each pair a weight, and loss_type aot, aot_unpaired and sft are not sums over \
                 pairs; remove one of both"
                    .to_owned(),
            );
        }
        // Only where the scores are subtracted does the unknown ln Z of a divergence cancel.
        let subtracted = |loss: &DpoLoss| {
            use DpoLoss::{Discopop, ExoPair, Hinge, Ipo, Robust, Sft, Sigmoid, SigmoidNorm};
            matches!(loss, Sigmoid | SigmoidNorm | Hinge | Ipo | ExoPair | Robust | Discopop | Sft)
        };
        if self.f_divergence_type != Divergence::ReverseKl && !self.loss_type.0.iter().all(subtracted) {
            problems.push(
                "f_divergence_type other than \"reverse_kl\" needs loss_type sigmoid, sigmoid_norm, hinge, ipo, exo_pair, \
                 robust, discopop or sft"
                    .to_owned(),
            );
        }
        problems
    }

    /// The losses with their weights.
    fn losses(&self) -> impl Iterator<Item = (DpoLoss, f64)> + '_ {
        let weight = |index: usize| self.loss_weights.as_ref().map_or(1.0, |weights| weights[index]);
        self.loss_type.0.iter().enumerate().map(move |(index, loss)| (*loss, weight(index)))
    }

    fn has(&self, loss: DpoLoss) -> bool {
        self.loss_type.0.contains(&loss)
    }

    /// s(r).
    fn score(&self, ratio: Dual) -> Dual {
        /// The largest exponent, as in TRL for f32.
        const MOST: f64 = 80.0;
        let alpha = self.f_alpha_divergence_coef - 1.0;
        match self.f_divergence_type {
            Divergence::ReverseKl => ratio,
            Divergence::ForwardKl => 1.0 - (-ratio).exp(),
            Divergence::JsDivergence => ratio.ln_sigmoid() + core::f64::consts::LN_2,
            // The limit of α → 1.
            Divergence::AlphaDivergence if alpha.abs() < 1e-6 => ratio,
            Divergence::AlphaDivergence => (1.0 / alpha) * ((alpha * ratio).at_most(MOST).exp() - 1.0),
        }
    }

    /// A loss of a pair that depends on no other pair.
    fn pair_loss(&self, loss: DpoLoss, pair: &PairTerms) -> Dual {
        let Self { beta, label_smoothing: epsilon, .. } = *self;
        let chosen = pair.chosen - pair.references[0];
        let rejected = pair.rejected - pair.references[1];
        let (better, worse) = (self.score(chosen), self.score(rejected));
        let logit = beta * (better - worse);
        let [chosen_tokens, rejected_tokens] = pair.lengths;
        let per_token = (1.0 / chosen_tokens) * better - (1.0 / rejected_tokens) * worse;
        match loss {
            DpoLoss::Sigmoid => -logit.ln_sigmoid(),
            DpoLoss::SigmoidNorm => -(beta * per_token).ln_sigmoid(),
            DpoLoss::Hinge => (1.0 - logit).relu(),
            DpoLoss::Ipo => (per_token - 0.5 / beta).square(),
            DpoLoss::ExoPair => {
                logit.sigmoid() * (logit.ln_sigmoid() - (-epsilon).ln_1p())
                    + (-logit).sigmoid() * ((-logit).ln_sigmoid() - epsilon.ln())
            }
            DpoLoss::NcaPair => {
                let reward = beta * chosen;
                -reward.ln_sigmoid() - 0.5 * (-reward).ln_sigmoid() - 0.5 * (beta * -rejected).ln_sigmoid()
            }
            DpoLoss::Robust => {
                let clean = -(1.0 - epsilon) * logit.ln_sigmoid() + epsilon * (-logit).ln_sigmoid();
                (1.0 / (1.0 - 2.0 * epsilon)) * clean
            }
            DpoLoss::BcoPair => -(beta * chosen).ln_sigmoid() - (beta * -rejected).ln_sigmoid(),
            DpoLoss::SppoHard => (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square(),
            DpoLoss::ApoZero => 1.0 - (beta * chosen).sigmoid() + (beta * rejected).sigmoid(),
            DpoLoss::ApoDown => (beta * chosen).sigmoid() + (1.0 - (beta * (chosen - rejected)).sigmoid()),
            DpoLoss::Discopop => {
                let mix = ((1.0 / self.discopop_tau) * logit).sigmoid();
                -logit.ln_sigmoid() * (1.0 - mix) + (-logit).exp() * mix
            }
            DpoLoss::Aot | DpoLoss::AotUnpaired | DpoLoss::Sft => unreachable!("computed over the step"),
        }
    }

    /// The weight of a pair.
    fn pair_weight(
        &self,
        batch: &Batch,
        pair: &[ScoredAnswer; 2],
        log_probs: &LogProbValues,
        terms: &StepTerms,
    ) -> f64 {
        if !self.use_weighting {
            return 1.0;
        }
        // ln p − ln Σ p² = ln(p² / Σ p²) − ln p.
        let of = |token: usize| f64::from(terms.sharpened[token]) - f64::from(log_probs.log_probs[token]);
        let mean = |answer: &ScoredAnswer| {
            answer_tokens(batch, answer.document.clone()).map(of).sum::<f64>() / answer.tokens.max(1) as f64
        };
        pair.iter().map(mean).sum::<f64>().exp()
    }

    /// The loss of a difference of sorted values.
    fn sorted_loss(&self, difference: Dual) -> Dual {
        let (logit, epsilon) = (self.beta * difference, self.label_smoothing);
        -(1.0 - epsilon) * logit.ln_sigmoid() - epsilon * (-logit).ln_sigmoid()
    }

    /// The loss of a pair whose values are compared with those of other pairs after sorting.
    fn transported_loss(&self, loss: DpoLoss, [chosen, rejected]: &[ScoredAnswer; 2], terms: &StepTerms) -> Dual {
        let partner = |answer: &ScoredAnswer| terms.partners[&answer.row];
        if loss == DpoLoss::Aot {
            let difference = Dual::first(chosen.log_prob) - Dual::second(rejected.log_prob);
            return self.sorted_loss(difference - partner(chosen));
        }
        // The loss is counted once, with the chosen answer; the derivative of the rejected answer is that of its own place.
        let of_chosen = self.sorted_loss(Dual::first(chosen.log_ratio()) - partner(chosen));
        let of_rejected = self.sorted_loss(partner(rejected) - Dual::second(rejected.log_ratio()));
        Dual { value: of_chosen.value, slope: [of_chosen.slope[0], of_rejected.slope[1]] }
    }

    /// The values that `aot` or `aot_unpaired` compares each row of the step with.
    fn partners(&self, step: &StepPasses<'_>) -> Result<BTreeMap<u32, f64>, Error> {
        let mut scored = Vec::new();
        for batch in step.batches {
            let reference = step.reference(self, batch)?;
            scored.extend(answers(batch, &step.log_probs(batch)?, reference.as_ref(), self.ld_alpha));
        }
        let pairs = pairs(&scored);
        let sorted = |value: fn(&[ScoredAnswer; 2]) -> f64, row: usize| {
            let mut all: Vec<(u32, f64)> = pairs.iter().map(|pair| (pair[row].row, value(pair))).collect();
            all.sort_by(|a, b| a.1.total_cmp(&b.1));
            all
        };
        if self.has(DpoLoss::Aot) {
            let of_model = sorted(|[chosen, rejected]| chosen.log_prob - rejected.log_prob, 0);
            let of_reference = sorted(|[chosen, rejected]| chosen.reference - rejected.reference, 0);
            return Ok(of_model.iter().zip(&of_reference).map(|((row, _), (_, value))| (*row, *value)).collect());
        }
        let chosen = sorted(|[chosen, _]| chosen.log_ratio(), 0);
        let rejected = sorted(|[_, rejected]| rejected.log_ratio(), 1);
        let both = chosen.iter().zip(&rejected);
        Ok(both.flat_map(|(chosen, rejected)| [(chosen.0, rejected.1), (rejected.0, chosen.1)]).collect())
    }
}

impl Objective for Dpo {
    fn count(&self, batch: &Batch) -> usize {
        batch.rows.len() / 2
    }

    fn needs_reference(&self) -> bool {
        true
    }

    fn needs_sharpened(&self) -> bool {
        self.use_weighting
    }

    fn answer_log_probs(&self, batch: &Batch, log_probs: &LogProbValues) -> Vec<f64> {
        answers(batch, log_probs, None, self.ld_alpha).iter().map(|answer| answer.log_prob).collect()
    }

    fn step_terms(&self, step: &StepPasses<'_>) -> Result<StepTerms, Error> {
        let mut terms = StepTerms { per_token: pairs_per_chosen_token(step.batches), ..StepTerms::default() };
        if self.has(DpoLoss::Aot) || self.has(DpoLoss::AotUnpaired) {
            terms.partners = self.partners(step)?;
        }
        Ok(terms)
    }

    /// # Panics
    /// If the number of documents is odd.
    fn loss(
        &self,
        batch: &Batch,
        log_probs: &LogProbValues,
        reference: Option<&LogProbValues>,
        terms: &StepTerms,
    ) -> BatchLoss {
        let answers = answers(batch, log_probs, reference, self.ld_alpha);
        let mut result = BatchLoss::zero(batch);
        for pair in pairs(&answers) {
            let [chosen, rejected] = pair;
            let values = PairTerms {
                chosen: Dual::first(chosen.log_prob),
                rejected: Dual::second(rejected.log_prob),
                references: [chosen.reference, rejected.reference],
                lengths: [chosen, rejected].map(|answer| answer.tokens.max(1) as f64),
            };
            let of_pair = self.pair_weight(batch, pair, log_probs, terms);
            for (loss, weight) in self.losses() {
                let weight = weight * of_pair;
                let pair_loss = match loss {
                    DpoLoss::Sft => {
                        result.add_nll(batch, chosen.document.clone(), log_probs, weight * terms.per_token);
                        continue;
                    }
                    DpoLoss::Aot | DpoLoss::AotUnpaired => self.transported_loss(loss, pair, terms),
                    _ => self.pair_loss(loss, &values),
                };
                result.sum += weight * pair_loss.value;
                result.add_slope(batch, chosen, weight * pair_loss.slope[0]);
                result.add_slope(batch, rejected, weight * pair_loss.slope[1]);
            }
            let rewards = [chosen, rejected].map(|answer| self.beta * answer.log_ratio());
            result.add_pair_metrics(rewards, [chosen.log_prob, rejected.log_prob]);
            result.add_accuracy(batch, chosen, log_probs);
        }
        result.add_entropy(batch, log_probs);
        result
    }
}
