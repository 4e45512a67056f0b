use std::fmt;

use serde_json::{Map, Value};

use crate::message::{Message, quoted_keys, type_name};

/// One line of a dataset, not yet encoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The line in the file, counted from 1.
    pub line: usize,
    /// What stands there.
    pub content: RowContent,
}

/// The shapes a row can have. Keys that belong to none of them are ignored.
///
/// Where a row has the keys of several shapes, the first of this order is taken: `input_ids`, `messages`,
/// `prompt` + `completion`, `text`.
#[derive(Debug, Clone, PartialEq)]
pub enum RowContent {
    /// `messages`, or `prompt` and `completion` as two lists of messages.
    Messages {
        /// The whole conversation.
        messages: Vec<Message>,
        /// Assistant turns count from this one on: 0, or the length of the prompt.
        trained_from: usize,
        /// `tools`, for the template.
        tools: Option<Value>,
        /// `chat_template_kwargs`, for the template.
        kwargs: Map<String, Value>,
    },
    /// `prompt` and `completion` as strings; only the completion counts.
    PromptCompletion {
        /// What is given.
        prompt: String,
        /// What is learned.
        completion: String,
    },
    /// `text`, all of which counts.
    Text(String),
    /// `input_ids` and perhaps `labels`, of the same length.
    InputIds {
        /// Token ids.
        input_ids: Vec<u32>,
        /// −100 or a token id each; the ids themselves when absent.
        labels: Option<Vec<i32>>,
    },
}

/// The name of a row's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum RowFormat {
    /// `messages`
    Messages,
    /// `prompt` + `completion`
    PromptCompletion,
    /// `text`
    Text,
    /// `input_ids`
    InputIds,
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            RowFormat::Messages => "messages",
            RowFormat::PromptCompletion => "prompt + completion",
            RowFormat::Text => "text",
            RowFormat::InputIds => "input_ids",
        })
    }
}

impl RowContent {
    /// The name of this shape.
    pub fn format(&self) -> RowFormat {
        match self {
            RowContent::Messages { trained_from: 0, .. } => RowFormat::Messages,
            RowContent::Messages { .. } | RowContent::PromptCompletion { .. } => RowFormat::PromptCompletion,
            RowContent::Text(_) => RowFormat::Text,
            RowContent::InputIds { .. } => RowFormat::InputIds,
        }
    }

    /// Reads one JSON value.
    pub(crate) fn from_json(value: Value) -> Result<Self, String> {
        let Value::Object(mut fields) = value else {
            return Err(format!("expected a JSON object, found {}", type_name(&value)));
        };
        if let Some(ids) = fields.shift_remove("input_ids") {
            return pretokenized(ids, &fields);
        }
        if let Some(messages) = fields.shift_remove("messages") {
            return conversation(read_messages(messages, "messages")?, 0, fields);
        }
        match (fields.shift_remove("prompt"), fields.shift_remove("completion")) {
            (Some(prompt), Some(completion)) => prompt_completion(prompt, completion, fields),
            (Some(_), None) => Err("has \"prompt\" but no \"completion\"".to_owned()),
            (None, Some(_)) => Err("has \"completion\" but no \"prompt\"".to_owned()),
            (None, None) => match fields.shift_remove("text") {
                Some(Value::String(text)) if text.is_empty() => Err("\"text\" is empty".to_owned()),
                Some(Value::String(text)) => Ok(RowContent::Text(text)),
                Some(other) => Err(format!("\"text\" is {}, not a string", type_name(&other))),
                None => Err(format!(
                    "unknown kind of row; its keys: {}; known: \"messages\", \"prompt\" with \"completion\", \"text\", \
                     \"input_ids\" (with or without \"labels\")",
                    quoted_keys(&fields)
                )),
            },
        }
    }
}

fn prompt_completion(prompt: Value, completion: Value, fields: Map<String, Value>) -> Result<RowContent, String> {
    match (prompt, completion) {
        (Value::String(prompt), Value::String(completion)) => {
            if completion.is_empty() {
                return Err("\"completion\" is empty".to_owned());
            }
            Ok(RowContent::PromptCompletion { prompt, completion })
        }
        (prompt @ Value::Array(_), completion @ Value::Array(_)) => {
            let mut messages = read_messages(prompt, "prompt")?;
            let trained_from = messages.len();
            messages.extend(read_messages(completion, "completion")?);
            conversation(messages, trained_from, fields)
        }
        (prompt, completion) => Err(format!(
            "\"prompt\" is {} and \"completion\" is {}; both must be strings, or both lists of messages",
            type_name(&prompt),
            type_name(&completion)
        )),
    }
}

fn conversation(
    messages: Vec<Message>,
    trained_from: usize,
    mut fields: Map<String, Value>,
) -> Result<RowContent, String> {
    if !messages[trained_from..].iter().any(Message::is_assistant) {
        let place = if trained_from > 0 { "\"completion\"" } else { "\"messages\"" };
        return Err(format!("{place} has no assistant turn, so no label counts"));
    }
    let tools = fields.shift_remove("tools").filter(|tools| !tools.is_null());
    let kwargs = match fields.shift_remove("chat_template_kwargs") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(kwargs)) => kwargs,
        Some(other) => return Err(format!("\"chat_template_kwargs\" is {}, not an object", type_name(&other))),
    };
    Ok(RowContent::Messages { messages, trained_from, tools, kwargs })
}

fn read_messages(value: Value, name: &str) -> Result<Vec<Message>, String> {
    let Value::Array(values) = value else {
        return Err(format!("\"{name}\" is {}, not a list of messages", type_name(&value)));
    };
    if values.is_empty() {
        return Err(format!("\"{name}\" is an empty list"));
    }
    values.into_iter().enumerate().map(|(i, value)| Message::from_json(value, &format!("{name}[{i}]"))).collect()
}

fn pretokenized(ids: Value, fields: &Map<String, Value>) -> Result<RowContent, String> {
    // Ids and labels share the range of i32, so that −100 fits beside every id.
    let input_ids: Vec<u32> = integers(&ids, "input_ids", 0)?.into_iter().map(i32::unsigned_abs).collect();
    if input_ids.is_empty() {
        return Err("\"input_ids\" is an empty list".to_owned());
    }
    let beside = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let values = integers(value, name, crate::IGNORED)?;
            if values.len() != input_ids.len() {
                return Err(format!("\"{name}\" has {} elements, \"input_ids\" {}", values.len(), input_ids.len()));
            }
            Ok(Some(values))
        }
    };
    let labels = beside("labels")?;
    if let Some(bad) = labels.iter().flatten().find(|&&label| label < 0 && label != crate::IGNORED) {
        return Err(format!("\"labels\" holds {bad}; only token ids and -100 (ignored) are allowed"));
    }
    if beside("attention_mask")?.is_some_and(|mask| mask.contains(&0)) {
        return Err("\"attention_mask\" hides tokens; remove the padding from \"input_ids\"".to_owned());
    }
    Ok(RowContent::InputIds { input_ids, labels })
}

fn integers(value: &Value, name: &str, min: i32) -> Result<Vec<i32>, String> {
    let Value::Array(values) = value else {
        return Err(format!("\"{name}\" is {}, not a list of integers", type_name(value)));
    };
    let read = |(i, value): (usize, &Value)| {
        let number = value.as_i64().and_then(|number| i32::try_from(number).ok()).filter(|&number| number >= min);
        number.ok_or_else(|| format!("{name}[{i}] is {value}; expected an integer from {min} to {}", i32::MAX))
    };
    values.iter().enumerate().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn error(value: Value) -> String {
        RowContent::from_json(value).expect_err("a broken row")
    }

    #[test]
    fn shapes_are_told_apart_by_their_keys() {
        let of = |value| RowContent::from_json(value).expect("valid").format();
        let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        assert_eq!(of(json!({"messages": turns, "prompt": "unused", "id": 3})), RowFormat::Messages);
        assert_eq!(of(json!({"prompt": "a", "completion": "b"})), RowFormat::PromptCompletion);
        assert_eq!(of(json!({"prompt": [turns[0]], "completion": [turns[1]]})), RowFormat::PromptCompletion);
        assert_eq!(of(json!({"text": "a"})), RowFormat::Text);
        assert_eq!(of(json!({"input_ids": [1], "text": "a"})), RowFormat::InputIds);
    }

    #[test]
    fn errors_say_what_was_found_and_what_is_known() {
        let cases = [
            (json!([1]), "expected a JSON object, found a list"),
            (
                json!({"instruction": "a", "output": "b"}),
                "unknown kind of row; its keys: \"instruction\", \"output\"; known: \"messages\", \"prompt\" with \
                 \"completion\", \"text\", \"input_ids\" (with or without \"labels\")",
            ),
            (json!({"prompt": "a"}), "has \"prompt\" but no \"completion\""),
            (json!({"completion": "a"}), "has \"completion\" but no \"prompt\""),
            (json!({"prompt": "a", "completion": ""}), "\"completion\" is empty"),
            (
                json!({"prompt": "a", "completion": []}),
                "\"prompt\" is a string and \"completion\" is a list; both must be strings, or both lists of messages",
            ),
            (json!({"messages": []}), "\"messages\" is an empty list"),
            (json!({"messages": "hi"}), "\"messages\" is a string, not a list of messages"),
            (
                json!({"messages": [{"role": "user", "content": "q"}]}),
                "\"messages\" has no assistant turn, so no label counts",
            ),
            (json!({"text": null}), "\"text\" is null, not a string"),
            (json!({"text": ""}), "\"text\" is empty"),
            (json!({"input_ids": "1 2"}), "\"input_ids\" is a string, not a list of integers"),
            (json!({"input_ids": []}), "\"input_ids\" is an empty list"),
            (json!({"input_ids": [1, -2]}), "input_ids[1] is -2; expected an integer from 0 to 2147483647"),
            (json!({"input_ids": [1.5]}), "input_ids[0] is 1.5; expected an integer from 0 to 2147483647"),
            (json!({"input_ids": [1, 2], "labels": [1]}), "\"labels\" has 1 elements, \"input_ids\" 2"),
            (
                json!({"input_ids": [1, 2], "labels": [1, -1]}),
                "\"labels\" holds -1; only token ids and -100 (ignored) are allowed",
            ),
            (
                json!({"input_ids": [1, 0], "attention_mask": [1, 0]}),
                "\"attention_mask\" hides tokens; remove the padding from \"input_ids\"",
            ),
        ];
        for (row, message) in cases {
            assert_eq!(error(row), message);
        }
    }
}
