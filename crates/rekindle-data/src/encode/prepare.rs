//! Normalization of messages for a chat template.

use serde_json::Value;

use crate::message::Message;
use crate::numbers;
use crate::template::{ChatTemplate, RenderOptions};

/// Normalizes null contents, and arguments that are JSON as text.
pub(crate) fn settle(template: &ChatTemplate, messages: &mut Vec<Message>, options: &RenderOptions) {
    settle_null_contents(template, messages, options);
    if let Some(parsed) = parsed_if_needed(template, messages, options) {
        *messages = parsed;
    }
}

/// Keeps a null content beside calls as none, unless the template fails with it or renders "None"; then the content
/// becomes empty.
fn settle_null_contents(template: &ChatTemplate, messages: &mut [Message], options: &RenderOptions) {
    if messages.iter().all(|message| message.content.is_some()) {
        return;
    }
    let with = |content: &str| {
        let filled = messages.iter().map(|message| match message.content {
            None => Message { content: Some(content.to_owned()), ..message.clone() },
            Some(_) => message.clone(),
        });
        filled.collect::<Vec<_>>()
    };
    let as_none = template.try_render(messages, options);
    let is_written = || template.try_render(&with("None"), options) == as_none;
    if as_none.is_err() || is_written() {
        let filled = with("");
        messages.clone_from_slice(&filled);
    }
}

/// Returns the messages with the arguments of calls parsed, if they are JSON as text (as in OpenAI's rows) and the
/// template needs an object: it encodes them a second time, omits them, or fails.
fn parsed_if_needed(template: &ChatTemplate, messages: &[Message], options: &RenderOptions) -> Option<Vec<Message>> {
    let mut parsed = messages.to_vec();
    let mut texts = Vec::new();
    for message in &mut parsed {
        for call in calls(message) {
            if let Some(arguments) = arguments(call)
                && let Value::String(text) = arguments
                && let Ok(object @ Value::Object(_)) = numbers::parse(text)
                && numbers::integer(&object).is_none()
            {
                texts.push(std::mem::replace(arguments, object));
            }
        }
    }
    if texts.is_empty() {
        return None;
    }
    let encoded: Vec<[String; 2]> = texts.iter().map(encoded_again).collect();
    let twice = |text: &str| {
        let count = |encoded: &[String; 2]| {
            let [plain, ascii] = encoded;
            text.matches(plain.as_str()).count() + if plain == ascii { 0 } else { text.matches(ascii.as_str()).count() }
        };
        encoded.iter().map(count).sum::<usize>()
    };
    let as_text = template.try_render(messages, options);
    let shows = |text: &str| texts.iter().all(|arguments| text.contains(arguments.as_str().unwrap_or_default().trim()));
    if as_text.as_ref().is_ok_and(|text| twice(text) == 0 && shows(text)) {
        return None;
    }
    let as_objects = template.try_render(&parsed, options).ok()?;
    let is_better = match &as_text {
        Err(_) => true,
        Ok(text) if twice(text) > 0 => twice(&as_objects) < twice(text),
        Ok(text) => as_objects != *text,
    };
    is_better.then_some(parsed)
}

/// Returns the calls of a turn.
pub(super) fn calls(message: &mut Message) -> impl Iterator<Item = &mut Value> {
    message.extra.get_mut("tool_calls").and_then(Value::as_array_mut).into_iter().flatten()
}

/// Returns the object with a call's name and arguments: `function`, or the call itself.
pub(super) fn function(call: &mut Value) -> &mut Value {
    match call.get("function") {
        Some(Value::Object(_)) => &mut call["function"],
        _ => call,
    }
}

fn arguments(call: &mut Value) -> Option<&mut Value> {
    function(call).get_mut("arguments")
}

/// Returns a text as JSON, with and without escaped non-ASCII characters.
fn encoded_again(text: &Value) -> [String; 2] {
    let plain = text.to_string();
    let escape = |c: char| match c.is_ascii() {
        true => c.to_string(),
        false => c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect(),
    };
    let ascii = plain.chars().map(escape).collect();
    [plain, ascii]
}

#[cfg(test)]
mod tests;
