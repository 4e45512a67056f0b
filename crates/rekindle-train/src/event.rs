//! What a run tells while it goes on, and at its end.

use std::path::{Path, PathBuf};

use crate::{Best, EvalMetrics, Sample, StepMetrics, Timetable};

/// What a run tells while it goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// The first step is about to be taken.
    Started {
        /// Steps that were done before, by a run that this one goes on from.
        done: usize,
        /// Steps of the whole run, and what falls due after which of them.
        times: &'a Timetable,
        /// What it goes on from.
        checkpoint: Option<&'a Path>,
        /// What the user should know of that and of the run, one sentence each.
        notes: &'a [String],
    },
    /// An optimizer step is done.
    Step {
        /// Its numbers.
        metrics: &'a StepMetrics,
        /// Steps of the whole run.
        total: usize,
    },
    /// The evaluation set was looked at.
    Eval(&'a EvalMetrics),
    /// A prompt was answered.
    Sample(&'a Sample),
    /// A checkpoint or the result was written.
    Saved(&'a Path),
}

/// What a run has to say at its end.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Every step, those before a resumption included.
    pub steps: Vec<StepMetrics>,
    /// Every evaluation, the last one after the last step.
    pub evals: Vec<EvalMetrics>,
    /// Why it ended.
    pub end: End,
    /// The lowest evaluation loss, if the evaluation set was looked at.
    pub best: Option<Best>,
    /// The last checkpoint, if there is one.
    pub checkpoint: Option<PathBuf>,
    /// Where the adapter or model was written, if anywhere.
    pub saved: Option<PathBuf>,
}

/// Why a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All steps are done.
    Finished,
    /// The evaluation loss did not fall any more (`early_stopping_patience`).
    EarlyStopping,
    /// It was asked to stop ([`Trainer::stop_flag`](crate::Trainer::stop_flag)); there is no result yet.
    Interrupted,
}
