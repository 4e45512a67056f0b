//! The training configuration, with the names of Hugging Face's `TrainingArguments`.

mod step_count;
mod timetable;
mod validate;

use rekindle_data::{Dataset, Packs};
use rekindle_kernels::{Group, Params};
use rekindle_models::GradientCheckpointing;
use serde::{Deserialize, Serialize, Serializer};

use crate::{Error, LrSchedulerKwargs, LrSchedulerType, Method, Optim, ReportTo, Schedule};

pub use step_count::StepCount;
pub use timetable::{EvalStrategy, SaveStrategy, Timetable};

/// The training configuration: batches, steps, learning rates, evaluation and checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
    /// The run's name, used as the title of its report and its model card. Default: the model's name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub run_name: Option<String>,
    /// The training method, with the arguments of its loss. In a run file, `method` and these arguments are keys beside the
    /// others. Default supervised fine-tuning.
    #[serde(skip)]
    pub method: Method,
    /// Rows of one forward and backward pass: examples, pairs, or completions that the model samples. Default 8.
    pub per_device_train_batch_size: usize,
    /// Rows of one pass in evaluation. Default 8.
    pub per_device_eval_batch_size: usize,
    /// Passes of one optimizer step. Default 1.
    pub gradient_accumulation_steps: usize,
    /// If true, a training row is as many examples as fit into `max_seq_length`, instead of one. Attention does not
    /// cross examples, so packing changes only the number of examples per step. Default false.
    pub packing: bool,
    /// Passes over the data, if `max_steps` is absent. Default 3.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "whole_or_not")]
    pub num_train_epochs: Option<f64>,
    /// Optimizer steps; overrides `num_train_epochs`. An epoch ends a step, so the last step of an epoch has the
    /// remaining rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// The peak learning rate. Default 2e-4 for adapters and 2e-5 when all weights are trained; 1e-5 and 1e-6 for
    /// preference losses and policy gradients.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// The peak learning rate of an embedding table and output layer, if they are trained. Default: `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_learning_rate: Option<f64>,
    /// The learning-rate schedule. Default linear.
    pub lr_scheduler_type: LrSchedulerType,
    /// Further parameters of the schedule.
    #[serde(skip_serializing_if = "LrSchedulerKwargs::is_empty")]
    pub lr_scheduler_kwargs: LrSchedulerKwargs,
    /// Steps of linear warm-up from 0, or a share of all steps. Default 0.
    pub warmup_steps: StepCount,
    /// Warm-up as a share of all steps: the older spelling of a `warmup_steps` below 1.
    #[serde(skip_serializing_if = "is_zero")]
    pub warmup_ratio: f64,
    /// The optimizer. Default AdamW.
    pub optim: Optim,
    /// Weight decay of matrices, decoupled from the gradient except for SGD. Default 0.01.
    pub weight_decay: f64,
    /// β₁ of AdamW and Lion. Default 0.9.
    pub adam_beta1: f64,
    /// β₂ of AdamW and Lion. Default 0.999.
    pub adam_beta2: f64,
    /// ε of AdamW. Default 1e-8.
    pub adam_epsilon: f64,
    /// Momentum of SGD. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// The maximum global gradient norm; 0 turns clipping off. Default 1.
    pub max_grad_norm: f64,
    /// Noise on the embeddings in training (NEFTune, arXiv:2310.05914): uniform within ± this / √(length · hidden_size)
    /// of each document. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neftune_noise_alpha: Option<f64>,
    /// The coefficient of the auxiliary loss that balances the experts of a mixture: the loss of a step adds this times
    /// [`aux_loss`](rekindle_models::CausalLm::set_router_aux_loss). Default 0: no auxiliary loss.
    #[serde(skip_serializing_if = "is_zero")]
    pub router_aux_loss_coef: f64,
    /// Gradient checkpointing. Default false: all activations are kept.
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// If true, each block's parameters are updated as soon as its gradients are complete, so that the gradients of all
    /// weights never exist at once (torchtune's name). Requires `full_finetuning` and `gradient_accumulation_steps =
    /// 1`; `max_grad_norm` then clips each block by its own norm. Default false.
    #[serde(skip_serializing_if = "core::ops::Not::not")]
    pub optimizer_in_bwd: bool,
    /// If true, several ranks divide the state of the optimizer: each updates 1/N of the trained parameters (ZeRO stage 1,
    /// arXiv:1910.02054). Default: true with `full_finetuning` in f32, false for adapters, whose state is small. Has no effect
    /// on a single rank.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shard_optimizer: Option<bool>,
    /// Steps between log lines, or a share of all steps. Default 1. The metrics file contains every step.
    pub logging_steps: StepCount,
    /// If true, the first step has a log line too. Default true.
    #[serde(skip_serializing_if = "is_true")]
    pub logging_first_step: bool,
    /// The times of evaluation. Default: every `eval_steps`, or once at the end without them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_strategy: Option<EvalStrategy>,
    /// Steps between evaluations, or a share of all steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_steps: Option<StepCount>,
    /// If true, the evaluation set is also evaluated before the first step. This evaluation is not a candidate for the
    /// best model. Default: true if there is an evaluation set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_on_start: Option<bool>,
    /// The times of checkpoints. Default: every `save_steps`, or never without them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_strategy: Option<SaveStrategy>,
    /// Steps between checkpoints, or a share of all steps, with a checkpoint at the end. Without it only the result is
    /// saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_steps: Option<StepCount>,
    /// Receivers of the metrics besides `metrics.jsonl` and `report.html`. Default TensorBoard, in files.
    pub report_to: ReportTo,
    /// Messages that the model answers at each evaluation, in its chat template if there is one. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sample_prompts: Vec<String>,
    /// Rows of the evaluation set, from the first on, whose prompts the model answers at each evaluation. Default 0,
    /// because each generated token takes a forward pass.
    pub eval_samples: usize,
    /// The maximum number of tokens of such an answer. Default 64.
    pub sample_max_new_tokens: usize,
    /// The maximum number of checkpoints; the oldest are removed first. The best one is kept with
    /// `load_best_model_at_end`. Default: no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_total_limit: Option<usize>,
    /// If true, the result is the model with the lowest evaluation loss, which is kept in a checkpoint, instead of the
    /// last one. Default false.
    pub load_best_model_at_end: bool,
    /// Consecutive evaluations without improvement after which the run ends. Default: no early stopping.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<usize>,
    /// The decrease of the evaluation loss that counts as an improvement. Default 0.
    pub early_stopping_threshold: f64,
}

/// Writes 3.0 as 3.
fn whole_or_not<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
    match *value {
        Some(value) if value.fract() == 0.0 && value.abs() < 9e15 => serializer.serialize_i64(value as i64),
        value => value.serialize(serializer),
    }
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(value: &f64) -> bool {
    *value == 0.0
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_true(value: &bool) -> bool {
    *value
}

/// The default of `num_train_epochs`, if `max_steps` is absent.
const EPOCHS: f64 = 3.0;

impl Default for SftConfig {
    fn default() -> Self {
        Self {
            run_name: None,
            method: Method::Sft,
            per_device_train_batch_size: 8,
            per_device_eval_batch_size: 8,
            gradient_accumulation_steps: 1,
            packing: false,
            num_train_epochs: None,
            max_steps: None,
            learning_rate: None,
            embedding_learning_rate: None,
            lr_scheduler_type: LrSchedulerType::Linear,
            lr_scheduler_kwargs: LrSchedulerKwargs::default(),
            warmup_steps: StepCount::Steps(0),
            warmup_ratio: 0.0,
            optim: Optim::Adamw,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            momentum: None,
            max_grad_norm: 1.0,
            neftune_noise_alpha: None,
            router_aux_loss_coef: 0.0,
            use_gradient_checkpointing: GradientCheckpointing::Off,
            optimizer_in_bwd: false,
            shard_optimizer: None,
            logging_steps: StepCount::Steps(1),
            logging_first_step: true,
            eval_strategy: None,
            eval_steps: None,
            eval_on_start: None,
            save_strategy: None,
            save_steps: None,
            report_to: ReportTo::default(),
            sample_prompts: Vec::new(),
            eval_samples: 0,
            sample_max_new_tokens: 64,
            save_total_limit: None,
            load_best_model_at_end: false,
            early_stopping_patience: None,
            early_stopping_threshold: 0.0,
        }
    }
}

impl SftConfig {
    /// Returns the learning-rate schedule over `total` steps with the peak `peak`.
    ///
    /// # Errors
    /// [`Error::Config`] if `lr_scheduler_kwargs` does not fit the schedule or the steps.
    pub fn schedule(&self, peak: f64, total: usize) -> Result<Schedule, Error> {
        let (kind, kwargs, warmup) = (self.lr_scheduler_type, &self.lr_scheduler_kwargs, self.warmup().of(total));
        Schedule::new(kind, kwargs, peak, warmup, total).map_err(Error::Config)
    }

    /// Refuses an `embedding_learning_rate` if no embedding is trained.
    pub(crate) fn check_embedding_rate(&self, params: &Params) -> Result<(), Error> {
        if self.embedding_learning_rate.is_none() || params.infos().iter().any(|info| info.group == Group::Embedding) {
            return Ok(());
        }
        let problem = "embedding_learning_rate needs an embedding table or output layer that is trained: \
                       modules_to_save = [\"embed_tokens\", \"lm_head\"], or full_finetuning";
        Err(Error::Config(vec![problem.to_owned()]))
    }

    /// Returns the rows that training takes from `dataset`: one example or one pair each, or as many as fit with `packing`.
    /// Both answers of a pair are always in one row; a packed row of pairs has twice `max_seq_length` tokens.
    pub fn rows(&self, dataset: &Dataset, max_seq_length: usize) -> Packs {
        let lengths: Vec<usize> = dataset.examples().map(|example| example.input_ids.len()).collect();
        match (dataset.task(), self.packing) {
            (task, true) if task.is_pairs() => {
                let pairs = lengths.chunks(2).map(|pair| pair.iter().sum());
                Packs::best_fit(pairs, 2 * max_seq_length).of_pairs()
            }
            (task, false) if task.is_pairs() => Packs::single(dataset.len() / 2).of_pairs(),
            (_, true) => Packs::best_fit(lengths, max_seq_length),
            (_, false) => Packs::single(dataset.len()),
        }
    }

    /// Returns the rows of one optimizer step.
    pub fn rows_per_step(&self) -> usize {
        self.per_device_train_batch_size * self.gradient_accumulation_steps
    }

    /// Returns the steps of a run over `rows` rows ([`rows`](Self::rows)), and the times of evaluations, checkpoints
    /// and log lines.
    pub fn timetable(&self, rows: usize) -> Timetable {
        Timetable::new(self, rows * self.method.rows_per_prompt())
    }

    /// Returns the number of passes over the data if `max_steps` is absent.
    pub fn epochs(&self) -> f64 {
        self.num_train_epochs.unwrap_or(EPOCHS)
    }

    /// Returns the steps of warm-up, from either key.
    pub fn warmup(&self) -> StepCount {
        if self.warmup_steps.is_zero() { StepCount::Share(self.warmup_ratio) } else { self.warmup_steps }
    }

    /// Returns the keys that need rows to evaluate, each with true if it is set.
    pub fn needs_eval(&self) -> [(bool, &'static str); 3] {
        [
            (self.eval_steps.is_some(), "eval_steps"),
            (matches!(self.eval_strategy, Some(EvalStrategy::Steps | EvalStrategy::Epoch)), "eval_strategy"),
            (self.eval_on_start == Some(true), "eval_on_start = true"),
        ]
    }

    /// Returns true if an evaluation set is evaluated before the first step.
    pub fn evaluates_on_start(&self) -> bool {
        self.eval_on_start.unwrap_or(self.eval_strategy != Some(EvalStrategy::No))
    }

    /// Fills in the defaults that depend on other keys, and keeps one of two equivalent keys: `max_steps` or
    /// `num_train_epochs`, and `warmup_steps` instead of `warmup_ratio`.
    pub fn resolve(&mut self, full_finetuning: bool, has_eval: bool) {
        match self.max_steps {
            Some(_) => self.num_train_epochs = None,
            None => self.num_train_epochs = Some(self.epochs()),
        }
        if self.warmup_ratio > 0.0 {
            self.warmup_steps = self.warmup();
            self.warmup_ratio = 0.0;
        }
        self.learning_rate = Some(self.resolved_learning_rate(full_finetuning));
        if has_eval {
            self.eval_on_start = Some(self.evaluates_on_start());
        }
    }

    /// Returns the peak learning rate.
    pub fn resolved_learning_rate(&self, full_finetuning: bool) -> f64 {
        self.learning_rate.unwrap_or_else(|| self.method.default_learning_rate(full_finetuning))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_key_is_left_where_two_say_the_same() {
        let mut config = SftConfig { warmup_ratio: 0.25, ..SftConfig::default() };
        config.resolve(true, true);
        assert_eq!((config.warmup_steps, config.warmup_ratio), (StepCount::Share(0.25), 0.0));
        assert_eq!(
            (config.num_train_epochs, config.learning_rate, config.eval_on_start),
            (Some(3.0), Some(2e-5), Some(true))
        );
        let json = serde_json::to_value(&config).unwrap();
        assert_eq!((&json["num_train_epochs"], json.get("warmup_ratio")), (&3.into(), None), "a whole number");
        let mut config = SftConfig { max_steps: Some(9), num_train_epochs: Some(2.0), ..SftConfig::default() };
        config.resolve(false, false);
        assert_eq!((config.num_train_epochs, config.learning_rate, config.eval_on_start), (None, Some(2e-4), None));
        let again = config.clone();
        config.resolve(false, false);
        assert_eq!(config, again);
    }

    #[test]
    fn an_embedding_learning_rate_is_for_something() {
        use rekindle_kernels::DType;
        use rekindle_kernels::{Device, ParamsBuilder};
        let given = SftConfig { embedding_learning_rate: Some(1e-5), ..SftConfig::default() };
        let mut builder = ParamsBuilder::new(&Device::cpu(), DType::F32);
        builder.push("q_proj.weight", &[1, 2], true, &[0.0; 2]);
        let params = builder.build();
        let text = given.check_embedding_rate(&params).unwrap_err().to_string();
        assert!(text.contains("modules_to_save"), "{text}");
        SftConfig::default().check_embedding_rate(&params).unwrap();
        let mut builder = ParamsBuilder::new(&Device::cpu(), DType::F32);
        builder.push_in(Group::Embedding, "lm_head.weight", &[1, 2], true, &[0.0; 2]);
        given.check_embedding_rate(&builder.build()).unwrap();
    }
}
