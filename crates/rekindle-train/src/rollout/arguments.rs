//! The arguments of rollouts, with the names of TRL's `GRPOConfig` and `RLOOConfig`.

use core::fmt;

use serde::de::{Deserializer, Error as _, Visitor};
use serde::{Deserialize, Serialize};

use crate::SftConfig;

/// The sampling of completions, and the number of steps that use them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RolloutArguments {
    /// Completions of each prompt in evaluations. Default: as in training.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub num_generations_eval: Option<usize>,
    /// The completions of this many forward and backward passes are sampled together. Default: those of one step
    /// (`gradient_accumulation_steps`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps_per_generation: Option<usize>,
    /// Completions that are sampled together; another way to set `steps_per_generation`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation_batch_size: Option<usize>,
    /// Passes over the completions that were sampled together. Default 1.
    pub num_iterations: usize,
    /// Draw from the smallest set of most likely tokens whose probabilities reach this sum. Default 1: all.
    pub top_p: f64,
    /// Draw from the k most likely tokens; 0 for all. Default 0.
    pub top_k: usize,
    /// Draw from tokens whose probability is at least this share of the most likely token's. Default: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_p: Option<f64>,
    /// The penalty on tokens that the prompt or the completion has already; 1 is none. Default 1.
    pub repetition_penalty: f64,
    /// If true, completions without an end token have no loss. Default false.
    pub mask_truncated_completions: bool,
    /// If true, prompts whose completions all have the same reward are replaced by further prompts (DAPO,
    /// arXiv:2503.14476). Default false.
    pub dynamic_sampling: bool,
    /// The maximum number of rounds of `dynamic_sampling`; after the last one, prompts without a signal take the remaining
    /// places. Default 10.
    pub max_num_gen_batches: usize,
    /// The maximum number of completions that are sampled at once, which the size of the key/value cache follows from.
    /// Default 64.
    pub max_sequences: usize,
}

impl Default for RolloutArguments {
    fn default() -> Self {
        Self {
            num_generations_eval: None,
            steps_per_generation: None,
            generation_batch_size: None,
            num_iterations: 1,
            top_p: 1.0,
            top_k: 0,
            min_p: None,
            repetition_penalty: 1.0,
            mask_truncated_completions: false,
            dynamic_sampling: false,
            max_num_gen_batches: 10,
            max_sequences: 64,
        }
    }
}

/// The advantages of GRPO: (r − mean) / (std + 1e-4) of the rewards r of a prompt's completions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GrpoAdvantages {
    /// Completions of each prompt, at least 2. Default 8.
    pub num_generations: usize,
    /// The rewards whose standard deviation advantages are divided by. Default group.
    pub scale_rewards: ScaleRewards,
    /// The order of summing several rewards and normalizing them. Default `sum_then_normalize`.
    pub multi_objective_aggregation: MultiObjectiveAggregation,
}

impl Default for GrpoAdvantages {
    fn default() -> Self {
        Self { num_generations: 8, scale_rewards: ScaleRewards::Group, multi_objective_aggregation: Default::default() }
    }
}

/// The advantages of REINFORCE leave-one-out: a reward minus the mean of the prompt's other completions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RlooAdvantages {
    /// Completions of each prompt, at least 2. Default 2.
    pub num_generations: usize,
    /// If true, advantages are normalized over the generation. Default false.
    pub normalize_advantages: bool,
    /// The least and the largest reward; others are clipped. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reward_clip_range: Option<[f64; 2]>,
}

impl Default for RlooAdvantages {
    fn default() -> Self {
        Self { num_generations: 2, normalize_advantages: false, reward_clip_range: None }
    }
}

/// The rewards whose standard deviation advantages are divided by. `true` is `group` and `false` is `none`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ScaleRewards {
    /// Those of the prompt's completions.
    #[default]
    Group,
    /// Those of all completions that were sampled together (arXiv:2508.08221).
    Batch,
    /// Advantages are not divided (Dr. GRPO, arXiv:2503.20783).
    None,
}

impl<'de> Deserialize<'de> for ScaleRewards {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Name;

        impl Visitor<'_> for Name {
            type Value = ScaleRewards;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("group, batch or none")
            }

            fn visit_bool<E: serde::de::Error>(self, is_scaled: bool) -> Result<ScaleRewards, E> {
                Ok(if is_scaled { ScaleRewards::Group } else { ScaleRewards::None })
            }

            fn visit_str<E: serde::de::Error>(self, name: &str) -> Result<ScaleRewards, E> {
                match name {
                    "group" => Ok(ScaleRewards::Group),
                    "batch" => Ok(ScaleRewards::Batch),
                    "none" => Ok(ScaleRewards::None),
                    other => Err(E::unknown_variant(other, &["group", "batch", "none"])),
                }
            }
        }

        deserializer.deserialize_any(Name).map_err(D::Error::custom)
    }
}

/// The order of summing several rewards and normalizing them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MultiObjectiveAggregation {
    /// The weighted sum is normalized.
    #[default]
    SumThenNormalize,
    /// Each reward is normalized over the prompt's completions, and their weighted sum over all completions (GDPO,
    /// arXiv:2601.05242). `scale_rewards` has no effect.
    NormalizeThenSum,
}

/// The rule of a method's advantages.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum AdvantageRule {
    Grpo(GrpoAdvantages),
    Rloo(RlooAdvantages),
}

/// The arguments of a run's rollouts with what follows from the others.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RolloutSettings {
    pub(crate) arguments: RolloutArguments,
    pub(crate) advantages: AdvantageRule,
    pub(crate) num_generations: usize,
    /// β; a reference model is needed if it is not 0.
    pub(crate) beta: f64,
    pub(crate) temperature: f64,
    pub(crate) max_completion_length: usize,
    /// Completions that are sampled together.
    pub(crate) rows: usize,
    /// Optimizer steps of one pass over them.
    pub(crate) steps: usize,
}

impl RolloutSettings {
    /// Returns true if steps need the log-probabilities of the model that sampled: its weights may have changed since.
    pub(crate) fn needs_old_log_probs(&self) -> bool {
        let is_in_reward = matches!(self.advantages, AdvantageRule::Rloo(_)) && self.beta != 0.0;
        self.steps * self.arguments.num_iterations > 1 || is_in_reward
    }

    /// Returns true if tokens are drawn from all of the vocabulary, without a change of logits but the temperature.
    pub(crate) fn samples_unchanged(&self) -> bool {
        self.arguments.samples_unchanged()
    }

    /// Returns the settings of an evaluation, whose completions are used once.
    pub(crate) fn for_evaluation(&self) -> Self {
        let num_generations = self.arguments.num_generations_eval.unwrap_or(self.num_generations);
        let arguments = RolloutArguments { num_iterations: 1, ..self.arguments.clone() };
        Self { arguments, num_generations, steps: 1, ..self.clone() }
    }

    /// Returns the pages of 16 tokens for sequences of at most `longest` tokens.
    pub(crate) fn pages(&self, longest: usize) -> usize {
        let at_once = self.arguments.max_sequences.min(self.rows).max(1);
        at_once * longest.div_ceil(rekindle_kernels::paged_attention::PAGE)
    }
}

impl RolloutArguments {
    /// Returns the number of rounds of sampling for a generation.
    pub(super) fn generation_rounds(&self) -> usize {
        if self.dynamic_sampling { self.max_num_gen_batches } else { 1 }
    }

    fn samples_unchanged(&self) -> bool {
        self.top_p == 1.0 && self.top_k == 0 && self.min_p.unwrap_or(0.0) == 0.0 && self.repetition_penalty == 1.0
    }

    /// Returns the number of completions that are sampled together.
    pub(crate) fn rows(&self, config: &SftConfig) -> usize {
        let passes = self.steps_per_generation.unwrap_or(config.gradient_accumulation_steps);
        self.generation_batch_size.unwrap_or_else(|| config.per_device_train_batch_size.saturating_mul(passes))
    }

    /// Returns one sentence for each value that is out of range or contradicts the others.
    pub(crate) fn problems(
        &self,
        config: &SftConfig,
        num_generations: usize,
        temperature: f64,
        corrects: bool,
    ) -> Vec<String> {
        let mut problems = Vec::new();
        if num_generations < 2 {
            problems.push(format!(
                "num_generations is {num_generations}; it must be at least 2, because an advantage compares a completion \
                 with the others of its prompt"
            ));
        }
        for (name, value) in [
            ("num_iterations", Some(self.num_iterations)),
            ("max_sequences", Some(self.max_sequences)),
            ("max_num_gen_batches", Some(self.max_num_gen_batches)),
            ("steps_per_generation", self.steps_per_generation),
            ("generation_batch_size", self.generation_batch_size),
            ("num_generations_eval", self.num_generations_eval),
        ] {
            if value == Some(0) {
                problems.push(format!("{name} is 0; it must be at least 1"));
            }
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            problems.push(format!("top_p is {}; it must be above 0 and at most 1", self.top_p));
        }
        if let Some(min_p) = self.min_p.filter(|min_p| !(0.0..=1.0).contains(min_p)) {
            problems.push(format!("min_p is {min_p}; it must be from 0 to 1"));
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            problems.push(format!("repetition_penalty is {}; it must be above 0", self.repetition_penalty));
        }
        if corrects && temperature != 1.0 && !self.samples_unchanged() {
            problems.push(
                "with a temperature other than 1, the sampler's log-probabilities before top_p, top_k, min_p and \
                 repetition_penalty are not known; remove these keys, or set importance_sampling_correction = false"
                    .to_owned(),
            );
        }
        if !problems.is_empty() {
            return problems;
        }
        problems.extend(self.size_problem(config, num_generations));
        problems
    }

    fn size_problem(&self, config: &SftConfig, num_generations: usize) -> Option<String> {
        if let (Some(size), Some(passes)) = (self.generation_batch_size, self.steps_per_generation) {
            return Some(format!(
                "generation_batch_size = {size} and steps_per_generation = {passes} set the same; remove one of them"
            ));
        }
        let (rows, per_step) = (self.rows(config), config.rows_per_step());
        let name = if self.generation_batch_size.is_some() {
            "generation_batch_size".to_owned()
        } else {
            let passes = self.steps_per_generation.map_or("gradient_accumulation_steps", |_| "steps_per_generation");
            format!("per_device_train_batch_size · {passes}")
        };
        if !rows.is_multiple_of(num_generations) {
            return Some(format!(
                "{name} is {rows}, the number of completions that are sampled together; it must be a multiple of \
                 num_generations = {num_generations}"
            ));
        }
        // A generation is used in whole steps.
        (per_step > 0 && !rows.is_multiple_of(per_step)).then(|| {
            format!(
                "{name} is {rows}, the number of completions that are sampled together; it must be a multiple of the \
                 {per_step} of a step (per_device_train_batch_size · gradient_accumulation_steps)"
            )
        })
    }
}

impl RlooAdvantages {
    /// Returns a sentence for a range that is empty.
    pub(crate) fn problem(&self) -> Option<String> {
        let [least, most] = self.reward_clip_range?;
        let is_range = least < most && least.is_finite() && most.is_finite();
        (!is_range).then(|| format!("reward_clip_range is [{least}, {most}]; the first must be below the second"))
    }
}
