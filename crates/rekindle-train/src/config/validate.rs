//! Checks of a training configuration that do not depend on the model.

use super::{EvalStrategy, SaveStrategy, SftConfig};
use crate::{Error, LrSchedulerType, Schedule};

impl SftConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// [`Error::Config`] with one sentence for each value that is out of range.
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
            ("sample_max_new_tokens", self.sample_max_new_tokens),
        ] {
            check(value > 0, name, &value, positive);
        }
        for (name, value) in [
            ("max_steps", self.max_steps),
            ("save_total_limit", self.save_total_limit),
            ("early_stopping_patience", self.early_stopping_patience),
        ] {
            check(value != Some(0), name, &0, positive);
        }
        for (name, value) in [
            ("logging_steps", Some(self.logging_steps)),
            ("eval_steps", self.eval_steps),
            ("save_steps", self.save_steps),
        ] {
            check(
                value.is_none_or(|value| !value.is_zero()),
                name,
                &0,
                "at least 1, or a fraction of all steps between 0 and 1",
            );
        }
        let epochs = self.epochs();
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
            ("router_aux_loss_coef", self.router_aux_loss_coef),
            ("early_stopping_threshold", self.early_stopping_threshold),
        ] {
            check(value.is_finite() && value >= 0.0, name, &value, "at least 0");
        }
        let rows = self.per_device_train_batch_size.checked_mul(self.gradient_accumulation_steps);
        if rows.is_none_or(|rows| rows > u32::MAX as usize) {
            problems.push(
                "per_device_train_batch_size · gradient_accumulation_steps exceeds 2³²; lower one of \
                 them"
                    .to_owned(),
            );
        }
        if self.early_stopping_threshold > 0.0 && self.early_stopping_patience.is_none() {
            problems.push("early_stopping_threshold needs early_stopping_patience".to_owned());
        }
        self.validate_strategies(&mut problems);
        if self.optimizer_in_bwd && self.gradient_accumulation_steps > 1 {
            problems.push(format!(
                "gradient_accumulation_steps is {}, but optimizer_in_bwd = true keeps no gradients to accumulate; use \
                 one batch, per_device_train_batch_size = {}, with use_gradient_checkpointing if memory is short",
                self.gradient_accumulation_steps,
                self.per_device_train_batch_size.saturating_mul(self.gradient_accumulation_steps)
            ));
        }
        if !self.warmup_steps.is_zero() && self.warmup_ratio > 0.0 {
            problems.push(format!(
                "warmup_steps = {} and warmup_ratio = {} are both set; keep warmup_steps, which can also be a \
                 fraction of all steps",
                self.warmup_steps, self.warmup_ratio
            ));
        }
        if !self.warmup().is_zero() && self.lr_scheduler_type == LrSchedulerType::Constant {
            problems.push(
                "lr_scheduler_type = \"constant\" has no warm-up; use \"constant_with_warmup\", or remove \
                 warmup_steps and warmup_ratio"
                    .to_owned(),
            );
        }
        problems.extend(self.optim.ignored(self));
        problems.extend(self.method.problems(self));
        // Whether the steps are enough shows when they are known.
        let (kind, kwargs) = (self.lr_scheduler_type, &self.lr_scheduler_kwargs);
        if let Err(more) = Schedule::new(kind, kwargs, self.learning_rate.unwrap_or(f64::MAX), 0, 1 << 40) {
            problems.extend(more);
        }
        if problems.is_empty() { Ok(()) } else { Err(Error::Config(problems)) }
    }

    /// Checks that keys which depend on evaluations or checkpoints have them.
    fn validate_strategies(&self, problems: &mut Vec<String>) {
        match (self.eval_strategy, self.eval_steps) {
            (Some(EvalStrategy::Steps), None) => {
                problems.push("eval_strategy = \"steps\" needs eval_steps, such as eval_steps = 0.1".to_owned());
            }
            (Some(EvalStrategy::No | EvalStrategy::Epoch), Some(_)) => {
                problems.push(
                    "eval_steps needs eval_strategy = \"steps\", the default if eval_steps is \
                     set"
                    .to_owned(),
                );
            }
            _ => {}
        }
        match (self.save_strategy, self.save_steps) {
            (Some(SaveStrategy::Steps), None) => {
                problems.push("save_strategy = \"steps\" needs save_steps, such as save_steps = 0.25".to_owned());
            }
            (Some(SaveStrategy::No | SaveStrategy::Epoch | SaveStrategy::Best), Some(_)) => {
                problems.push(
                    "save_steps needs save_strategy = \"steps\", the default if save_steps is \
                     set"
                    .to_owned(),
                );
            }
            _ => {}
        }
        if self.eval_strategy == Some(EvalStrategy::No) && self.eval_on_start == Some(true) {
            problems.push("eval_on_start = true contradicts eval_strategy = \"no\"; remove one of them".to_owned());
        }
        let evaluates = self.eval_steps.is_some() || self.eval_strategy == Some(EvalStrategy::Epoch);
        for (wanted, name) in [
            (self.early_stopping_patience.is_some(), "early_stopping_patience"),
            (self.load_best_model_at_end, "load_best_model_at_end"),
            (self.save_strategy == Some(SaveStrategy::Best), "save_strategy = \"best\""),
        ] {
            if wanted && !evaluates {
                problems.push(format!(
                    "{name} needs eval_steps or eval_strategy = \"epoch\": without them the run evaluates once, at its end"
                ));
            }
        }
        let saves =
            self.save_steps.is_some() || matches!(self.save_strategy, Some(SaveStrategy::Epoch | SaveStrategy::Best));
        if self.save_total_limit.is_some() && !saves && !self.load_best_model_at_end {
            problems.push("save_total_limit needs save_steps, save_strategy or load_best_model_at_end".to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StepCount;

    #[test]
    fn every_bad_number_is_named() {
        let config = SftConfig {
            logging_steps: StepCount::Steps(0),
            adam_beta1: 1.0,
            learning_rate: Some(-1.0),
            ..SftConfig::default()
        };
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

    #[test]
    fn strategies_that_contradict_other_keys_are_named() {
        let problems = |config: SftConfig| config.validate().unwrap_err().to_string();
        let usual = SftConfig::default;
        for (config, part) in [
            (SftConfig { eval_strategy: Some(EvalStrategy::Steps), ..usual() }, "needs eval_steps"),
            (SftConfig { save_strategy: Some(SaveStrategy::Steps), ..usual() }, "needs save_steps"),
            (SftConfig { save_strategy: Some(SaveStrategy::Best), ..usual() }, "\"best\" needs eval_steps"),
            (
                SftConfig {
                    eval_strategy: Some(EvalStrategy::Epoch),
                    eval_steps: Some(StepCount::Steps(2)),
                    ..usual()
                },
                "eval_steps needs eval_strategy = \"steps\"",
            ),
            (
                SftConfig { eval_strategy: Some(EvalStrategy::No), eval_on_start: Some(true), ..usual() },
                "eval_on_start = true contradicts",
            ),
            (
                SftConfig { warmup_ratio: 0.1, warmup_steps: StepCount::Steps(5), ..usual() },
                "warmup_steps = 5 and warmup_ratio = 0.1 are both set",
            ),
        ] {
            let text = problems(config);
            assert!(text.contains(part), "{part}: {text}");
        }
        let epochs = SftConfig {
            eval_strategy: Some(EvalStrategy::Epoch),
            save_strategy: Some(SaveStrategy::Best),
            load_best_model_at_end: true,
            early_stopping_patience: Some(2),
            save_total_limit: Some(1),
            ..usual()
        };
        epochs.validate().unwrap();
    }
}
