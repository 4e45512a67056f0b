//! The times of evaluations, checkpoints and log lines.

use serde::{Deserialize, Serialize};

use super::SftConfig;

/// The times of evaluation, with the names of `TrainingArguments.eval_strategy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EvalStrategy {
    /// Never, not even at the end.
    No,
    /// Every `eval_steps`, and at the end.
    Steps,
    /// At the end of each epoch and of the run.
    Epoch,
}

/// The times of checkpoints, with the names of `TrainingArguments.save_strategy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SaveStrategy {
    /// Never; the result is written in any case.
    No,
    /// Every `save_steps`, and at the end.
    Steps,
    /// At the end of each epoch and of the run.
    Epoch,
    /// After each evaluation with the lowest loss so far.
    Best,
}

/// The steps of a run, and the times of evaluations, checkpoints and log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timetable {
    /// Optimizer steps of the run.
    pub total: usize,
    /// Optimizer steps of an epoch. The last one has the remaining rows.
    pub steps_per_epoch: usize,
    /// Steps of warm-up.
    pub warmup: usize,
    logging: usize,
    logging_first: bool,
    eval: Due,
    save: Due,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Due {
    /// Every given number of steps, and at the end.
    Every(usize),
    /// At the end.
    End,
    Never,
}

impl Due {
    fn after(self, step: usize, total: usize) -> bool {
        match self {
            Self::Every(steps) => step > 0 && (step.is_multiple_of(steps) || step == total),
            Self::End => step > 0 && step == total,
            Self::Never => false,
        }
    }
}

impl Timetable {
    /// Returns the timetable of a run over `rows` rows. A step ends with its epoch as in transformers' `Trainer`, so an
    /// epoch has ⌈rows / rows of a step⌉ steps.
    pub(super) fn new(config: &SftConfig, rows: usize) -> Self {
        let steps_per_epoch = rows.div_ceil(config.rows_per_step()).max(1);
        let by_epochs = || (config.epochs() * steps_per_epoch as f64).ceil() as usize;
        let total = config.max_steps.unwrap_or_else(by_epochs).max(1);
        let every = |steps: usize| Due::Every(steps.max(1));
        let eval = match (config.eval_strategy, config.eval_steps) {
            (Some(EvalStrategy::No), _) => Due::Never,
            (Some(EvalStrategy::Epoch), _) => every(steps_per_epoch),
            (_, Some(steps)) => every(steps.of(total)),
            (_, None) => Due::End,
        };
        let save = match (config.save_strategy, config.save_steps) {
            (Some(SaveStrategy::Epoch), _) => every(steps_per_epoch),
            (None | Some(SaveStrategy::Steps), Some(steps)) => every(steps.of(total)),
            _ => Due::Never,
        };
        let logging = config.logging_steps.of(total).max(1);
        let warmup = config.warmup().of(total);
        Self { total, steps_per_epoch, warmup, logging, logging_first: config.logging_first_step, eval, save }
    }

    /// Returns true if the evaluation set is evaluated after `step` steps.
    pub fn evaluates_after(&self, step: usize) -> bool {
        self.eval.after(step, self.total)
    }

    /// Returns true if a checkpoint is written after `step` steps.
    pub fn saves_after(&self, step: usize) -> bool {
        self.save.after(step, self.total)
    }

    /// Returns true if checkpoints are written, in which case a run that ends early writes one too.
    pub fn saves(&self) -> bool {
        self.save != Due::Never
    }

    /// Returns true if there is a log line after `step` steps.
    pub fn logs_after(&self, step: usize) -> bool {
        step == self.total || step.is_multiple_of(self.logging) || (step == 1 && self.logging_first)
    }

    /// Returns the number of evaluations after step 1.
    pub fn evaluations(&self) -> usize {
        (1..=self.total).filter(|&step| self.evaluates_after(step)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::StepCount;

    fn config() -> SftConfig {
        SftConfig { per_device_train_batch_size: 8, gradient_accumulation_steps: 4, ..SftConfig::default() }
    }

    fn due(times: &Timetable, after: impl Fn(&Timetable, usize) -> bool) -> Vec<usize> {
        (0..=times.total).filter(|&step| after(times, step)).collect()
    }

    #[test]
    fn an_epoch_ends_a_step() {
        let of = |epochs, rows| {
            let times = SftConfig { num_train_epochs: Some(epochs), ..config() }.timetable(rows);
            (times.steps_per_epoch, times.total)
        };
        assert_eq!(of(4.0, 5), (1, 4), "five rows in steps of 32: a step an epoch");
        assert_eq!(of(3.0, 64), (2, 6));
        assert_eq!(of(3.0, 65), (3, 9), "the last step of an epoch has one row");
        assert_eq!(of(2.5, 65), (3, 8), "⌈2.5 · 3⌉");
        assert_eq!(of(0.1, 5), (1, 1));
        assert_eq!(SftConfig { max_steps: Some(7), ..config() }.timetable(65).total, 7);
    }

    #[test]
    fn strategies_say_when() {
        let epochs = SftConfig {
            num_train_epochs: Some(2.5),
            eval_strategy: Some(EvalStrategy::Epoch),
            save_strategy: Some(SaveStrategy::Epoch),
            ..config()
        };
        let times = epochs.timetable(65);
        assert_eq!(due(&times, Timetable::evaluates_after), [3, 6, 8], "and the end");
        assert_eq!(due(&times, Timetable::saves_after), [3, 6, 8]);
        let shares = SftConfig {
            max_steps: Some(20),
            eval_steps: Some(StepCount::Share(0.3)),
            save_steps: Some(StepCount::Share(0.5)),
            logging_steps: StepCount::Share(0.25),
            warmup_steps: StepCount::Share(0.12),
            ..config()
        };
        let times = shares.timetable(65);
        assert_eq!(due(&times, Timetable::evaluates_after), [6, 12, 18, 20]);
        assert_eq!(due(&times, Timetable::saves_after), [10, 20]);
        assert_eq!(due(&times, |times, step| step > 0 && times.logs_after(step)), [1, 5, 10, 15, 20]);
        assert_eq!((times.warmup, times.evaluations()), (3, 4));
        let quiet = SftConfig { logging_first_step: false, eval_strategy: Some(EvalStrategy::No), ..shares };
        let times = quiet.timetable(65);
        assert_eq!(due(&times, Timetable::evaluates_after), [0; 0]);
        assert_eq!(due(&times, |times, step| step > 0 && times.logs_after(step)), [5, 10, 15, 20]);
        let plain = SftConfig { max_steps: Some(4), ..config() }.timetable(65);
        assert_eq!(due(&plain, Timetable::evaluates_after), [4], "once, at the end");
        assert!(!plain.saves());
    }
}
