//! A reward and what it scores.

use serde_json::{Map, Value};

use crate::RewardError;

/// One completion to score.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The prompt as text; of a conversation, as the chat template renders it.
    pub prompt: &'a str,
    /// The token ids of the prompt; empty if they are not known.
    pub prompt_ids: &'a [u32],
    /// The completion as text, without special tokens.
    pub completion: &'a str,
    /// The sampled token ids, with the end token if the model produced it.
    pub completion_ids: &'a [u32],
    /// True if the completion reached the length limit before an end token.
    pub truncated: bool,
    /// The data row's other columns.
    pub row: &'a Map<String, Value>,
    /// The prompt's messages, if the row is a conversation.
    pub messages: Option<&'a Value>,
}

/// A function that scores completions.
pub trait Reward: Send {
    /// Returns the name under which scores appear in metrics.
    fn name(&self) -> &str;

    /// Returns one score per sample, in order. `None` is an explicit null, as in TRL: the score is not counted.
    ///
    /// # Errors
    ///
    /// Any failure to score; training stops with it.
    fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError>;
}
