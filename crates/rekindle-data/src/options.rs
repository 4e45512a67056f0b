//! Options of encoding.

use serde::{Deserialize, Serialize};

use crate::mask::{NotShown, Thinking, TrainOn, Untrained};
use crate::overlong::Overlong;

/// Options of encoding: the length limit, the vocabulary, and which tokens are trained.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncodeOptions {
    /// The most tokens of an example, at least 2.
    pub max_seq_length: usize,
    /// Handling of longer rows.
    pub overlong: Overlong,
    /// The vocabulary of the model; an id that is not below it is an error.
    pub vocab_size: Option<usize>,
    /// The turns of a conversation that are trained.
    pub train_on: TrainOn,
    /// Handling of reasoning.
    pub thinking: Thinking,
    /// Handling of rows without a label that counts.
    pub untrained: Untrained,
    /// Handling of rows of which the chat template leaves something out.
    pub not_shown: NotShown,
    /// The name of the chat template, of a checkpoint that has several. Default: as transformers chooses, `tool_use` for
    /// rows with tools, else `default`.
    pub chat_template: Option<String>,
    /// True if rows of `text` end with the end token, which counts.
    // Left out of fingerprints where it is the default, so that caches of before it stay valid.
    #[serde(skip_serializing_if = "is_true")]
    pub text_end_token: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_true(value: &bool) -> bool {
    *value
}

impl Default for EncodeOptions {
    fn default() -> Self {
        EncodeOptions {
            max_seq_length: 2048,
            overlong: Overlong::Error,
            vocab_size: None,
            train_on: TrainOn::Assistant,
            thinking: Thinking::Keep,
            untrained: Untrained::Error,
            not_shown: NotShown::Error,
            chat_template: None,
            text_end_token: true,
        }
    }
}
