use std::collections::BTreeMap;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Value};
use serde_json::Map;

use crate::error::{Error, Result};
use crate::message::Message;

mod clock;
mod generation;
mod json;

const NAME: &str = "chat_template";

/// A chat template, rendered as transformers renders it.
///
/// Jinja2 with `trim_blocks`, `lstrip_blocks`, `break`/`continue`, Python's methods of strings, lists and dicts,
/// `raise_exception`, `strftime_now`, `namespace` and a `tojson` that writes what Python's `json.dumps` writes.
/// Differences: `strftime_now` gives UTC, at the time the template was read, so that a conversation renders the same for
/// a whole run; `{% generation %}` blocks mark nothing.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
}

/// What a template gets beside the messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RenderOptions {
    /// End with the beginning of an assistant turn.
    pub add_generation_prompt: bool,
    /// Descriptions of tools.
    pub tools: Option<serde_json::Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub kwargs: Map<String, serde_json::Value>,
}

impl ChatTemplate {
    /// Reads a template that uses no special tokens.
    ///
    /// # Errors
    /// [`Error::Template`] with the line when the template does not parse.
    pub fn new(source: &str) -> Result<Self> {
        Self::with_special_tokens(source, &BTreeMap::new())
    }

    /// Reads a template; `special_tokens` are its variables `bos_token`, `eos_token` …
    ///
    /// # Errors
    /// [`Error::Template`] with the line when the template does not parse.
    pub fn with_special_tokens(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        let mut environment = Environment::new();
        environment.set_syntax(
            SyntaxConfig::builder()
                .trim_blocks(true)
                .lstrip_blocks(true)
                .build()
                .expect("standard delimiters are valid"),
        );
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_filter("tojson", json::tojson);
        environment.add_function("raise_exception", raise_exception);
        let now = SystemTime::now();
        environment.add_function("strftime_now", move |format: &str| clock::strftime(format, now));
        environment
            .add_template_owned(NAME, generation::neutralize(&unix_lines(source)))
            .map_err(|error| Error::Template(describe(&error)))?;
        Ok(ChatTemplate { environment, special_tokens: special_tokens.clone() })
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`Error::Template`] when the template fails or calls `raise_exception`.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        self.try_render(messages, options).map_err(Error::Template)
    }

    /// As [`render`](Self::render), with the bare message for whoever knows the place better.
    pub(crate) fn try_render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, String> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, token) in &self.special_tokens {
            context.insert(name, Value::from(token.as_str()));
        }
        context.insert("messages", messages.iter().map(with_reasoning).collect());
        context.insert("tools", Value::from(Serde(&options.tools)));
        context.insert("documents", Value::from(()));
        context.insert("add_generation_prompt", Value::from(options.add_generation_prompt));
        for (name, value) in &options.kwargs {
            context.insert(name, Value::from(Serde(value)));
        }
        let template = self.environment.get_template(NAME).expect("added when the template was read");
        template.render(context).map_err(|error| describe(&error))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("special_tokens", &self.special_tokens).finish_non_exhaustive()
    }
}

/// A message as a template sees it. Reasoning goes by several names; templates read `reasoning_content` or `thinking`.
fn with_reasoning(message: &Message) -> Value {
    let extra = &message.extra;
    let reasoning = ["reasoning_content", "thinking", "reasoning"]
        .into_iter()
        .find_map(|name| extra.get(name).filter(|reasoning| !reasoning.is_null()));
    let Some(reasoning) = reasoning.cloned() else {
        return Value::from(Serde(message));
    };
    let mut message = message.clone();
    message.extra.entry("thinking").or_insert_with(|| reasoning.clone());
    message.extra.insert("reasoning_content".to_owned(), reasoning);
    Value::from(Serde(message))
}

/// Jinja2 reads every line end as `\n`, also inside of string literals.
fn unix_lines(source: &str) -> String {
    source.replace("\r\n", "\n").replace('\r', "\n")
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(minijinja::Error::new(minijinja::ErrorKind::InvalidOperation, message))
}

fn describe(error: &minijinja::Error) -> String {
    let what = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
    match error.line() {
        Some(line) => format!("{what} (line {line} of the template)"),
        None => what,
    }
}

#[cfg(test)]
mod tests;
