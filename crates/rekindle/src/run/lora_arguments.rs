//! `[lora]`: the adapter of a run.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use toml::Table;

use super::sections::{SectionReader, fields_of};
use crate::LoraConfig;

/// `[lora]`: the arguments of `get_peft_model`, or an adapter to continue training.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LoraArguments {
    /// An adapter to continue training, a directory or a name on the hub, instead of a new one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// The arguments of a new adapter.
    #[serde(flatten)]
    pub config: LoraConfig,
    /// The keys that the run file sets; an adapter to continue must agree with them.
    #[serde(skip)]
    pub given: Vec<String>,
}

/// The key of `[lora]` that is no argument of `get_peft_model`.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct InitFrom {
    init_from: Option<PathBuf>,
}

impl From<LoraConfig> for LoraArguments {
    fn from(config: LoraConfig) -> Self {
        Self { config, ..Self::default() }
    }
}

impl LoraArguments {
    /// Reads the section. A new adapter is initialized from the run's `seed` unless `random_state` is given.
    pub(super) fn read(reader: &mut SectionReader, mut table: Table, seed: u64) -> Self {
        let own = fields_of::<InitFrom>();
        let own: Table = own.into_iter().filter_map(|key| table.remove_entry(key)).collect();
        let InitFrom { init_from } = reader.read("lora", own);
        let given: Vec<String> = table.keys().cloned().collect();
        let mut config: LoraConfig = reader.read("lora", table);
        if !given.iter().any(|key| key == "random_state") {
            config.random_state = seed;
        }
        Self { init_from, config, given }
    }
}
