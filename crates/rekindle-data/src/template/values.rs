//! The values that a template receives from a row.

use std::fmt;
use std::sync::Arc;

use minijinja::Value;
use minijinja::value::{Object, ObjectRepr};
use serde_json::Value as Json;

use crate::message::Message;
use crate::numbers;

/// Names of a turn's reasoning.
pub(crate) const REASONING: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

/// Returns a message as a template receives it: without null keys, and with its reasoning under the two names that
/// templates read, `reasoning_content` and `thinking`. A null content stays, as none.
pub(super) fn message(message: &Message) -> Value {
    let mut fields: Vec<(Value, Value)> = Vec::with_capacity(message.extra.len() + 4);
    fields.push(("role".into(), message.role.as_str().into()));
    fields.push(("content".into(), message.content.as_deref().map_or(Value::from(()), Value::from)));
    let given = message.extra.iter().filter(|(_, value)| !value.is_null());
    fields.extend(given.map(|(name, value)| (name.as_str().into(), json(value))));
    let reasoning = REASONING.into_iter().find_map(|name| message.extra.get(name).filter(|value| !value.is_null()));
    if let Some(reasoning) = reasoning {
        let reasoning = json(reasoning);
        let mut set = |name: &str, replace: bool| {
            match fields.iter_mut().find(|(key, _)| key.as_str() == Some(name)) {
                Some((_, value)) if replace => *value = reasoning.clone(),
                Some(_) => {}
                None => fields.push((name.into(), reasoning.clone())),
            };
        };
        set("thinking", false);
        set("reasoning_content", true);
    }
    Value::from_pairs(fields)
}

/// Converts a JSON value; an integer keeps all its digits.
pub(super) fn json(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(number), _) => Value::from(number),
            (None, Some(number)) => Value::from(number),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(values) => Value::from(values.iter().map(json).collect::<Vec<_>>()),
        Json::Object(fields) => match numbers::integer_of(fields) {
            Some(digits) => integer(digits),
            None => Value::from_pairs(fields.iter().map(|(name, value)| (name.as_str(), json(value)))),
        },
    }
}

/// Converts an integer. The engine has integers of 128 bits; larger ones can be rendered and are numbers, but do not
/// support arithmetic.
fn integer(digits: &str) -> Value {
    match (digits.parse::<i128>(), digits.parse::<u128>()) {
        (Ok(number), _) => Value::from(number),
        (_, Ok(number)) => Value::from(number),
        _ => Value::from_object(Integer(digits.to_owned())),
    }
}

#[derive(Debug)]
struct Integer(String);

impl Object for Integer {
    fn repr(self: &Arc<Self>) -> ObjectRepr {
        ObjectRepr::Plain
    }

    fn render(self: &Arc<Self>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns true if a value is an integer, of any size. As in Python, a boolean is one.
pub(super) fn is_integer(value: &Value) -> bool {
    value.is_integer() || value.downcast_object_ref::<Integer>().is_some()
}

/// Returns true if a value is an integer or a float.
pub(super) fn is_number(value: &Value) -> bool {
    minijinja::tests::is_number(value) || is_integer(value)
}

/// Estimates the size of a value as JSON.
pub(super) fn size(value: &Json) -> usize {
    match value {
        Json::String(text) => text.len() + 2,
        Json::Array(values) => values.iter().map(|value| size(value) + 2).sum::<usize>() + 2,
        Json::Object(fields) => fields.iter().map(|(name, value)| name.len() + size(value) + 6).sum::<usize>() + 2,
        Json::Null | Json::Bool(_) | Json::Number(_) => 8,
    }
}
