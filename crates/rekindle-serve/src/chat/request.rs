//! The body of a chat completion.

use serde_json::{Map, Value};

use crate::engine::{ChatInput, EngineLimits};
use crate::error::ApiError;
use crate::fields::{Fields, type_name};
use crate::params::{IGNORED, MAX_LOGPROBS, Params};

use super::tools::{self, ToolChoice};

const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// A request for the next turn of a conversation.
#[derive(Debug)]
pub(crate) struct ChatRequest {
    pub(crate) params: Params,
    pub(crate) chat: ChatInput,
    pub(crate) tool_choice: ToolChoice,
    pub(crate) parallel_tool_calls: bool,
    pub(crate) max_tokens: Option<usize>,
    /// The number of most likely tokens to return with each token; `None` returns no log-probabilities.
    pub(crate) logprobs: Option<usize>,
}

impl ChatRequest {
    pub(crate) fn read(body: Value, limits: EngineLimits) -> Result<Self, ApiError> {
        let mut fields = Fields::new(body, "")?;
        let params = Params::take(&mut fields, limits)?;
        let chat = Self::read_conversation(&mut fields)?;
        let tool_choice = ToolChoice::read(&mut fields, chat.tools.as_ref())?;
        let parallel_tool_calls = fields.boolean("parallel_tool_calls")?.unwrap_or(true);
        let max_tokens = max_tokens(&mut fields)?;
        let logprobs = logprobs(&mut fields)?;
        if let Some(modalities) = fields.list("modalities")?
            && modalities.iter().any(|kind| kind != "text")
        {
            return Err(fields.error("modalities", "may only be [\"text\"]"));
        }
        fields.finish(&IGNORED)?;
        Ok(Self { params, chat, tool_choice, parallel_tool_calls, max_tokens, logprobs })
    }

    /// Takes the conversation: messages, tools, and the options of the template.
    pub(crate) fn read_conversation(fields: &mut Fields) -> Result<ChatInput, ApiError> {
        let messages = fields.list("messages")?.ok_or_else(|| fields.error("messages", "is missing"))?;
        if messages.is_empty() {
            return Err(fields.error("messages", "is an empty list"));
        }
        let messages: Vec<_> =
            messages.into_iter().enumerate().map(|(at, turn)| message(at, turn)).collect::<Result<_, _>>()?;
        let tools = tools::read(fields)?;
        let mut kwargs = fields.object("chat_template_kwargs")?.unwrap_or_default();
        if let Some(effort) = fields.string("reasoning_effort")? {
            kwargs.entry("reasoning_effort").or_insert(Value::String(effort));
        }
        let continue_final_message = fields.boolean("continue_final_message")?.unwrap_or(false);
        let add_generation_prompt = fields.boolean("add_generation_prompt")?;
        if continue_final_message && add_generation_prompt == Some(true) {
            return Err(fields.error("continue_final_message", "and add_generation_prompt are both true"));
        }
        if continue_final_message && messages.last().is_some_and(|last| last["role"] != "assistant") {
            return Err(fields.error("continue_final_message", "is true, and the last message is not the assistant's"));
        }
        Ok(ChatInput {
            messages,
            tools,
            kwargs,
            add_generation_prompt: add_generation_prompt.unwrap_or(!continue_final_message),
            continue_final_message,
        })
    }
}

fn max_tokens(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let old = fields.count("max_tokens", 1, usize::MAX)?;
    let new = fields.count("max_completion_tokens", 1, usize::MAX)?;
    match (old, new) {
        (Some(old), Some(new)) if old != new => {
            Err(fields.error("max_tokens", format_args!("is {old}, and max_completion_tokens is {new}; give one")))
        }
        (old, new) => Ok(new.or(old)),
    }
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, ApiError> {
    let asked = fields.boolean("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs", 0, MAX_LOGPROBS)?;
    if top.is_some_and(|top| top > 0) && !asked {
        return Err(fields.error("top_logprobs", "is set without logprobs = true"));
    }
    Ok(asked.then(|| top.unwrap_or(0)))
}

/// Checks a message, and joins the parts of its content.
fn message(at: usize, value: Value) -> Result<Map<String, Value>, ApiError> {
    let path = format!("messages[{at}]");
    let wrong =
        |field: &str, problem: String| ApiError::field(format!("{path}{field}"), format!("{path}{field} {problem}"));
    let Value::Object(mut turn) = value else {
        return Err(wrong("", format!("is {}, not an object", type_name(&value))));
    };
    turn.retain(|_, value| !value.is_null());
    let role = match turn.get("role") {
        Some(Value::String(role)) if ROLES.contains(&role.as_str()) => role.clone(),
        Some(Value::String(role)) => {
            return Err(wrong(".role", format!("{role:?} is unknown; known: {}", ROLES.join(", "))));
        }
        Some(other) => return Err(wrong(".role", format!("is {}, not a string", type_name(other)))),
        None => return Err(wrong(".role", "is missing".to_owned())),
    };
    match turn.get("content") {
        Some(Value::String(_)) => {}
        Some(Value::Array(parts)) => {
            let text = join(parts).map_err(|(part, problem)| wrong(&format!(".content[{part}]"), problem))?;
            turn.insert("content".to_owned(), Value::String(text));
        }
        Some(other) => return Err(wrong(".content", format!("is {}, not a string or a list", type_name(other)))),
        None if role == "assistant" && turn.contains_key("tool_calls") => {}
        None => return Err(wrong(".content", "is missing".to_owned())),
    }
    match turn.get("tool_calls") {
        None => {}
        Some(Value::Array(calls)) => {
            let named = |call: &Value| call["function"]["name"].as_str().is_some_and(|name| !name.is_empty());
            if let Some(call) = calls.iter().position(|call| !named(call)) {
                return Err(wrong(&format!(".tool_calls[{call}]"), "has no function.name".to_owned()));
            }
        }
        Some(other) => return Err(wrong(".tool_calls", format!("is {}, not a list", type_name(other)))),
    }
    // What a client sends back of an answer, and a template must not see.
    for field in ["refusal", "annotations", "audio", "function_call"] {
        turn.shift_remove(field);
    }
    Ok(turn)
}

fn join(parts: &[Value]) -> Result<String, (usize, String)> {
    let mut text = String::new();
    for (at, part) in parts.iter().enumerate() {
        match (part["type"].as_str(), part["text"].as_str()) {
            (Some("text"), Some(piece)) => text += piece,
            (Some("text"), None) => return Err((at, "has no text".to_owned())),
            (Some(kind), _) => return Err((at, format!("has the type {kind:?}; only \"text\" is supported"))),
            (None, _) => return Err((at, "has no type".to_owned())),
        }
    }
    Ok(text)
}
