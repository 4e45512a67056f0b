//! Checks of a run before its model is loaded.

use std::path::Path;

use rekindle_data::Dataset;

use super::agreement::RunTerms;
use super::output::OutputDir;
use super::resume::{Resume, check_step};
use crate::checkpoint::Checkpoint;
use crate::{Error, SftConfig, Timetable};

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
    /// True if each epoch has its own order.
    pub shuffle: bool,
    /// Seed of the order and of dropout.
    pub seed: u64,
    /// The directory for results.
    pub output_dir: Option<&'a Path>,
    /// The checkpoint that the run resumes from.
    pub resume: Option<&'a Resume>,
    /// True if results of an earlier run may be replaced.
    pub overwrite: bool,
}

impl Preflight<'_> {
    /// Checks the run; returns its steps.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::EarlierRun`], [`Error::FinishedRun`], [`Error::Differs`], [`Error::Checkpoint`] and
    /// [`Error::File`], as the run itself.
    pub fn check(&self) -> Result<Timetable, Error> {
        let Self { config, train, full_finetuning: full, .. } = *self;
        config.validate()?;
        let times = config.timetable(config.rows(train, self.max_seq_length).len());
        config.schedule(config.resolved_learning_rate(full), times.total)?;
        let output = OutputDir { dir: self.output_dir, full, resume: self.resume, overwrite: self.overwrite };
        let checkpoint = output.checkpoint()?;
        output.check_writable(&times)?;
        if let Some(path) = checkpoint {
            let checkpoint = Checkpoint::open(&path)?;
            let terms = RunTerms { config, train, full, shuffle: self.shuffle, seed: self.seed };
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
/// [`Error::EarlierRun`], [`Error::FinishedRun`], [`Error::Config`] where both are asked for.
pub fn check_output_dir(
    dir: &Path,
    full_finetuning: bool,
    resume: Option<&Resume>,
    overwrite: bool,
) -> Result<(), Error> {
    OutputDir { dir: Some(dir), full: full_finetuning, resume, overwrite }.checkpoint().map(|_| ())
}
