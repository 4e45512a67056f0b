//! The numbers of a run, under the names of Hugging Face's `TrainingArguments`.

use rekindle_data::{Dataset, Packs};
use rekindle_kernels::{Group, Params};
use serde::{Deserialize, Serialize};

use crate::{Error, LrSchedulerKwargs, LrSchedulerType, Optim, ReportTo, Schedule};

/// How a run trains. `deny_unknown_fields`: a misspelt key is an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SftConfig {
    /// Rows of one forward and backward pass. Default 8.
    pub per_device_train_batch_size: usize,
    /// Rows of one pass in evaluation. Default 8.
    pub per_device_eval_batch_size: usize,
    /// Passes of one optimizer step. Default 1.
    pub gradient_accumulation_steps: usize,
    /// Whether a row of training is as many examples as fit into `max_seq_length`, instead of one. They never see each
    /// other, so this changes how many examples a step takes, and nothing of what is learned from one. Default false.
    pub packing: bool,
    /// Passes over the data, when `max_steps` is absent. Default 3.
    pub num_train_epochs: f64,
    /// Optimizer steps; overrides `num_train_epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// The schedule's peak. Default 2e-4 for adapters, 2e-5 when all weights are trained.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub learning_rate: Option<f64>,
    /// The peak for an embedding table and output layer that are trained: by `modules_to_save`, or as all weights are.
    /// Default: `learning_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_learning_rate: Option<f64>,
    /// How the learning rate moves. Default linear.
    pub lr_scheduler_type: LrSchedulerType,
    /// What the schedule takes besides.
    #[serde(skip_serializing_if = "LrSchedulerKwargs::is_empty")]
    pub lr_scheduler_kwargs: LrSchedulerKwargs,
    /// Steps of linear warm-up from 0. Default 0.
    pub warmup_steps: usize,
    /// Warm-up as a share of all steps, when `warmup_steps` is 0. Default 0.
    pub warmup_ratio: f64,
    /// The optimizer. Default AdamW.
    pub optim: Optim,
    /// Weight decay, on matrices only; decoupled from the gradient, but for SGD. Default 0.01.
    pub weight_decay: f64,
    /// Of AdamW and Lion. Default 0.9.
    pub adam_beta1: f64,
    /// Of AdamW and Lion. Default 0.999.
    pub adam_beta2: f64,
    /// Of AdamW. Default 1e-8.
    pub adam_epsilon: f64,
    /// Of SGD. Default 0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// The global gradient norm is clipped to this; 0 turns clipping off. Default 1.
    pub max_grad_norm: f64,
    /// Noise on the embeddings in training (NEFTune, arXiv:2310.05914): uniform within ± this / √(length · hidden_size) of
    /// each document. Default: none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub neftune_noise_alpha: Option<f64>,
    /// Whether parameters move in the backward, block by block, so that the gradients of all weights never exist at once
    /// (torchtune's name). For `full_finetuning` with `gradient_accumulation_steps = 1`; `max_grad_norm` then clips each
    /// block by its own norm. Default false.
    #[serde(skip_serializing_if = "core::ops::Not::not")]
    pub optimizer_in_bwd: bool,
    /// Steps between log lines. Default 1. The metrics file has every step.
    pub logging_steps: usize,
    /// Steps between evaluations; without it the evaluation set is looked at once, at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eval_steps: Option<usize>,
    /// Steps between saves into `checkpoint-N`, with one at the end; without it only the result is saved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_steps: Option<usize>,
    /// Who is told the numbers beside `metrics.jsonl` and `report.html`. Default TensorBoard, in files.
    pub report_to: ReportTo,
    /// Messages that the model answers at each evaluation, put into its chat template if there is one. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sample_prompts: Vec<String>,
    /// How many of the evaluation set's rows, from the first on, lend their prompts to be answered at each evaluation.
    /// Default 0: answers take time, a pass through the model for every token.
    pub eval_samples: usize,
    /// The most tokens of such an answer. Default 64.
    pub sample_max_new_tokens: usize,
    /// How many checkpoints stay, the oldest going first; the best one stays with `load_best_model_at_end`. Default all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save_total_limit: Option<usize>,
    /// Whether the result is the model at its lowest evaluation loss, which is then kept in a checkpoint, instead of the
    /// last one. Default false.
    pub load_best_model_at_end: bool,
    /// The run ends after so many evaluations in a row that were not better than the best before them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub early_stopping_patience: Option<usize>,
    /// By how much the evaluation loss must fall to count as better for that. Default 0.
    pub early_stopping_threshold: f64,
}

impl Default for SftConfig {
    fn default() -> Self {
        Self {
            per_device_train_batch_size: 8,
            per_device_eval_batch_size: 8,
            gradient_accumulation_steps: 1,
            packing: false,
            num_train_epochs: 3.0,
            max_steps: None,
            learning_rate: None,
            embedding_learning_rate: None,
            lr_scheduler_type: LrSchedulerType::Linear,
            lr_scheduler_kwargs: LrSchedulerKwargs::default(),
            warmup_steps: 0,
            warmup_ratio: 0.0,
            optim: Optim::Adamw,
            weight_decay: 0.01,
            adam_beta1: 0.9,
            adam_beta2: 0.999,
            adam_epsilon: 1e-8,
            momentum: None,
            max_grad_norm: 1.0,
            neftune_noise_alpha: None,
            optimizer_in_bwd: false,
            logging_steps: 1,
            eval_steps: None,
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
    /// Checks every number.
    ///
    /// # Errors
    /// [`Error::Config`] with one sentence for each that is out of range.
    pub fn validate(&self) -> Result<(), Error> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, name: &str, value: &dyn core::fmt::Display, range: &str| {
            if !ok {
                problems.push(format!("{name} is {value}; it must be {range}"));
            }
        };
        let positive = "at least 1";
        for (name, value) in [
            ("per_device_train_batch_size", self.per_device_train_batch_size),
            ("per_device_eval_batch_size", self.per_device_eval_batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("logging_steps", self.logging_steps),
            ("sample_max_new_tokens", self.sample_max_new_tokens),
        ] {
            check(value > 0, name, &value, positive);
        }
        for (name, value) in [
            ("max_steps", self.max_steps),
            ("eval_steps", self.eval_steps),
            ("save_steps", self.save_steps),
            ("save_total_limit", self.save_total_limit),
            ("early_stopping_patience", self.early_stopping_patience),
        ] {
            check(value != Some(0), name, &0, positive);
        }
        let epochs = self.num_train_epochs;
        check(epochs.is_finite() && epochs > 0.0, "num_train_epochs", &epochs, "above 0");
        for (name, rate) in
            [("learning_rate", self.learning_rate), ("embedding_learning_rate", self.embedding_learning_rate)]
        {
            let rate = rate.unwrap_or(0.0);
            check(rate.is_finite() && rate >= 0.0, name, &rate, "at least 0");
        }
        let alpha = self.neftune_noise_alpha.unwrap_or(1.0);
        check(alpha.is_finite() && alpha > 0.0, "neftune_noise_alpha", &alpha, "above 0");
        for (name, value) in [
            ("adam_beta1", self.adam_beta1),
            ("adam_beta2", self.adam_beta2),
            ("momentum", self.momentum.unwrap_or(0.0)),
            ("warmup_ratio", self.warmup_ratio),
        ] {
            check((0.0..1.0).contains(&value), name, &value, "at least 0 and below 1");
        }
        for (name, value) in [
            ("weight_decay", self.weight_decay),
            ("adam_epsilon", self.adam_epsilon),
            ("max_grad_norm", self.max_grad_norm),
            ("early_stopping_threshold", self.early_stopping_threshold),
        ] {
            check(value.is_finite() && value >= 0.0, name, &value, "at least 0");
        }
        let rows = self.per_device_train_batch_size.checked_mul(self.gradient_accumulation_steps);
        if rows.is_none_or(|rows| rows > u32::MAX as usize) {
            problems.push("per_device_train_batch_size · gradient_accumulation_steps is beyond 2³²".to_owned());
        }
        if self.early_stopping_threshold > 0.0 && self.early_stopping_patience.is_none() {
            problems.push("early_stopping_threshold needs early_stopping_patience".to_owned());
        }
        for (wanted, name) in [
            (self.early_stopping_patience.is_some(), "early_stopping_patience"),
            (self.load_best_model_at_end, "load_best_model_at_end"),
        ] {
            if wanted && self.eval_steps.is_none() {
                problems.push(format!("{name} needs eval_steps: the evaluation set is looked at once otherwise"));
            }
        }
        if self.save_total_limit.is_some() && self.save_steps.is_none() && !self.load_best_model_at_end {
            problems.push("save_total_limit needs save_steps or load_best_model_at_end".to_owned());
        }
        if self.optimizer_in_bwd && self.gradient_accumulation_steps > 1 {
            problems.push(format!(
                "gradient_accumulation_steps is {}, and optimizer_in_bwd = true has no gradients to accumulate in; put the \
                 rows into one batch, per_device_train_batch_size = {}, with use_gradient_checkpointing where memory is short",
                self.gradient_accumulation_steps,
                self.per_device_train_batch_size.saturating_mul(self.gradient_accumulation_steps)
            ));
        }
        let warmup = self.warmup_steps > 0 || self.warmup_ratio > 0.0;
        if warmup && self.lr_scheduler_type == LrSchedulerType::Constant {
            problems.push(
                "lr_scheduler_type = \"constant\" has no warm-up; write \"constant_with_warmup\", or leave \
                 warmup_steps and warmup_ratio out"
                    .to_owned(),
            );
        }
        problems.extend(self.optim.ignored(self));
        // Whether the steps are enough shows when they are known.
        let (kind, kwargs) = (self.lr_scheduler_type, &self.lr_scheduler_kwargs);
        if let Err(more) = Schedule::new(kind, kwargs, self.learning_rate.unwrap_or(f64::MAX), 0, 1 << 40) {
            problems.extend(more);
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Config(problems)) }
    }

    /// How the learning rate moves over `total` steps to and from the peak `peak`.
    ///
    /// # Errors
    /// [`Error::Config`] when `lr_scheduler_kwargs` does not fit the schedule or the steps.
    pub fn schedule(&self, peak: f64, total: usize) -> Result<Schedule, Error> {
        let (kind, kwargs, warmup) = (self.lr_scheduler_type, &self.lr_scheduler_kwargs, self.resolved_warmup(total));
        Schedule::new(kind, kwargs, peak, warmup, total).map_err(Error::Config)
    }

    /// Whether anything has the `embedding_learning_rate`, if there is one.
    pub(crate) fn check_embedding_rate(&self, params: &Params) -> Result<(), Error> {
        if self.embedding_learning_rate.is_none() || params.infos().iter().any(|info| info.group == Group::Embedding) {
            return Ok(());
        }
        let problem = "embedding_learning_rate needs an embedding table or output layer that is trained: \
                       modules_to_save = [\"embed_tokens\", \"lm_head\"], or full_finetuning";
        Err(Error::Config(vec![problem.to_owned()]))
    }

    /// The rows that training takes from `dataset`, packed or one example each.
    pub fn rows(&self, dataset: &Dataset, max_seq_length: usize) -> Packs {
        let lengths = dataset.examples().map(|example| example.input_ids.len());
        if self.packing { Packs::best_fit(lengths, max_seq_length) } else { Packs::single(dataset.len()) }
    }

    /// Rows of one optimizer step.
    pub fn rows_per_step(&self) -> usize {
        self.per_device_train_batch_size * self.gradient_accumulation_steps
    }

    /// Optimizer steps of a run over `rows` rows.
    pub fn total_steps(&self, rows: usize) -> usize {
        let all = (self.num_train_epochs * rows as f64).ceil() as usize;
        self.max_steps.unwrap_or_else(|| all.div_ceil(self.rows_per_step()).max(1))
    }

    /// Steps of warm-up in a run of `total` steps.
    pub fn resolved_warmup(&self, total: usize) -> usize {
        if self.warmup_steps > 0 { self.warmup_steps } else { (self.warmup_ratio * total as f64).ceil() as usize }
    }

    /// The schedule's peak.
    pub fn resolved_learning_rate(&self, full_finetuning: bool) -> f64 {
        self.learning_rate.unwrap_or(if full_finetuning { 2e-5 } else { 2e-4 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_cover_all_epochs() {
        let config =
            SftConfig { per_device_train_batch_size: 2, gradient_accumulation_steps: 3, ..SftConfig::default() };
        assert_eq!(config.total_steps(7), 4, "21 rows in sixes");
        assert_eq!(SftConfig { max_steps: Some(9), ..config }.total_steps(7), 9);
    }

    #[test]
    fn an_embedding_learning_rate_is_for_something() {
        use burn::tensor::DType;
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

    #[test]
    fn every_bad_number_is_named() {
        let config = SftConfig { logging_steps: 0, adam_beta1: 1.0, learning_rate: Some(-1.0), ..SftConfig::default() };
        let text = config.validate().unwrap_err().to_string();
        for part in ["logging_steps is 0", "adam_beta1 is 1;", "learning_rate is -1"] {
            assert!(text.contains(part), "{text}");
        }
        SftConfig::default().validate().unwrap();
        let config = SftConfig { load_best_model_at_end: true, early_stopping_threshold: 0.1, ..SftConfig::default() };
        let text = config.validate().unwrap_err().to_string();
        for part in
            ["load_best_model_at_end needs eval_steps", "early_stopping_threshold needs early_stopping_patience"]
        {
            assert!(text.contains(part), "{text}");
        }
    }
}
