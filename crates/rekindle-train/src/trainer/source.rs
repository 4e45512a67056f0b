//! The source of a run's steps: rows of a dataset, or completions that the model samples.

use std::path::Path;
use std::sync::atomic::Ordering;

use rekindle_data::{Packs, counted};
use rekindle_models::Objective;

use super::Trainer;
use super::rows::{Rows, StepRows};
use crate::batches::Batches;
use crate::reference::ReferenceLogProbs;
use crate::rollout::{RolloutRecords, RolloutStep, Rollouts};
use crate::{Error, EvalMetrics, MetricValues, RewardedCompletion, SftConfig};

/// The source of a run's steps.
pub(super) enum StepSource<'a> {
    Rows(Rows),
    Rollouts(Box<Rollouts<'a>>),
}

impl<'a> StepSource<'a> {
    /// Returns the source of a run of `steps` steps after `seen` rows or prompts; `checkpoint` is the one that it resumes from.
    pub(super) fn begin(
        job: &mut Trainer<'a>,
        packs: Packs,
        (seen, steps): (u64, usize),
        checkpoint: Option<&Path>,
    ) -> Result<Self, Error> {
        let order = (job.arguments.shuffle, job.arguments.seed);
        let settings = job.config.method.rollouts(&job.config);
        let (Some(settings), Some(task)) = (settings, job.rollouts.take()) else {
            return Ok(Self::Rows(Rows::new(&job.config, packs, order.0, order.1, seen)));
        };
        let mut rollouts = Rollouts::new(task, &job.config, settings, &job.train, order, seen).recorded_of(steps);
        checkpoint.map(|checkpoint| rollouts.resume(checkpoint)).transpose()?;
        rollouts.share(&*job.world)?;
        Ok(Self::Rollouts(Box::new(rollouts)))
    }

    /// Returns the rows of `step`, the next one, and records of completions that were sampled for it; `None` if the run is asked
    /// to stop before they are complete.
    pub(super) fn next_step(
        &mut self,
        job: &Trainer<'_>,
        reference: Option<&ReferenceLogProbs>,
        step: usize,
    ) -> Result<Option<(StepRows, RolloutRecords)>, Error> {
        match self {
            Self::Rows(rows) => {
                let from = Batches::new(&job.train, &job.config, job.model.max_seq_length()).reference(reference);
                Ok(Some((rows.next_step(&from, job.world.position()), RolloutRecords::default())))
            }
            Self::Rollouts(rollouts) => {
                let go_on = &mut || !job.stop.load(Ordering::Relaxed);
                let step = rollouts.next_step(job.model, &job.train, step, &*job.world, go_on)?;
                Ok(step.map(|RolloutStep { rows, records }| (rows, records)))
            }
        }
    }

    /// Samples and scores completions of the evaluation set, after `done` steps, with some of them; returns `None` if the run is asked to stop, or
    /// if it samples none.
    pub(super) fn evaluate(
        &mut self,
        job: &Trainer<'_>,
        objective: &dyn Objective,
        done: usize,
    ) -> Result<Option<(EvalMetrics, Vec<RewardedCompletion>)>, Error> {
        let (Self::Rollouts(rollouts), Some(eval)) = (self, &job.eval) else { return Ok(None) };
        let go_on = &mut || !job.stop.load(Ordering::Relaxed);
        let size = job.config.per_device_eval_batch_size;
        let found = rollouts.evaluate(job.model, objective, eval, (size, done), &*job.world, go_on)?;
        Ok(found.map(|(found, RolloutRecords { metrics, completions })| {
            let metrics = EvalMetrics {
                step: done,
                eval_loss: found.loss,
                eval_perplexity: None,
                eval_tokens: found.tokens,
                metrics: MetricValues::prefixed(&found.metrics, "eval_").with(metrics, "eval_"),
            };
            (metrics, completions)
        }))
    }

    /// Returns the number of passes over the rows or prompts.
    pub(super) fn epoch(&self) -> f64 {
        match self {
            Self::Rows(rows) => rows.epoch(),
            Self::Rollouts(rollouts) => rollouts.epoch(),
        }
    }

    /// Returns the number of rows or prompts taken.
    pub(super) fn seen(&self) -> u64 {
        match self {
            Self::Rows(rows) => rows.seen(),
            Self::Rollouts(rollouts) => rollouts.seen(),
        }
    }

    /// Writes what a resumed run needs besides the number of rows taken.
    pub(super) fn save(&self, checkpoint: &Path) -> Result<(), Error> {
        match self {
            Self::Rows(_) => Ok(()),
            Self::Rollouts(rollouts) => rollouts.save(checkpoint),
        }
    }
}

/// Returns a notice for a run whose epochs have fewer rows than a step.
pub(super) fn small_epochs(config: &SftConfig, rows: usize) -> Option<String> {
    let per_step = config.rows_per_step();
    (rows < per_step && !config.method.has_rollouts()).then(|| {
        format!(
            "an epoch has only {}, fewer than the {per_step} rows of a step (per_device_train_batch_size · \
             gradient_accumulation_steps): each step uses every row once",
            counted(rows, "row")
        )
    })
}
