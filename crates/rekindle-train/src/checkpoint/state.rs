//! `trainer_state.json`.

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{read_json, write_atomic};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::fingerprint::hex;
use crate::{Error, LossScaler};

/// The progress of a run, and the configuration that a resumed run must share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct TrainerState {
    /// [`TrainerState::FORMAT`].
    pub(crate) format_version: u32,
    /// Steps done.
    pub(crate) global_step: usize,
    /// Steps that updated the parameters; the optimizer's own count, on which dropout depends.
    pub(crate) optimizer_steps: u64,
    /// The scale of the loss of an f16 model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) loss_scaler: Option<LossScaler>,
    /// Examples consumed since the beginning of the run, which determine the next rows.
    pub(crate) examples_seen: u64,
    /// Wall-clock time of the run up to here.
    pub(crate) seconds: f64,
    /// The step after which the last evaluation took place.
    pub(crate) last_evaluation: Option<usize>,
    /// The lowest evaluation loss so far.
    pub(crate) best: Option<BestEvaluation>,
    /// Evaluations in a row that were not better, for early stopping.
    pub(crate) early_stopping_patience_counter: usize,
    /// SHA-256 of `configuration`.
    pub(crate) configuration_sha256: String,
    /// The configuration, data and base model that a resumed run must share.
    pub(crate) configuration: BTreeMap<String, Value>,
    /// Settings that a resumed run may change, with consequences.
    pub(crate) changeable: BTreeMap<String, Value>,
}

/// The lowest evaluation loss of a run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestEvaluation {
    /// Steps done when it was measured.
    pub step: usize,
    /// The loss.
    pub eval_loss: f64,
}

impl TrainerState {
    pub(crate) const FILE: &str = "trainer_state.json";
    /// The version of the format. In version 2, an epoch ends a step.
    pub(crate) const FORMAT: u32 = 2;

    pub(super) fn write(&self, dir: &Path) -> Result<(), Error> {
        let text = serde_json::to_string_pretty(self).expect("numbers and texts serialize");
        Ok(write_atomic(&dir.join(Self::FILE), format!("{text}\n").as_bytes())?)
    }

    pub(super) fn read(dir: &Path) -> Result<Self, Error> {
        let path = dir.join(Self::FILE);
        let broken = |problem: String| Error::Checkpoint { path: path.clone(), problem };
        if !path.is_file() {
            let problem = "it does not exist; pass a checkpoint-N directory that a run has written".to_owned();
            return Err(broken(problem));
        }
        let json: Value = read_json(&path)?;
        let version = json.get("format_version").and_then(Value::as_u64);
        if version != Some(Self::FORMAT.into()) {
            let version = version.map_or_else(|| "none".to_owned(), |version| version.to_string());
            return Err(broken(format!(
                "it has format_version {version}; this version of Rekindle reads \
                 {}",
                Self::FORMAT
            )));
        }
        let state: Self = serde_json::from_value(json).map_err(|error| broken(error.to_string()))?;
        if state.configuration_sha256 != configuration_sha256(&state.configuration) {
            return Err(broken("its configuration was changed after it was written: the hash differs".to_owned()));
        }
        Ok(state)
    }
}

/// Returns the SHA-256 of a configuration as compact JSON.
pub(crate) fn configuration_sha256(configuration: &BTreeMap<String, Value>) -> String {
    let text = serde_json::to_vec(configuration).expect("JSON serializes");
    hex(&Sha256::digest(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> TrainerState {
        let configuration: BTreeMap<_, _> =
            [("seed".to_owned(), Value::from(3407)), ("train.learning_rate".to_owned(), Value::from(1.1e-4))].into();
        TrainerState {
            format_version: TrainerState::FORMAT,
            global_step: 4,
            optimizer_steps: 4,
            loss_scaler: Some(LossScaler::new(1.0 / 3.0)),
            examples_seen: 32,
            seconds: 0.1 + 0.2,
            last_evaluation: Some(4),
            best: Some(BestEvaluation { step: 2, eval_loss: 1.0 / 3.0 }),
            early_stopping_patience_counter: 1,
            configuration_sha256: configuration_sha256(&configuration),
            configuration,
            changeable: BTreeMap::new(),
        }
    }

    #[test]
    fn comes_back_to_the_last_bit() {
        let dir = tempfile::tempdir().unwrap();
        state().write(dir.path()).unwrap();
        assert_eq!(TrainerState::read(dir.path()).unwrap(), state());
    }

    #[test]
    fn what_is_no_state_of_this_program_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = || TrainerState::read(dir.path()).unwrap_err().to_string();
        assert!(error().contains("trainer_state.json: it does not exist"), "{}", error());
        type Change = fn(&mut TrainerState);
        let changes: [(Change, &str); 2] = [
            (|state| state.format_version = 9, "format_version 9; this version of Rekindle reads 2"),
            (|state| drop(state.configuration.remove("seed")), "the hash differs"),
        ];
        for (change, part) in changes {
            let mut other = state();
            change(&mut other);
            other.write(dir.path()).unwrap();
            assert!(error().contains(part), "{}", error());
        }
    }
}
