//! Rewards that are reward models.

use serde::{Deserialize, Serialize};

/// A reward model, which scores a prompt with its completion.
///
/// This crate has no tensors: [`RewardSet::from_configs_with`](crate::RewardSet::from_configs_with) is given a loader.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRewardConfig {
    /// An adapter, or a checkpoint of sequence classification with one label: a directory, or a name on the Hugging Face hub.
    pub model: String,
    /// If true, the linears of the reward model are quantized to 4 bits. Default false.
    #[serde(default, skip_serializing_if = "core::ops::Not::not")]
    pub load_in_4bit: bool,
}

impl ModelRewardConfig {
    pub(crate) fn problem(&self) -> Option<String> {
        let problem = "model is empty; name an adapter or a checkpoint that method = \"reward\" has trained";
        self.model.trim().is_empty().then(|| problem.to_owned())
    }
}
