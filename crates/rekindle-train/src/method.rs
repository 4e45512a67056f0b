//! The training method: supervised fine-tuning, a preference loss or a policy gradient, with its arguments.

use rekindle_data::{Dataset, RowTask};
use rekindle_models::objective::{Cpo, Dpo, Grpo, Kto, KtoLoss, Orpo, RewardModel, Rloo};
use rekindle_models::{CausalLm, Objective, Sft};
use serde::{Deserialize, Serialize};

use crate::rollout::{AdvantageRule, RolloutSettings};
use crate::{Error, GrpoAdvantages, RlooAdvantages, RolloutArguments, SftConfig};

/// The training method, `[train] method` of a run file, with the arguments of its loss.
///
/// A loss lives in one file of `rekindle-models/src/objective/`; a variant here gives it a name.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(tag = "method", rename_all = "lowercase")]
pub enum Method {
    /// Supervised fine-tuning.
    #[default]
    Sft,
    /// Direct preference optimization and its relatives, on pairs.
    Dpo(WithReference<Dpo>),
    /// Kahneman–Tversky optimization, on labelled answers.
    Kto(WithReference<Kto>),
    /// Odds ratio preference optimization, on pairs.
    Orpo(Orpo),
    /// Contrastive preference optimization and SimPO, on pairs.
    Cpo(Cpo),
    /// Group relative policy optimization and its relatives, on prompts.
    Grpo(Box<WithRollouts<Grpo, GrpoAdvantages>>),
    /// REINFORCE leave-one-out, on prompts.
    Rloo(Box<WithRollouts<Rloo, RlooAdvantages>>),
    /// A reward model, on pairs.
    Reward(RewardModel),
}

/// A loss of completions that the model samples.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WithRollouts<L, A> {
    /// The arguments of the loss.
    #[serde(flatten)]
    pub loss: L,
    /// The arguments of advantages.
    #[serde(flatten)]
    pub advantages: A,
    /// The arguments of sampling.
    #[serde(flatten)]
    pub rollouts: RolloutArguments,
}

/// A loss with a reference model: the model before training.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct WithReference<L> {
    /// The arguments of the loss.
    #[serde(flatten)]
    pub loss: L,
    /// The arguments of the reference model.
    #[serde(flatten)]
    pub reference: ReferenceArguments,
}

/// The arguments of a reference model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ReferenceArguments {
    /// If true, the log-probabilities of the reference model are computed before the first step, and kept in `output_dir`
    /// for resumed runs. If false, each step computes them with the adapter turned off. Default: false for a new adapter; true
    /// where the adapter turned off is not the model before training, because all weights are trained or the adapter was
    /// trained before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precompute_ref_log_probs: Option<bool>,
    /// If true, the reference model follows the model that is trained: every `ref_model_sync_steps` steps, its trained parameters
    /// become α · (those of the model) + (1 − α) · (its own) (TR-DPO, arXiv:2404.09656). Default false.
    #[serde(skip_serializing_if = "core::ops::Not::not")]
    pub sync_ref_model: bool,
    /// α of `sync_ref_model`, above 0 and at most 1. Default 0.6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ref_model_mixup_alpha: Option<f64>,
    /// The number of steps between two synchronizations. Default 512.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ref_model_sync_steps: Option<usize>,
}

impl From<Dpo> for Method {
    fn from(loss: Dpo) -> Self {
        Self::Dpo(WithReference { loss, reference: ReferenceArguments::default() })
    }
}

impl From<Kto> for Method {
    fn from(loss: Kto) -> Self {
        Self::Kto(WithReference { loss, reference: ReferenceArguments::default() })
    }
}

impl From<Orpo> for Method {
    fn from(loss: Orpo) -> Self {
        Self::Orpo(loss)
    }
}

impl From<RewardModel> for Method {
    fn from(loss: RewardModel) -> Self {
        Self::Reward(loss)
    }
}

impl From<Cpo> for Method {
    fn from(loss: Cpo) -> Self {
        Self::Cpo(loss)
    }
}

impl From<Grpo> for Method {
    fn from(loss: Grpo) -> Self {
        Self::Grpo(Box::new(WithRollouts { loss, ..WithRollouts::default() }))
    }
}

impl From<Rloo> for Method {
    fn from(loss: Rloo) -> Self {
        Self::Rloo(Box::new(WithRollouts { loss, ..WithRollouts::default() }))
    }
}

impl Method {
    /// The names of all methods in a run file. `ipo` is `dpo` and `simpo` is `cpo` with that `loss_type`.
    pub const NAMES: [&str; 10] = ["sft", "dpo", "ipo", "kto", "orpo", "cpo", "simpo", "grpo", "rloo", "reward"];

    /// Returns the name in a run file.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Dpo(_) => "dpo",
            Self::Kto(_) => "kto",
            Self::Orpo(_) => "orpo",
            Self::Cpo(_) => "cpo",
            Self::Grpo(_) => "grpo",
            Self::Rloo(_) => "rloo",
            Self::Reward(_) => "reward",
        }
    }

    /// Returns the kind of rows that it is trained on.
    pub fn task(&self) -> RowTask {
        match self {
            Self::Sft => RowTask::Sft,
            Self::Dpo(_) | Self::Orpo(_) | Self::Cpo(_) => RowTask::Pairs,
            Self::Kto(_) => RowTask::Labelled,
            Self::Grpo(_) | Self::Rloo(_) => RowTask::Prompts,
            Self::Reward(_) => RowTask::ScoredPairs,
        }
    }

    /// Returns the loss.
    pub fn objective(&self) -> Box<dyn Objective> {
        match self {
            Self::Sft => Box::new(Sft),
            Self::Dpo(dpo) => Box::new(dpo.loss.clone()),
            Self::Kto(kto) => Box::new(kto.loss.clone()),
            Self::Orpo(orpo) => Box::new(orpo.clone()),
            Self::Cpo(cpo) => Box::new(cpo.clone()),
            Self::Grpo(grpo) => Box::new(grpo.loss.clone()),
            Self::Rloo(rloo) => Box::new(rloo.loss.clone()),
            Self::Reward(reward) => Box::new(reward.clone()),
        }
    }

    /// Returns the arguments of the reference model, if there is one.
    pub fn reference(&self) -> Option<&ReferenceArguments> {
        match self {
            Self::Dpo(dpo) => Some(&dpo.reference),
            Self::Kto(kto) => Some(&kto.reference),
            Self::Sft | Self::Orpo(_) | Self::Cpo(_) | Self::Grpo(_) | Self::Rloo(_) | Self::Reward(_) => None,
        }
    }

    /// Returns true if the model samples the completions that it is trained on, which needs rewards.
    pub fn has_rollouts(&self) -> bool {
        matches!(self, Self::Grpo(_) | Self::Rloo(_))
    }

    /// Returns the most tokens of a sampled completion.
    pub fn max_completion_length(&self) -> Option<usize> {
        match self {
            Self::Grpo(grpo) => Some(grpo.loss.max_completion_length),
            Self::Rloo(rloo) => Some(rloo.loss.max_completion_length),
            _ => None,
        }
    }

    /// Returns the number of rows of steps that a row of the data becomes: those of each completion and pass.
    pub(crate) fn rows_per_prompt(&self) -> usize {
        let (generations, rollouts) = match self {
            Self::Grpo(grpo) => (grpo.advantages.num_generations, &grpo.rollouts),
            Self::Rloo(rloo) => (rloo.advantages.num_generations, &rloo.rollouts),
            _ => return 1,
        };
        generations * rollouts.num_iterations
    }

    /// Returns the settings of rollouts, if the method has them and they are valid.
    pub(crate) fn rollouts(&self, config: &SftConfig) -> Option<RolloutSettings> {
        let (advantages, num_generations, arguments, [beta, temperature]) = match self {
            Self::Grpo(grpo) => {
                let advantages = AdvantageRule::Grpo(grpo.advantages.clone());
                let numbers = [grpo.loss.beta, grpo.loss.temperature];
                (advantages, grpo.advantages.num_generations, &grpo.rollouts, numbers)
            }
            Self::Rloo(rloo) => {
                let advantages = AdvantageRule::Rloo(rloo.advantages.clone());
                let numbers = [rloo.loss.beta, rloo.loss.temperature];
                (advantages, rloo.advantages.num_generations, &rloo.rollouts, numbers)
            }
            _ => return None,
        };
        let rows = arguments.rows(config);
        Some(RolloutSettings {
            steps: rows / config.rows_per_step().max(1),
            arguments: arguments.clone(),
            advantages,
            num_generations,
            beta,
            temperature,
            max_completion_length: self.max_completion_length()?,
            rows,
        })
    }

    /// Returns true if the model is a reward model, whose head is a score.
    pub fn has_score_head(&self) -> bool {
        matches!(self, Self::Reward(_))
    }

    /// Returns true if the loss covers the prompts of chosen answers.
    pub(crate) fn covers_prompts(&self) -> bool {
        matches!(self, Self::Orpo(_))
    }

    /// Returns true if the loss compares answers with mismatched ones.
    pub(crate) fn needs_mismatched(&self) -> bool {
        matches!(self, Self::Kto(kto) if kto.loss.loss_type == KtoLoss::Kto)
    }

    /// Returns the peak learning rate, if none is set.
    pub(crate) fn default_learning_rate(&self, full_finetuning: bool) -> f64 {
        match (self, full_finetuning) {
            (Self::Sft, false) => 2e-4,
            (Self::Sft, true) => 2e-5,
            // TRL's default.
            (Self::Reward(_), _) => 1e-4,
            // TRL's default for all weights; an adapter takes ten times as much, as above.
            (_, false) => 1e-5,
            (_, true) => 1e-6,
        }
    }

    /// Returns one sentence for each value that is out of range or contradicts `config`.
    pub(crate) fn problems(&self, config: &SftConfig) -> Vec<String> {
        let mut problems = match self {
            Self::Sft => return Vec::new(),
            Self::Dpo(dpo) => dpo.loss.problems(),
            Self::Kto(kto) => kto.loss.problems(),
            Self::Orpo(orpo) => orpo.problems(),
            Self::Cpo(cpo) => cpo.problems(),
            Self::Grpo(grpo) => {
                let WithRollouts { loss, advantages, rollouts } = &**grpo;
                let corrects = loss.importance_sampling_correction;
                let mut problems = loss.problems();
                problems.extend(rollouts.problems(config, advantages.num_generations, loss.temperature, corrects));
                problems
            }
            Self::Rloo(rloo) => {
                let WithRollouts { loss, advantages, rollouts } = &**rloo;
                let mut problems = loss.problems();
                problems.extend(rollouts.problems(config, advantages.num_generations, loss.temperature, false));
                problems.extend(advantages.problem());
                problems
            }
            Self::Reward(reward) => reward.problems(),
        };
        problems.extend(self.reference().into_iter().flat_map(ReferenceArguments::problems));
        let name = self.name();
        if self.has_rollouts() {
            let refused = [
                (config.packing, "packing has no effect, because rows are completions of any length without padding"),
                (config.load_best_model_at_end, "load_best_model_at_end chooses by eval_loss, which does not fall"),
                (config.early_stopping_patience.is_some(), "early_stopping_patience waits for eval_loss to fall"),
                (
                    config.save_strategy == Some(crate::SaveStrategy::Best),
                    "save_strategy = \"best\" chooses by eval_loss, which does not fall",
                ),
            ];
            let refused = refused.into_iter().filter(|(is_set, _)| *is_set);
            problems.extend(refused.map(|(_, why)| format!("with method = \"{name}\", {why}; remove it")));
        }
        if config.neftune_noise_alpha.is_some() {
            problems.push(format!("neftune_noise_alpha is for method = \"sft\"; with \"{name}\" remove it"));
        }
        if self.has_score_head() && (config.eval_samples > 0 || !config.sample_prompts.is_empty()) {
            problems.push(
                "method \"reward\" trains a model that gives a score and writes no text; remove eval_samples and \
                 sample_prompts"
                    .to_owned(),
            );
        }
        if self.has_score_head() && config.router_aux_loss_coef > 0.0 {
            problems.push(
                "router_aux_loss_coef is not for method \"reward\": transformers' sequence classification has no auxiliary \
                 loss; remove it"
                    .to_owned(),
            );
        }
        if self.needs_mismatched() && config.rows_per_step() < 2 {
            problems.push(
                "method \"kto\" estimates KL from the answers to other rows of a step, so per_device_train_batch_size · \
                 gradient_accumulation_steps must be at least 2"
                    .to_owned(),
            );
        }
        problems
    }

    /// Refuses a reward model for other methods, and other models for method reward.
    pub(crate) fn check_model(&self, model: &CausalLm) -> Result<(), Error> {
        let problem = match (self.has_score_head(), model.has_score_head()) {
            (true, false) => "method \"reward\" needs a model with a score head; load it with `score_head`".to_owned(),
            (false, true) => format!(
                "the model is a reward model, which gives a score and no text; method \"{}\" cannot train it, use method = \
                 \"reward\"",
                self.name()
            ),
            _ => return Ok(()),
        };
        Err(Error::Config(vec![problem]))
    }

    /// Refuses rows of another kind, and labelled rows that are all desirable or all undesirable.
    pub(crate) fn check_rows(&self, train: &Dataset) -> Result<(), Error> {
        let refuse = |problem: String| Err(Error::Config(vec![problem]));
        if train.task() != self.task() {
            return refuse(format!(
                "the rows were encoded for another method than \"{}\"; set the same method for both",
                self.name()
            ));
        }
        if let Self::Kto(_) = self {
            let preferred = train.examples().filter(|example| example.preferred == Some(true)).count();
            if preferred == 0 || preferred == train.len() {
                let all = if preferred == 0 { "undesirable" } else { "desirable" };
                return refuse(format!(
                    "all {} answers are {all}; method \"kto\" needs desirable and undesirable ones",
                    train.len()
                ));
            }
        }
        Ok(())
    }

    /// Returns advice about the weights of desirable and undesirable answers that are far from balanced.
    ///
    /// Source: Ethayarajh et al., arXiv:2402.01306, equation 8: w_d·n_d / (w_u·n_u) from 1 to 4/3.
    pub(crate) fn balance_advice(&self, train: &Dataset) -> Option<String> {
        let Self::Kto(kto) = self else { return None };
        let desirable = train.examples().filter(|example| example.preferred == Some(true)).count();
        let undesirable = train.len() - desirable;
        let (n_d, n_u) = (desirable as f64, undesirable as f64);
        let Kto { desirable_weight: w_d, undesirable_weight: w_u, .. } = kto.loss;
        let ratio = w_d * n_d / (w_u * n_u);
        if n_d == n_u || (1.0..=1.33).contains(&ratio) {
            return None;
        }
        Some(format!(
            "{desirable} desirable and {undesirable} undesirable answers: the paper of KTO advises desirable_weight from \
             {:.2} to {:.2} with this undesirable_weight, or undesirable_weight from {:.2} to {:.2} with this \
             desirable_weight",
            w_u * n_u / n_d,
            1.33 * w_u * n_u / n_d,
            w_d * n_d / n_u / 1.33,
            w_d * n_d / n_u
        ))
    }
}
