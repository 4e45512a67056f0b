//! Prompts that a model answers in training.

use serde_json::{Map, Value};

use super::{conversation, pretokenized};
use crate::chat_prompt::ChatPrompt;
use crate::message::{quoted_keys, type_name};

/// The prompt of a row, not yet encoded.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PromptContent {
    /// Token ids.
    Ids(Vec<u32>),
    /// A text.
    Text(String),
    /// A conversation up to the assistant's answer.
    Chat(ChatPrompt),
}

/// Reads a row with a prompt: `prompt_ids`, `prompt` as a string or a list of messages, `messages` or `conversations`. The
/// other columns are for rewards.
pub(crate) fn read_prompt_row(mut fields: Map<String, Value>) -> Result<PromptContent, String> {
    let mut take = |key: &str| fields.shift_remove(key).filter(|value| !value.is_null());
    if let Some(ids) = take("prompt_ids") {
        return pretokenized::read_prompt(&ids, "prompt_ids").map(PromptContent::Ids);
    }
    match take("prompt") {
        Some(Value::String(text)) if text.is_empty() => Err("\"prompt\" is empty".to_owned()),
        Some(Value::String(text)) => Ok(PromptContent::Text(text)),
        Some(messages @ Value::Array(_)) => {
            fields.shift_remove("conversations");
            fields.insert("messages".to_owned(), messages);
            conversation::read_prompt(Value::Object(fields)).map(PromptContent::Chat)
        }
        Some(other) => Err(format!("\"prompt\" is {}; it must be a string or a list of messages", type_name(&other))),
        None if fields.contains_key("messages") || fields.contains_key("conversations") => {
            conversation::read_prompt(Value::Object(fields)).map(PromptContent::Chat)
        }
        None => Err(format!(
            "has no \"prompt\", and this method samples answers to prompts; its keys: {}",
            quoted_keys(&fields)
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::row::object;

    fn prompt(row: Value) -> Result<PromptContent, String> {
        read_prompt_row(object(row).expect("an object"))
    }

    #[test]
    fn prompts_are_ids_texts_or_conversations() {
        assert_eq!(prompt(json!({"prompt_ids": [3, 4], "prompt": "q"})), Ok(PromptContent::Ids(vec![3, 4])));
        assert_eq!(prompt(json!({"prompt": "q", "answer": 4})), Ok(PromptContent::Text("q".to_owned())));
        let turns = json!([{"role": "user", "content": "q"}]);
        let chat = PromptContent::Chat(ChatPrompt::new(None, "q"));
        assert_eq!(prompt(json!({"prompt": turns, "solution": "x"})), Ok(chat.clone()));
        assert_eq!(prompt(json!({"messages": turns})), Ok(chat));
        let error = |row: Value| prompt(row).expect_err("refused");
        assert!(error(json!({"text": "q"})).starts_with("has no \"prompt\""));
        assert_eq!(error(json!({"prompt": 4})), "\"prompt\" is a number; it must be a string or a list of messages");
        assert_eq!(error(json!({"prompt_ids": []})), "\"prompt_ids\" is an empty list");
        let answered = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]);
        assert!(error(json!({"messages": answered})).contains("leaves nothing to answer"));
    }
}
