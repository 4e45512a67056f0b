use serde_json::{Map, Value, json};

use crate::numbers;

/// The roles that chat templates support.
pub(crate) const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Other names of roles, in ShareGPT's files and similar ones.
const OTHER_NAMES: [(&str, &str); 11] = [
    ("human", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("bot", "assistant"),
    ("model", "assistant"),
    ("function", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
    ("tool_response", "tool"),
];

/// Names of an assistant turn whose text is the JSON of its calls.
const CALLS: [&str; 2] = ["function_call", "tool_call"];

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// The text. `None` is the null beside `tool_calls`, which a template receives as none.
    pub content: Option<String>,
    /// All other fields of the turn (`tool_calls`, `reasoning_content`, `name` …), passed to the template unchanged.
    pub extra: Map<String, Value>,
}

impl Message {
    /// Returns a turn with only text.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: Some(content.into()), extra: Map::new() }
    }

    /// Returns the text, which is empty if there is none.
    pub fn text(&self) -> &str {
        self.content.as_deref().unwrap_or_default()
    }

    pub(crate) fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }

    /// Reads an element of a list of messages, with `role` and `content` or ShareGPT's `from` and `value`; `what` names
    /// it in errors. Null fields are removed, because tables with one type per column have many of them, and some
    /// templates check for the presence of a field.
    pub(crate) fn from_json(value: Value, what: &str) -> Result<Self, String> {
        let mut fields = match value {
            Value::Object(fields) if numbers::integer_of(&fields).is_none() => fields,
            other => {
                return Err(format!("{what} is {}, not an object with \"role\" and \"content\"", type_name(&other)));
            }
        };
        fields.retain(|_, value| !value.is_null());
        let sharegpt = fields.contains_key("from") && !fields.contains_key("role");
        let [role_key, content_key] = if sharegpt { ["from", "value"] } else { ["role", "content"] };
        let mut role = match fields.shift_remove(role_key) {
            Some(Value::String(role)) => role,
            Some(other) => return Err(format!("{what}.{role_key} is {}, not a string", type_name(&other))),
            None => return Err(format!("{what} has no \"role\"; its keys: {}", quoted_keys(&fields))),
        };
        let mut content = match fields.shift_remove(content_key) {
            Some(Value::String(text)) => Some(text),
            Some(Value::Array(parts)) => Some(join_parts(&parts, &format!("{what}.{content_key}"))?),
            Some(Value::Null) | None => None,
            Some(other) => {
                let kind = type_name(&other);
                return Err(format!("{what}.{content_key} is {kind}, not a string or a list of text parts"));
            }
        };
        if let Some((_, name)) = OTHER_NAMES.iter().find(|(other, _)| *other == role) {
            role = (*name).to_owned();
        } else if let (true, Some(text)) = (CALLS.contains(&role.as_str()), &content) {
            fields.insert("tool_calls".to_owned(), calls(text, &format!("{what} ({role})"))?);
            (role, content) = ("assistant".to_owned(), None);
        }
        if !ROLES.contains(&role.as_str()) {
            return Err(format!("{what}.{role_key} {role:?} is unknown; known: {}", ROLES.join(", ")));
        }
        check_calls(&mut fields, what)?;
        let calls = role == "assistant" && fields.contains_key("tool_calls");
        let spoken = matches!(role.as_str(), "user" | "assistant");
        match content {
            None if !calls => Err(format!("{what} ({role}) has no {content_key:?}")),
            // An empty system prompt or tool result says something; an empty question or answer is a broken row.
            Some(text) if text.trim().is_empty() && spoken && !calls => {
                Err(format!("{what} ({role}) is empty; remove the row or fill it in"))
            }
            content => Ok(Message { role, content, extra: fields }),
        }
    }
}

/// Checks `tool_calls`, and removes an empty list, which many exports have in every turn.
fn check_calls(fields: &mut Map<String, Value>, what: &str) -> Result<(), String> {
    let calls = match fields.get("tool_calls") {
        None => return Ok(()),
        Some(Value::Array(calls)) => calls,
        Some(other) => return Err(format!("{what}.tool_calls is {}, not a list of calls", type_name(other))),
    };
    for (index, call) in calls.iter().enumerate() {
        if !call.is_object() {
            return Err(format!("{what}.tool_calls[{index}] is {}, not an object", type_name(call)));
        }
        let name = call.get("function").unwrap_or(call).get("name").and_then(Value::as_str);
        if name.is_none_or(|name| name.trim().is_empty()) {
            return Err(format!(
                "{what}.tool_calls[{index}] has no name; expected {{\"function\": {{\"name\": …, \"arguments\": …}}}} \
                 or {{\"name\": …, \"arguments\": …}}"
            ));
        }
    }
    if calls.is_empty() {
        fields.shift_remove("tool_calls");
    }
    Ok(())
}

/// Parses the calls in a turn's text, `{"name": …, "arguments": …}` or a list of these, into the form that templates
/// use.
fn calls(text: &str, what: &str) -> Result<Value, String> {
    let value = numbers::parse(text).map_err(|error| format!("{what} is not the JSON of a call: {error}"))?;
    let calls = match value {
        Value::Array(calls) => calls,
        one => vec![one],
    };
    if calls.is_empty() || !calls.iter().all(|call| call.get("name").is_some_and(Value::is_string)) {
        return Err(format!("{what} is not of the form {{\"name\": …, \"arguments\": …}}"));
    }
    Ok(calls.into_iter().map(|call| json!({"type": "function", "function": call})).collect())
}

/// Joins `[{"type": "text", "text": …}, …]`.
fn join_parts(parts: &[Value], what: &str) -> Result<String, String> {
    let mut text = String::new();
    for (index, part) in parts.iter().enumerate() {
        match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
            (Some("text"), Some(piece)) => text.push_str(piece),
            (Some(kind), _) if kind != "text" => {
                return Err(format!("{what}[{index}] has type {kind:?}; only \"text\" is supported"));
            }
            _ => return Err(format!("{what}[{index}] is not of the form {{\"type\": \"text\", \"text\": …}}")),
        }
    }
    Ok(text)
}

/// Returns the type of a JSON value, with its article.
pub(crate) fn type_name(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(fields) if numbers::integer_of(fields).is_some() => "a number",
        Value::Object(_) => "an object",
    }
}

/// Returns the keys of an object for an error message.
pub(crate) fn quoted_keys(fields: &Map<String, Value>) -> String {
    if fields.is_empty() {
        return "none".to_owned();
    }
    let name = |(key, value): (&String, &Value)| format!("{key:?}{}", if value.is_null() { " (null)" } else { "" });
    fields.iter().map(name).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn error(value: Value) -> String {
        Message::from_json(value, "messages[1]").expect_err("a broken message")
    }

    #[test]
    fn text_parts_are_joined_and_other_fields_kept() {
        let value = json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "Ann"});
        let message = Message::from_json(value, "m").expect("valid");
        assert_eq!(message.text(), "ab");
        assert_eq!(message.extra["name"], "Ann");
    }

    #[test]
    fn a_call_of_a_tool_needs_no_content() {
        let turn = |content| {
            let value = json!({"role": "assistant", "content": content, "tool_calls": [{"name": "clock"}]});
            Message::from_json(value, "m").expect("valid").content
        };
        assert_eq!((turn(json!(null)), turn(json!(""))), (None, Some(String::new())));
        let value = json!({"role": "assistant", "tool_calls": [{"function": {"name": "clock"}}]});
        assert_eq!(Message::from_json(value, "m").expect("valid").content, None);
    }

    #[test]
    fn calls_are_a_list_of_objects_with_names() {
        let turn = |content: &str, calls: Value| json!({"role": "assistant", "content": content, "tool_calls": calls});
        // An empty list says nothing, beside an answer and beside none.
        let answer = Message::from_json(turn("a", json!([])), "m").expect("valid");
        assert_eq!(answer, Message::new("assistant", "a"));
        for empty in ["", " "] {
            assert_eq!(error(turn(empty, json!([]))), "messages[1] (assistant) is empty; remove the row or fill it in");
        }
        for content in ["", "a"] {
            assert_eq!(error(turn(content, json!({}))), "messages[1].tool_calls is an object, not a list of calls");
            for text in ["", "[]", "[{\"name\": \"clock\"}]"] {
                assert_eq!(
                    error(turn(content, json!(text))),
                    "messages[1].tool_calls is a string, not a list of calls"
                );
            }
            assert_eq!(error(turn(content, json!([3]))), "messages[1].tool_calls[0] is a number, not an object");
            assert_eq!(error(turn(content, json!([null]))), "messages[1].tool_calls[0] is null, not an object");
            for call in [json!({}), json!({"function": {}}), json!({"function": {"name": ""}}), json!({"name": 3})] {
                let found = error(turn(content, json!([{"name": "clock"}, call])));
                assert!(found.starts_with("messages[1].tool_calls[1] has no name; expected "), "{found}");
            }
        }
        // Only the assistant calls.
        let user = json!({"role": "user", "content": "", "tool_calls": [{"name": "clock"}]});
        assert_eq!(error(user), "messages[1] (user) is empty; remove the row or fill it in");
    }

    #[test]
    fn sharegpt_names_its_turns_otherwise() {
        for (from, role) in [("human", "user"), ("gpt", "assistant"), ("system", "system"), ("observation", "tool")] {
            let message = Message::from_json(json!({"from": from, "value": "x"}), "m").expect("valid");
            assert_eq!(message, Message::new(role, "x"));
            assert_eq!(Message::from_json(json!({"role": from, "content": "x"}), "m").expect("valid"), message);
        }
        let call = json!({"name": "clock", "arguments": {"zone": "UTC"}});
        let turn = json!({"from": "function_call", "value": call.to_string()});
        let message = Message::from_json(turn, "m").expect("valid");
        assert_eq!((message.role.as_str(), message.content), ("assistant", None));
        assert_eq!(message.extra["tool_calls"], json!([{"type": "function", "function": call}]));
    }

    #[test]
    fn null_fields_are_left_out() {
        let turn = json!({"role": "user", "content": "q", "tool_calls": null, "name": null});
        assert_eq!(Message::from_json(turn, "m").expect("valid"), Message::new("user", "q"));
    }

    #[test]
    fn errors_name_the_place_and_the_way_out() {
        assert_eq!(
            error(json!({"role": "asistant", "content": "x"})),
            "messages[1].role \"asistant\" is unknown; known: system, developer, user, assistant, tool"
        );
        assert_eq!(error(json!("hi")), "messages[1] is a string, not an object with \"role\" and \"content\"");
        assert_eq!(
            error(json!({"speaker": "human", "value": "x"})),
            "messages[1] has no \"role\"; its keys: \"speaker\", \"value\""
        );
        assert_eq!(
            error(json!({"from": "narrator", "value": "x"})),
            "messages[1].from \"narrator\" is unknown; known: system, developer, user, assistant, tool"
        );
        assert_eq!(error(json!({"from": "gpt", "value": null})), "messages[1] (assistant) has no \"value\"");
        assert_eq!(
            error(json!({"from": "function_call", "value": "{}"})),
            "messages[1] (function_call) is not of the form {\"name\": …, \"arguments\": …}"
        );
        assert_eq!(error(json!({"role": 3})), "messages[1].role is a number, not a string");
        assert_eq!(error(json!({"role": "user"})), "messages[1] (user) has no \"content\"");
        assert_eq!(
            error(json!({"role": "user", "content": " \n"})),
            "messages[1] (user) is empty; remove the row or fill it in"
        );
        assert_eq!(
            error(json!({"role": "user", "content": 4})),
            "messages[1].content is a number, not a string or a list of text parts"
        );
        assert_eq!(
            error(json!({"role": "user", "content": [{"type": "image", "url": "x"}]})),
            "messages[1].content[0] has type \"image\"; only \"text\" is supported"
        );
        assert_eq!(
            error(json!({"role": "user", "content": ["x"]})),
            "messages[1].content[0] is not of the form {\"type\": \"text\", \"text\": …}"
        );
    }
}
