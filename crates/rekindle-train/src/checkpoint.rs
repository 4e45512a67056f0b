//! `checkpoint-N/`: the trained model after N steps, and the state for resuming the run.
//!
//! Besides the files of the adapter or model, a checkpoint contains `trainer_state.json` ([`TrainerState`]),
//! `optimizer.safetensors`, and for an adapter `master_weights.safetensors`: its trained parameters in f32, before the
//! conversion for the adapter's file. If all weights are trained, the model's files contain them. `rollouts.json` has the sampled
//! completions that later steps still use.

mod fingerprint;
mod state;
mod tensors;

use std::path::{Path, PathBuf};

use rekindle_kernels::optimizer::StateTensor;
use rekindle_models::CausalLm;

use crate::rollout::Generation;
use crate::save::{check_checkpoint, write_new};
use crate::{Companion, Error, Optimizer};

pub(crate) use fingerprint::{dataset_fingerprint, hex, weights_fingerprint};
pub use state::BestEvaluation;
pub(crate) use state::{TrainerState, configuration_sha256};

/// Files of a checkpoint that the result of a run does not have.
pub(crate) const FILES: [&str; 4] = [TrainerState::FILE, tensors::OPTIMIZER, tensors::MASTERS, Generation::FILE];

const PREFIX: &str = "checkpoint-";

/// A complete checkpoint on disk.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    pub(crate) path: PathBuf,
    pub(crate) state: TrainerState,
}

impl Checkpoint {
    /// Reads the state of the checkpoint at `path`.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        Ok(Self { path: path.to_owned(), state: TrainerState::read(path)? })
    }

    /// Returns the path of the checkpoint after `step` steps.
    pub(crate) fn path(output_dir: &Path, step: usize) -> PathBuf {
        output_dir.join(format!("{PREFIX}{step}"))
    }

    /// Returns the steps and paths of the complete checkpoints in `output_dir`, in ascending order.
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

    /// Writes a checkpoint atomically, replacing an earlier one of the same step; `write_model` writes the files of a
    /// result.
    pub(crate) fn write(
        path: &Path,
        model: &CausalLm,
        optimizer: &[StateTensor],
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

    /// Restores the trained parameters.
    pub(crate) fn restore_model(&self, model: &mut CausalLm) -> Result<(), Error> {
        tensors::read_masters(&self.path, model)
    }

    /// Restores the optimizer. Returns its whole state if there are other ranks, which need it too.
    pub(crate) fn restore_optimizer(&self, optimizer: &mut Optimizer) -> Result<Vec<StateTensor>, Error> {
        let (path, saved) = tensors::read_optimizer(&self.path)?;
        let kept = if optimizer.world().ranks().size() > 1 { saved.clone() } else { Vec::new() };
        let restored = optimizer.resume(self.state.optimizer_steps, saved);
        restored.map_err(|error| Error::Checkpoint { path, problem: error.to_string() })?;
        if let Some(scaler) = self.state.loss_scaler {
            optimizer.set_loss_scaler(scaler);
        }
        Ok(kept)
    }
}

/// Returns true if a run writes the name atomically into its output directory.
pub(crate) fn is_ours(name: &str) -> bool {
    const NAMES: [&str; 7] =
        ["adapter", "model", "metrics.jsonl", "loss.svg", "report.html", "run.toml", "run.resolved.toml"];
    name.starts_with(PREFIX) || NAMES.contains(&name)
}
