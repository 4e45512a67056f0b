//! Checks of a run before its model is loaded.

use rekindle_data::Dataset;

use super::output::OutputDir;
use super::resume::check_step;
use super::resume_compatibility::RunTerms;
use crate::checkpoint::Checkpoint;
use crate::{Error, SftConfig, Timetable, TrainerArguments};

/// A run without its model.
///
/// [`check`](Self::check) refuses what [`Trainer::train`](crate::Trainer::train) would refuse, as far as that is known
/// without weights, which may take minutes to load.
#[derive(Clone, Copy, Debug)]
pub struct Preflight<'a> {
    /// The training configuration.
    pub config: &'a SftConfig,
    /// The rows to train on.
    pub train: &'a Dataset,
    /// The maximum length of a row.
    pub max_seq_length: usize,
    /// True if all weights are trained.
    pub full_finetuning: bool,
    /// The order of the rows, the output directory and the checkpoint to resume from.
    pub arguments: &'a TrainerArguments,
}

impl Preflight<'_> {
    /// Checks the run; returns its steps.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::EarlierRun`], [`Error::FinishedRun`], [`Error::Differs`], [`Error::Checkpoint`] and
    /// [`Error::File`], as the run itself.
    pub fn check(&self) -> Result<Timetable, Error> {
        let Self { config, train, full_finetuning: full, arguments, .. } = *self;
        config.validate()?;
        config.method.check_rows(train)?;
        let times = config.timetable(config.rows(train, self.max_seq_length).len());
        config.schedule(config.resolved_learning_rate(full), times.total)?;
        let output = OutputDir { arguments, full };
        let checkpoint = output.checkpoint()?;
        output.check_writable(&times)?;
        if let Some(path) = checkpoint {
            let checkpoint = Checkpoint::open(&path)?;
            let terms = RunTerms { config, train, full, arguments };
            terms.check(&path, &checkpoint.state)?;
            check_step(&checkpoint, times.total, &output.checkpoints())?;
        }
        Ok(times)
    }
}

/// Refuses an output directory with checkpoints or a result of an earlier run, unless the run resumes from them or may
/// overwrite them.
///
/// # Errors
/// [`Error::EarlierRun`], [`Error::FinishedRun`], and [`Error::Config`] if both are set.
pub fn check_output_dir(arguments: &TrainerArguments, full_finetuning: bool) -> Result<(), Error> {
    OutputDir { arguments, full: full_finetuning }.checkpoint().map(|_| ())
}
