//! Options of encoding.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::mask::{NotShown, Thinking, TrainOn, Untrained};
use crate::overlong::Overlong;

/// The kind of rows that a training method reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RowTask {
    /// Rows to imitate, one example each.
    #[default]
    Sft,
    /// Pairs of a chosen and a rejected answer: two examples each, the chosen one first.
    Pairs,
    /// Pairs of answers for a reward model, with an optional `margin`. Answers are scored whole: none is cut.
    #[serde(rename = "scored_pairs")]
    ScoredPairs,
    /// Answers that are labelled as desirable or undesirable. A pair is one of each.
    Labelled,
    /// Prompts that a model answers in training: examples without labels.
    Prompts,
}

impl RowTask {
    /// Returns true if each row is a pair of examples.
    pub fn is_pairs(self) -> bool {
        matches!(self, Self::Pairs | Self::ScoredPairs)
    }

    /// Returns the number of examples of a row: 2 of a pair.
    pub fn examples_per_row(self) -> usize {
        if self.is_pairs() { 2 } else { 1 }
    }
}

/// Options of encoding: the maximum length, the vocabulary, and the loss mask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncodeOptions {
    /// The maximum number of tokens of an example, at least 2.
    pub max_seq_length: usize,
    /// The treatment of longer rows.
    pub overlong: Overlong,
    /// The vocabulary size of the model; a larger id is an error.
    pub vocab_size: Option<usize>,
    /// The turns of a conversation that the loss covers.
    pub train_on: TrainOn,
    /// The treatment of reasoning.
    pub thinking: Thinking,
    /// The treatment of rows without a label that counts.
    pub untrained: Untrained,
    /// The treatment of rows of which the chat template omits a part.
    pub not_shown: NotShown,
    /// The name of a chat template, for a checkpoint with several. Default: as transformers chooses, `tool_use` for
    /// rows with tools, else `default`.
    pub chat_template: Option<String>,
    /// If true, rows of `text` end with the end token, which the loss covers.
    // Left out of fingerprints where it is the default, so that caches of before it stay valid.
    #[serde(skip_serializing_if = "is_true")]
    pub text_end_token: bool,
    /// The kind of rows.
    #[serde(skip_serializing_if = "is_sft")]
    pub task: RowTask,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_sft(value: &RowTask) -> bool {
    *value == RowTask::Sft
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_true(value: &bool) -> bool {
    *value
}

impl EncodeOptions {
    /// Refuses options that have no meaning for rows of preferences, or for prompts.
    pub(crate) fn check_preferences(&self) -> Result<()> {
        if self.task == RowTask::Sft {
            return Ok(());
        }
        if self.task == RowTask::Prompts {
            return match self.overlong {
                Overlong::Error | Overlong::Drop => Ok(()),
                Overlong::Truncate | Overlong::Split => Err(Error::Options(
                    "a part of a prompt asks something else; for prompts, overlong can be \"error\" or \"drop\""
                        .to_owned(),
                )),
            };
        }
        let problem = if self.overlong == Overlong::Split {
            "overlong = \"split\" would compare a part of an answer; rows of preferences can be dropped or truncated"
        } else if self.overlong == Overlong::Truncate && self.task == RowTask::ScoredPairs {
            "overlong = \"truncate\" would score an answer without its end; rows for a reward model can be dropped"
        } else if self.train_on == TrainOn::All {
            "train_on = \"all\" would compare prompts, which are the same; use \"assistant\" or \"last_assistant\""
        } else {
            return Ok(());
        };
        Err(Error::Options(problem.to_owned()))
    }
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
            task: RowTask::Sft,
        }
    }
}
