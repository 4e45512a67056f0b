//! What is checked of a run before its model is loaded.

use std::path::Path;

use rekindle_train::{Preflight, Resume, SftConfig, Timetable};

use crate::prompts::prompts;
use crate::{EncodedRows, Error, RowEncoder};

/// A run without its model: [`check`](Self::check) refuses what [`SftTrainer::train`](crate::SftTrainer::train) would
/// refuse, as far as that shows without weights.
#[derive(Clone, Copy, Debug)]
pub struct RunCheck<'a> {
    /// The run's numbers.
    pub config: &'a SftConfig,
    /// What encoded the rows.
    pub encoder: &'a RowEncoder,
    /// The rows that are trained on.
    pub train: &'a EncodedRows,
    /// The rows that are evaluated.
    pub eval: Option<&'a EncodedRows>,
    /// Whether all weights are trained.
    pub full_finetuning: bool,
    /// Whether each epoch has its own order.
    pub shuffle: bool,
    /// Seed of the order and of dropout.
    pub seed: u64,
    /// Where results are written.
    pub output_dir: Option<&'a Path>,
    /// The checkpoint that the run resumes from.
    pub resume: Option<&'a Resume>,
    /// Whether results of an earlier run may be replaced.
    pub overwrite: bool,
}

impl RunCheck<'_> {
    /// Returns the steps of the run.
    ///
    /// # Errors
    /// [`Error::Argument`] for prompts that cannot be answered, [`Error::Train`] for everything else.
    pub fn check(&self) -> Result<Timetable, Error> {
        let max_seq_length = self.encoder.max_seq_length();
        let preflight = Preflight {
            config: self.config,
            train: self.train.dataset(),
            max_seq_length,
            full_finetuning: self.full_finetuning,
            shuffle: self.shuffle,
            seed: self.seed,
            output_dir: self.output_dir,
            resume: self.resume,
            overwrite: self.overwrite,
        };
        let times = preflight.check()?;
        prompts(self.encoder.tokenizer(), self.config, self.eval.map(EncodedRows::dataset), max_seq_length)?;
        Ok(times)
    }
}
