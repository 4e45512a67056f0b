//! Conversations: `messages`, ShareGPT's `conversations`, and lists of messages in other formats.

use serde_json::{Map, Value};

use super::RowContent;
use crate::chat_prompt::ChatPrompt;
use crate::message::{Message, quoted_keys, type_name};
use crate::numbers;

/// Reads a row whose turns are `value`, called `name`.
pub(super) fn read(value: Value, name: &str, mut fields: Map<String, Value>) -> Result<RowContent, String> {
    let messages = all_turns(value, name, &mut fields)?;
    finish(messages, 0, name, fields)
}

/// Reads the turns `value`, called `name`, after ShareGPT's separate system prompt.
fn all_turns(value: Value, name: &str, fields: &mut Map<String, Value>) -> Result<Vec<Message>, String> {
    let mut messages = turns(value, name)?;
    if name == "conversations"
        && let Some(system) = system_prompt(fields)?
    {
        if messages[0].role == "system" {
            return Err("has \"system\" beside \"conversations\", which begin with a system turn; keep one".to_owned());
        }
        messages.insert(0, Message::new("system", system));
    }
    Ok(messages)
}

/// Reads a conversation to answer: the fields of a row, or only the list of its messages.
pub(crate) fn read_prompt(value: Value) -> Result<ChatPrompt, String> {
    let mut fields = match value {
        Value::Array(_) => Map::from_iter([("messages".to_owned(), value)]),
        value => super::object(value)?,
    };
    let Some(name) = ["messages", "conversations"].into_iter().find(|name| fields.contains_key(*name)) else {
        return Err(format!("has no \"messages\"; its keys: {}", quoted_keys(&fields)));
    };
    let turns = fields.shift_remove(name).unwrap_or_default();
    let messages = all_turns(turns, name, &mut fields)?;
    if messages.last().is_some_and(Message::is_assistant) {
        return Err(format!(
            "{name:?} ends with a turn of the assistant, which leaves nothing to answer; remove that turn"
        ));
    }
    let (tools, kwargs) = for_template(&mut fields)?;
    Ok(ChatPrompt { messages, tools, kwargs, ..ChatPrompt::default() })
}

/// Reads a list of turns.
pub(super) fn turns(value: Value, name: &str) -> Result<Vec<Message>, String> {
    let Value::Array(values) = value else {
        return Err(format!("\"{name}\" is {}, not a list of messages", type_name(&value)));
    };
    if values.is_empty() {
        return Err(format!("\"{name}\" is an empty list"));
    }
    values.into_iter().enumerate().map(|(i, value)| Message::from_json(value, &format!("{name}[{i}]"))).collect()
}

/// Returns the conversation with its other fields; turns from `trained_from` on are called `name`.
pub(super) fn finish(
    messages: Vec<Message>,
    trained_from: usize,
    name: &str,
    mut fields: Map<String, Value>,
) -> Result<RowContent, String> {
    if !messages[trained_from..].iter().any(Message::is_assistant) {
        return Err(format!("{name:?} has no assistant turn, so it has no token to train on"));
    }
    let (tools, kwargs) = for_template(&mut fields)?;
    Ok(RowContent::Messages { messages, trained_from, tools, kwargs })
}

/// Takes `tools` and `chat_template_kwargs`, which are passed to the template.
fn for_template(fields: &mut Map<String, Value>) -> Result<(Option<Value>, Map<String, Value>), String> {
    let tools = match fields.shift_remove("tools") {
        None | Some(Value::Null) => None,
        Some(tools) => Some(list_of_tools(tools)?),
    };
    let kwargs = match fields.shift_remove("chat_template_kwargs") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(kwargs)) if numbers::integer_of(&kwargs).is_none() => kwargs,
        Some(other) => return Err(format!("\"chat_template_kwargs\" is {}, not an object", type_name(&other))),
    };
    Ok((tools, kwargs))
}

/// Takes `system`, unless it is empty.
pub(super) fn system_prompt(fields: &mut Map<String, Value>) -> Result<Option<String>, String> {
    match fields.shift_remove("system") {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text).filter(|text| !text.trim().is_empty())),
        Some(other) => Err(format!("\"system\" is {}, not a string", type_name(&other))),
    }
}

/// Returns `tools` as a list; tables with one type per column often have it as JSON text. A template would iterate over
/// the characters of a text without an error.
fn list_of_tools(tools: Value) -> Result<Value, String> {
    let tools = match tools {
        Value::String(text) if text.trim().is_empty() => Value::Array(Vec::new()),
        Value::String(text) => numbers::parse(&text)
            .map_err(|error| format!("\"tools\" is a string, but not the JSON of a list of tools: {error}"))?,
        tools => tools,
    };
    if tools.is_array() { Ok(tools) } else { Err(format!("\"tools\" is {}, not a list of tools", type_name(&tools))) }
}
