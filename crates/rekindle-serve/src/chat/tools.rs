//! Tools: their descriptions, the choice among them, and grammars that demand calls.

use serde_json::{Value, json};

use crate::chat_format::ToolFormat;
use crate::constraint::{Grammar, json_options};
use crate::error::ApiError;
use crate::fields::{Fields, type_name};

/// The value of `tool_choice`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    None,
    Auto,
    Required,
    Named(String),
}

/// Takes `tools`; an empty list is none.
pub(crate) fn read(fields: &mut Fields) -> Result<Option<Value>, ApiError> {
    let Some(tools) = fields.list("tools")? else { return Ok(None) };
    for (at, tool) in tools.iter().enumerate() {
        let wrong = |field: &str, problem: &str| {
            let name = format!("tools[{at}]{field}");
            ApiError::field(name.clone(), format!("{name} {problem}"))
        };
        if tool["type"] != "function" {
            return Err(wrong(".type", "must be \"function\""));
        }
        let function = &tool["function"];
        let name = function["name"].as_str().unwrap_or_default();
        let is_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if name.is_empty() || name.len() > 128 || !name.chars().all(is_name) {
            return Err(wrong(".function.name", "must have 1 to 128 letters, digits, \"_\", \"-\" and \".\""));
        }
        if !matches!(function["parameters"], Value::Null | Value::Object(_)) {
            return Err(wrong(".function.parameters", "must be a JSON schema, an object"));
        }
    }
    Ok((!tools.is_empty()).then_some(Value::Array(tools)))
}

impl ToolChoice {
    pub(crate) fn read(fields: &mut Fields, tools: Option<&Value>) -> Result<Self, ApiError> {
        let choice = match fields.take("tool_choice") {
            None => return Ok(if tools.is_some() { Self::Auto } else { Self::None }),
            Some(Value::String(choice)) => match choice.as_str() {
                "none" => Self::None,
                "auto" => Self::Auto,
                "required" => Self::Required,
                other => {
                    let known = "\"none\", \"auto\", \"required\" or a function";
                    return Err(fields.error("tool_choice", format_args!("is {other:?}; it must be {known}")));
                }
            },
            Some(Value::Object(choice)) => {
                match choice.get("function").and_then(|function| function["name"].as_str()) {
                    Some(name) => Self::Named(name.to_owned()),
                    None => return Err(fields.error("tool_choice", "has no function.name")),
                }
            }
            Some(other) => {
                return Err(fields.error("tool_choice", format_args!("is {}, not a string", type_name(&other))));
            }
        };
        if tools.is_none() && !matches!(choice, Self::None | Self::Auto) {
            return Err(fields.error("tool_choice", "demands a call, and there are no tools"));
        }
        if let Self::Named(name) = &choice
            && !functions(tools).any(|function| function["name"] == name.as_str())
        {
            let names: Vec<&str> = functions(tools).filter_map(|function| function["name"].as_str()).collect();
            let problem = format!("names {name:?}, which is none of the tools: {}", names.join(", "));
            return Err(fields.error("tool_choice", problem));
        }
        Ok(choice)
    }
}

fn functions(tools: Option<&Value>) -> impl Iterator<Item = &Value> {
    tools.and_then(Value::as_array).into_iter().flatten().map(|tool| &tool["function"])
}

/// Returns the grammar of an answer that is one or more calls, if the choice demands it. `special` returns the id of a
/// text that is a special token.
pub(crate) fn grammar(
    format: ToolFormat,
    tools: &Value,
    choice: &ToolChoice,
    many: bool,
    special: impl Fn(&str) -> Option<u32>,
) -> Option<Grammar> {
    let chosen: Vec<&Value> = match choice {
        ToolChoice::None | ToolChoice::Auto => return None,
        ToolChoice::Required => functions(Some(tools)).collect(),
        ToolChoice::Named(name) => {
            functions(Some(tools)).filter(|function| function["name"] == name.as_str()).collect()
        }
    };
    let mark = |text: &str| match special(text) {
        Some(id) => format!("<[{id}]>"),
        None => Value::from(text).to_string(),
    };
    let (before, between, after) = match format {
        ToolFormat::Hermes => (String::new(), "\n", ""),
        ToolFormat::Llama => (String::new(), "; ", ""),
        ToolFormat::Mistral => (format!("{} \"[\"", mark("[TOOL_CALLS]")), ", ", "]"),
    };
    let call = match format {
        ToolFormat::Hermes => format!("{} \"\\n\" body \"\\n\" {}", mark("<tool_call>"), mark("</tool_call>")),
        ToolFormat::Llama | ToolFormat::Mistral => "body".to_owned(),
    };
    let more = if many { format!("({} call)*", Value::from(between)) } else { String::new() };
    let after = if after.is_empty() { String::new() } else { Value::from(after).to_string() };
    let start = format!("{before} call {more} {after}");
    let names: Vec<String> = (0..chosen.len()).map(|at| format!("body_{at}")).collect();
    let mut lark = format!("start: {}\ncall: {call}\nbody: {}\n", start.trim(), names.join(" | "));
    for (at, function) in chosen.iter().enumerate() {
        let head = format!("{{\"name\": {}, \"{}\": ", function["name"], format.arguments_key());
        let mut schema = function.get("parameters").filter(|schema| schema.is_object()).cloned();
        let schema = schema.get_or_insert_with(|| json!({"type": "object"}));
        schema["x-guidance"] = json_options();
        lark += &format!("body_{at}: {} arguments_{at} \"}}\"\narguments_{at}: %json {schema}\n", Value::from(head));
    }
    Some(Grammar::Lark(lark))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::answer::{AnswerParser, AnswerPart};
    use crate::constraint::{Preamble, TokenConstraint, Vocabulary};

    /// Returns true if the grammar accepts `text` byte by byte, and an end after it.
    fn accepts(grammar: &Grammar, text: &str) -> bool {
        let tokens = (0..=255u8).map(|byte| vec![byte]).chain([b"\xff<|end|>".to_vec()]).collect();
        let vocabulary = Arc::new(Vocabulary::new(tokens, &[256]).unwrap());
        let mut constraint = TokenConstraint::new(&vocabulary, grammar, Preamble::None).unwrap();
        let ids = text.bytes().map(u32::from).chain([256]);
        ids.into_iter().all(|id| {
            let mask = constraint.allowed().unwrap();
            mask[id as usize / 32] >> (id % 32) & 1 == 1 && constraint.accept(id).is_ok()
        })
    }

    #[test]
    fn demanded_calls_have_the_form_that_is_parsed() {
        let node =
            json!({"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "additionalProperties": false});
        let tools = json!([
            {"type": "function", "function": {"name": "add", "parameters": {
                "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
                "additionalProperties": false}}},
            {"type": "function", "function": {"name": "walk", "parameters": {
                "$defs": {"node": node}, "$ref": "#/$defs/node"}}},
            {"type": "function", "function": {"name": "now"}},
        ]);
        let two = [
            (
                ToolFormat::Hermes,
                [
                    "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"a\": 1}}\n</tool_call>\n",
                    "<tool_call>\n{\"name\": \"walk\", \"arguments\": {\"next\":{\"next\": {}}}}\n</tool_call>",
                ],
            ),
            (
                ToolFormat::Llama,
                [
                    "{\"name\": \"add\", \"parameters\": {\"a\": 1}}; ",
                    "{\"name\": \"walk\", \"parameters\": {\"next\": {}}}",
                ],
            ),
            (
                ToolFormat::Mistral,
                [
                    "[TOOL_CALLS][{\"name\": \"add\", \"arguments\": {\"a\": 1}}, ",
                    "{\"name\": \"walk\", \"arguments\": {}}]",
                ],
            ),
        ];
        for (format, texts) in two {
            let text = texts.concat();
            let required = grammar(format, &tools, &ToolChoice::Required, true, |_| None).unwrap();
            assert!(accepts(&required, &text), "{format:?}");
            assert!(!accepts(&required, &text.replace("add", "sub")), "{format:?}");
            assert!(!accepts(&required, &text.replace("{\"a\": 1}", "{\"b\": 1}")), "{format:?}");
            assert!(!accepts(&required, "Hello"), "{format:?}");
            let single = grammar(format, &tools, &ToolChoice::Required, false, |_| None).unwrap();
            assert!(!accepts(&single, &text), "{format:?}");
            let named = grammar(format, &tools, &ToolChoice::Named("now".to_owned()), false, |_| None).unwrap();
            assert!(!accepts(&named, &text), "{format:?}");
            let mut parser = AnswerParser::new(false, false, Some(format), usize::MAX);
            let parts = [parser.push(&text), parser.finish()].concat();
            let calls = parts.iter().filter(|part| matches!(part, AnswerPart::Call(_))).count();
            assert_eq!((calls, parts.len()), (2, 2), "{format:?}");
        }
        assert_eq!(grammar(ToolFormat::Hermes, &tools, &ToolChoice::Auto, true, |_| None), None);
    }
}
