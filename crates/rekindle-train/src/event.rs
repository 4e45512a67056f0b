//! What a run tells while it goes on, and at its end.

use std::path::{Path, PathBuf};

use crate::{EvalMetrics, Sample, StepMetrics};

/// What a run tells while it goes on.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
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
    /// A checkpoint was written.
    Saved(&'a Path),
}

/// What a finished run has to say.
#[derive(Clone, Debug, PartialEq)]
pub struct Report {
    /// Every step.
    pub steps: Vec<StepMetrics>,
    /// Every evaluation, the last one after the last step.
    pub evals: Vec<EvalMetrics>,
    /// Where the adapter or model was written, if anywhere.
    pub saved: Option<PathBuf>,
}
