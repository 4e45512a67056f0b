//! The arguments of a run besides its [`SftConfig`](crate::SftConfig).

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::Resume;

/// The order of the rows, the directory for results, and the treatment of an earlier run in that directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainerArguments {
    /// If true, each epoch has its own random order. Default true.
    pub shuffle: bool,
    /// Seed of the order and of dropout. Default 3407.
    pub seed: u64,
    /// The directory for `checkpoint-N/`, `adapter/` (or `model/`), `metrics.jsonl`, `report.html`, `loss.svg` and
    /// `tensorboard/`. Default: nothing is written.
    pub output_dir: Option<PathBuf>,
    /// The checkpoint to resume from: one of an earlier run with the same model, rows and configuration. On the CPU the
    /// result is bit-identical to that of an uninterrupted run. Default: the run starts from the beginning.
    pub resume: Option<Resume>,
    /// If true, checkpoints and the result of an earlier run in `output_dir` are replaced. Default false: the run is
    /// refused.
    pub overwrite: bool,
}

impl Default for TrainerArguments {
    fn default() -> Self {
        Self { shuffle: true, seed: 3407, output_dir: None, resume: None, overwrite: false }
    }
}
