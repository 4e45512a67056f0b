//! Events of a run, and its report.

use std::path::{Path, PathBuf};

use crate::{BestEvaluation, EvalMetrics, PromptSample, StepMetrics, Timetable};

/// An event of a run.
#[derive(Debug)]
#[non_exhaustive]
pub enum TrainEvent<'a> {
    /// The first step is about to be taken.
    Started {
        /// Steps done before, by the run that this one resumes.
        done: usize,
        /// The steps of the whole run, and the times of evaluations, checkpoints and log lines.
        times: &'a Timetable,
        /// The checkpoint that the run resumes from.
        checkpoint: Option<&'a Path>,
        /// Notices for the user, one sentence each.
        notes: &'a [String],
    },
    /// An optimizer step is done.
    Step {
        /// The metrics of the step.
        metrics: &'a StepMetrics,
        /// Steps of the whole run.
        total: usize,
    },
    /// The evaluation set was evaluated.
    Eval(&'a EvalMetrics),
    /// A prompt was answered.
    Sample(&'a PromptSample),
    /// A checkpoint or the result was written.
    Saved(&'a Path),
}

/// The report of a finished or interrupted run.
#[derive(Clone, Debug, PartialEq)]
pub struct TrainReport {
    /// Every step, including those before resuming.
    pub steps: Vec<StepMetrics>,
    /// Every evaluation, the last one after the last step.
    pub evals: Vec<EvalMetrics>,
    /// The reason for the end.
    pub end: TrainEnd,
    /// The lowest evaluation loss, if there was an evaluation.
    pub best: Option<BestEvaluation>,
    /// The last checkpoint, if there is one.
    pub checkpoint: Option<PathBuf>,
    /// The path of the adapter or model, if it was written.
    pub saved: Option<PathBuf>,
}

/// The reason for a run's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainEnd {
    /// All steps are done.
    Finished,
    /// The evaluation loss no longer fell (`early_stopping_patience`).
    EarlyStopping,
    /// The run was asked to stop ([`Trainer::stop`](crate::Trainer::stop)); there is no result yet.
    Interrupted,
}
