use std::collections::BTreeMap;
use std::ops::Range;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Value};
use serde_json::Map;

use crate::error::{Error, Result};
use crate::message::Message;

mod budget;
mod clock;
mod concat;
mod filters;
mod generation;
mod json;
mod python;
mod values;

use budget::Budget;
pub(crate) use budget::STOPPED;
pub(crate) use values::REASONING;

const NAME: &str = "chat_template";

/// A chat template, rendered as in transformers.
///
/// It supports Jinja2 with `trim_blocks`, `lstrip_blocks`, `break`/`continue`, Python's methods of strings, lists and
/// dicts, `raise_exception`, `strftime_now`, `namespace` and a `tojson` equal to Python's `json.dumps`. Numbers are
/// formatted as in Python.
///
/// There are two differences from transformers. `strftime_now` returns UTC at the time when the template was read, so
/// that a conversation renders the same throughout a run. A rendering with too many steps or too much output is an
/// error; the limits grow with the conversation.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    /// The template with marks around the output of `{% generation %}` blocks, if it has any.
    marking: Option<Environment<'static>>,
    /// The file and the name, for errors.
    origin: Option<String>,
}

/// A rendering, and the parts of it from `{% generation %}` blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MarkedRendering {
    /// The text, as of [`ChatTemplate::render`].
    pub text: String,
    /// Non-empty byte ranges, in order and disjoint.
    pub spans: Vec<Range<usize>>,
}

/// The inputs of a template besides the messages.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RenderOptions {
    /// If true, the rendering ends with the beginning of an assistant turn.
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
    /// [`Error::Template`] with the line if the template does not parse.
    pub fn new(source: &str) -> Result<Self> {
        Self::with_special_tokens(source, &BTreeMap::new())
    }

    /// Reads a template; `special_tokens` are its variables `bos_token`, `eos_token` …
    ///
    /// # Errors
    /// [`Error::Template`] with the line if the template does not parse.
    pub fn with_special_tokens(source: &str, special_tokens: &BTreeMap<String, String>) -> Result<Self> {
        let (source, has_marks) = generation::as_filters(&unix_lines(source));
        let source = concat::as_calls(&source);
        let now = SystemTime::now();
        let mut environment = engine(now);
        environment.add_filter(generation::FILTER, |text: String| text);
        environment.add_template_owned(NAME, source.clone()).map_err(|error| Error::Template(describe(&error)))?;
        let marking = has_marks.then(|| {
            let mut environment = engine(now);
            environment.add_filter(generation::FILTER, generation::enclose);
            environment.add_template_owned(NAME, source).expect("it was just parsed");
            environment
        });
        Ok(ChatTemplate { environment, marking, special_tokens: special_tokens.clone(), origin: None })
    }

    /// Sets the file of the template, for errors.
    #[must_use]
    pub(crate) fn with_origin(self, origin: String) -> Self {
        ChatTemplate { origin: Some(origin), ..self }
    }

    /// Returns the file of the template, for errors.
    pub(crate) fn origin(&self) -> &str {
        self.origin.as_deref().unwrap_or("(given as text)")
    }

    /// Returns true if the template marks the assistant's text with `{% generation %}` blocks.
    pub fn has_marks(&self) -> bool {
        self.marking.is_some()
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`Error::Template`] if the template fails or calls `raise_exception`.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        self.try_render(messages, options).map_err(|message| self.error(message))
    }

    /// Renders a conversation, and returns the parts from `{% generation %}` blocks, as transformers'
    /// `return_assistant_tokens_mask` does.
    ///
    /// # Errors
    /// [`Error::Template`] as for [`render`](Self::render), and if the template inspects the output of a block.
    pub fn render_marked(&self, messages: &[Message], options: &RenderOptions) -> Result<MarkedRendering> {
        self.try_render_marked(messages, options).map_err(|message| self.error(message))
    }

    fn error(&self, message: String) -> Error {
        Error::Template(match &self.origin {
            Some(origin) => format!("{origin}: {message}"),
            None => message,
        })
    }

    pub(crate) fn try_render_marked(
        &self,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<MarkedRendering, String> {
        let text = self.try_render(messages, options)?;
        let Some(marking) = &self.marking else { return Ok(MarkedRendering { text, spans: Vec::new() }) };
        let (plain, spans) = generation::extract(&self.render_in(marking, messages, options)?);
        if plain != text {
            return Err("the text depends on the contents of its {% generation %} blocks".to_owned());
        }
        Ok(MarkedRendering { text, spans })
    }

    /// Renders like [`render`](Self::render), with an error message without the place.
    pub(crate) fn try_render(&self, messages: &[Message], options: &RenderOptions) -> Result<String, String> {
        self.render_in(&self.environment, messages, options)
    }

    fn render_in(
        &self,
        environment: &Environment<'static>,
        messages: &[Message],
        options: &RenderOptions,
    ) -> Result<String, String> {
        let mut context: BTreeMap<&str, Value> = BTreeMap::new();
        for (name, token) in &self.special_tokens {
            context.insert(name, Value::from(token.as_str()));
        }
        context.insert("messages", Value::from(messages.iter().map(values::message).collect::<Vec<_>>()));
        context.insert("tools", options.tools.as_ref().map_or(Value::from(()), values::json));
        context.insert("documents", Value::from(()));
        context.insert("add_generation_prompt", Value::from(options.add_generation_prompt));
        for (name, value) in &options.kwargs {
            context.insert(name, values::json(value));
        }
        Budget::of(messages, options).render(environment, NAME, &Value::from(context))
    }
}

impl std::fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ChatTemplate").field("special_tokens", &self.special_tokens).finish_non_exhaustive()
    }
}

/// Returns the Jinja engine with transformers' additions and Python's text formatting.
fn engine(now: SystemTime) -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_syntax(
        SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("standard delimiters are valid"),
    );
    environment.set_formatter(python::write_value);
    environment.add_function(concat::TEXT, python::text);
    environment.add_function(concat::LIST, filters::counted);
    environment.add_filter("tojson", json::tojson);
    filters::add(&mut environment);
    environment.add_test("number", values::is_number);
    environment.add_test("integer", values::is_integer);
    // The engine takes none for an empty list here; Python does not.
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", move |format: &str| clock::strftime(format, now));
    environment
}

/// Replaces every line end by `\n`, as Jinja2 does, also in string literals.
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
