//! `checkpoint-N/`: the trained model after N steps, and what a run needs to go on from there as if it had not stopped.
//!
//! Beside the adapter's or model's files lie `trainer_state.json` ([`TrainerState`]), `optimizer.safetensors`, and for an
//! adapter `master_weights.safetensors`: its trained parameters in f32, as they are and not as an adapter's file has
//! them. Where all weights are trained, the model's own files are that.

mod fingerprint;
mod state;
mod tensors;

use std::path::{Path, PathBuf};

use rekindle_models::CausalLm;

use crate::save::{check_checkpoint, write_new};
use crate::{Companion, Error, Optimizer};

pub(crate) use fingerprint::{dataset_fingerprint, weights_fingerprint};
pub use state::Best;
pub(crate) use state::{TrainerState, configuration_sha256};

/// Files of a checkpoint that the result of a run has not.
pub(crate) const FILES: [&str; 3] = [TrainerState::FILE, tensors::OPTIMIZER, tensors::MASTERS];

const PREFIX: &str = "checkpoint-";

/// One on disk that is whole.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) path: PathBuf,
    pub(crate) state: TrainerState,
}

impl Checkpoint {
    /// Reads what it says of itself.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self { path: path.to_owned(), state: TrainerState::read(path)? })
    }

    /// Where the one after `step` steps belongs.
    pub(crate) fn path(output_dir: &Path, step: usize) -> PathBuf {
        output_dir.join(format!("{PREFIX}{step}"))
    }

    /// Those in `output_dir` that a run can go on from, by their steps, the last one last.
    pub(crate) fn list(output_dir: &Path) -> Vec<(usize, PathBuf)> {
        let entries = std::fs::read_dir(output_dir).into_iter().flatten().flatten();
        let mut found: Vec<(usize, PathBuf)> = entries
            .filter_map(|entry| {
                let step = entry.file_name().to_str()?.strip_prefix(PREFIX)?.parse().ok()?;
                Some((step, entry.path()))
            })
            .filter(|(_, path)| path.join(TrainerState::FILE).is_file())
            .collect();
        found.sort_unstable();
        found
    }

    /// Writes one as a whole, replacing an earlier one of the same step; `write_model` writes the files of a result.
    pub(crate) fn write(
        path: &Path,
        model: &CausalLm,
        optimizer: &Optimizer,
        state: &TrainerState,
        companions: &[Companion],
        write_model: impl FnOnce(&Path) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let is_adapter = model.lora().is_some();
        check_checkpoint(path, is_adapter)?;
        write_new(path, companions, |target| {
            write_model(target)?;
            if is_adapter || model.params().are_in_place() {
                tensors::write_masters(target, model)?;
            }
            tensors::write_optimizer(target, optimizer)?;
            state.write(target)
        })
    }

    /// Brings the trained parameters back.
    pub(crate) fn restore_model(&self, model: &mut CausalLm) -> Result<(), Error> {
        tensors::read_masters(&self.path, model)
    }

    /// Brings the optimizer back.
    pub(crate) fn restore_optimizer(&self, optimizer: &mut Optimizer) -> Result<(), Error> {
        tensors::read_optimizer(&self.path, optimizer, self.state.optimizer_steps)
    }
}

/// Returns true if a name in an output directory is one that a run writes atomically.
pub(crate) fn is_ours(name: &str) -> bool {
    const NAMES: [&str; 7] =
        ["adapter", "model", "metrics.jsonl", "loss.svg", "report.html", "run.toml", "run.resolved.toml"];
    name.starts_with(PREFIX) || NAMES.contains(&name)
}
