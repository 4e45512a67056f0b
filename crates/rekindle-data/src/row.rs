use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::message::{Message, type_name};
use crate::numbers;

mod alpaca;
mod conversation;
mod preference;
mod pretokenized;
mod prompt;
mod proposal;

pub(crate) use conversation::read_prompt;
pub(crate) use preference::{AnswerContent, Preference, read_labelled, read_pair};
pub(crate) use prompt::{PromptContent, read_prompt_row};

/// The keys of every row format. If a row has the keys of several, the first format applies.
///
/// Keys that belong to no format are excluded: `tools`, `system`, `chat_template_kwargs`, `input`, `labels`.
pub(crate) const SHAPES: [(RowFormat, &[&str]); 6] = [
    (RowFormat::InputIds, &["input_ids"]),
    (RowFormat::Messages, &["messages"]),
    (RowFormat::Conversations, &["conversations"]),
    (RowFormat::PromptCompletion, &["prompt", "completion"]),
    (RowFormat::Alpaca, &["instruction", "output"]),
    (RowFormat::Text, &["text"]),
];

/// Keys that some format reads in addition to its own.
pub(crate) const BESIDE: [&str; 15] = [
    "labels",
    "attention_mask",
    "tools",
    "chat_template_kwargs",
    "system",
    "input",
    "history",
    "chosen",
    "rejected",
    "label",
    "margin",
    "prompt_ids",
    "chosen_ids",
    "rejected_ids",
    "completion_ids",
];

/// The content of a row, not yet encoded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum RowContent {
    /// A conversation: `messages`, `conversations`, `prompt` and `completion` as two lists of messages, or an alpaca
    /// row for a checkpoint with a chat template.
    Messages {
        /// The whole conversation.
        messages: Vec<Message>,
        /// The first trained turn: 0, or the length of the prompt.
        trained_from: usize,
        /// `tools`, for the template.
        tools: Option<Value>,
        /// `chat_template_kwargs`, for the template.
        kwargs: Map<String, Value>,
    },
    /// `prompt` and `completion` as strings, or an alpaca row as text; the loss covers only the completion.
    PromptCompletion {
        /// The prompt.
        prompt: String,
        /// The completion.
        completion: String,
    },
    /// `text`; the loss covers all of it.
    Text(String),
    /// `input_ids` and perhaps `labels`, of the same length.
    InputIds {
        /// Token ids.
        input_ids: Vec<u32>,
        /// −100 or a token id each; the ids themselves if absent.
        labels: Option<Vec<i32>>,
    },
}

/// The format of a row. Unknown keys and null values are ignored.
///
/// If a row has the keys of several formats, the first in this order applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[non_exhaustive]
#[serde(rename_all = "snake_case")]
pub enum RowFormat {
    /// `input_ids`, optionally with `labels`.
    InputIds,
    /// `messages` with `role` and `content`, optionally with `tools` and `chat_template_kwargs`.
    Messages,
    /// ShareGPT's `conversations`: turns of `from` (`human`, `gpt` …) and `value`, or of `role` and `content`,
    /// optionally with `system` and `tools`.
    Conversations,
    /// `prompt` and `completion`: two strings, or two lists of messages.
    PromptCompletion,
    /// Alpaca's `instruction` and `output`, optionally with `input` and `system`.
    ///
    /// With a chat template: a user turn of the instruction, an empty line and the input, answered by the output.
    /// Without: Stanford Alpaca's text as prompt, the output as completion.
    Alpaca,
    /// `text`.
    Text,
    /// `chosen` and `rejected`, with `prompt` or beginning with it: strings, or lists of messages; or `prompt_ids`,
    /// `chosen_ids` and `rejected_ids`.
    Preference,
    /// `prompt` and `completion` with `label`, true for a desirable completion; or `prompt_ids` and `completion_ids`.
    LabelledCompletion,
    /// `prompt`, a string or a list of messages; `messages` or `conversations` without an answer; or `prompt_ids`.
    Prompt,
}

/// The number of a row in its file, from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RowNumber {
    /// The line, in JSON lines.
    Line(usize),
    /// The element of a JSON list, or the row of a Parquet file.
    Row(usize),
}

impl RowNumber {
    /// Returns the number.
    pub fn get(self) -> usize {
        match self {
            RowNumber::Line(number) | RowNumber::Row(number) => number,
        }
    }
}

impl fmt::Display for RowNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RowNumber::Line(number) => write!(f, "line {number}"),
            RowNumber::Row(number) => write!(f, "row {number}"),
        }
    }
}

impl RowFormat {
    /// Returns the name for reports: the keys of the format.
    pub fn name(self) -> &'static str {
        match self {
            RowFormat::InputIds => "input_ids",
            RowFormat::Messages => "messages",
            RowFormat::Conversations => "conversations (sharegpt)",
            RowFormat::PromptCompletion => "prompt + completion",
            RowFormat::Alpaca => "instruction + output (alpaca)",
            RowFormat::Text => "text",
            RowFormat::Preference => "chosen + rejected",
            RowFormat::LabelledCompletion => "prompt + completion + label",
            RowFormat::Prompt => "prompt",
        }
    }
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl RowContent {
    /// Reads the fields of a row; `has_template` is true if an alpaca row becomes a conversation.
    pub(crate) fn read(mut fields: Map<String, Value>, has_template: bool) -> Result<(RowFormat, Self), String> {
        let is = |fields: &Map<String, Value>, key: &str| fields.get(key).is_some_and(|value| !value.is_null());
        // An empty cell of a table is null; the input asks then.
        if fields.get("instruction").is_some_and(Value::is_null) && is(&fields, "input") && is(&fields, "output") {
            fields.insert("instruction".to_owned(), Value::String(String::new()));
        }
        let has = |key: &&str| is(&fields, key);
        // A format with a missing key applies only if no format is complete, so that the error can name the key.
        let whole = SHAPES.iter().find(|(_, keys)| keys.iter().all(has));
        if whole.is_none() && has(&"chosen") && has(&"rejected") {
            return Err(proposal::PREFERENCE.to_owned());
        }
        let Some((format, keys)) = whole.or_else(|| SHAPES.iter().find(|(_, keys)| keys.iter().any(has))) else {
            return Err(proposal::unknown(&fields, has_template));
        };
        if let (Some(there), Some(lacking)) = (keys.iter().find(|key| has(key)), keys.iter().find(|key| !has(key))) {
            return Err(proposal::lacking(&fields, there, lacking, has_template));
        }
        let mut take = |key: &str| fields.shift_remove(key).unwrap_or_default();
        let content = match format {
            RowFormat::InputIds => pretokenized::read(take("input_ids"), &fields),
            RowFormat::Messages => conversation::read(take("messages"), "messages", fields),
            RowFormat::Conversations => conversation::read(take("conversations"), "conversations", fields),
            RowFormat::PromptCompletion => prompt_completion(take("prompt"), take("completion"), "completion", fields),
            RowFormat::Alpaca => alpaca::read(fields, has_template),
            RowFormat::Text => match take("text") {
                Value::String(text) if text.is_empty() => Err("\"text\" is empty".to_owned()),
                Value::String(text) => Ok(RowContent::Text(text)),
                other => Err(format!("\"text\" is {}, not a string", type_name(&other))),
            },
            RowFormat::Preference | RowFormat::LabelledCompletion | RowFormat::Prompt => {
                unreachable!("not among the shapes")
            }
        };
        Ok((*format, content?))
    }

    /// Reads one JSON value, for a checkpoint with a chat template.
    #[cfg(test)]
    pub(crate) fn from_json(value: Value) -> Result<Self, String> {
        object(value).and_then(|fields| Self::read(fields, true)).map(|(_, content)| content)
    }
}

/// Returns the fields of a row.
pub(crate) fn object(value: Value) -> Result<Map<String, Value>, String> {
    match value {
        Value::Object(fields) if numbers::integer_of(&fields).is_none() => Ok(fields),
        other => Err(format!("expected a JSON object, found {}", type_name(&other))),
    }
}

/// Reads a prompt and its completion, called `name`.
fn prompt_completion(
    prompt: Value,
    completion: Value,
    name: &str,
    fields: Map<String, Value>,
) -> Result<RowContent, String> {
    match (prompt, completion) {
        (Value::String(prompt), Value::String(completion)) => {
            if completion.is_empty() {
                return Err(format!("{name:?} is empty"));
            }
            Ok(RowContent::PromptCompletion { prompt, completion })
        }
        (prompt @ Value::Array(_), completion @ Value::Array(_)) => {
            let mut messages = conversation::turns(prompt, "prompt")?;
            let trained_from = messages.len();
            messages.extend(conversation::turns(completion, name)?);
            conversation::finish(messages, trained_from, name, fields)
        }
        (prompt, completion) => Err(format!(
            "\"prompt\" is {} and {name:?} is {}; both must be strings, or both lists of messages",
            type_name(&prompt),
            type_name(&completion)
        )),
    }
}

#[cfg(test)]
mod tests;
