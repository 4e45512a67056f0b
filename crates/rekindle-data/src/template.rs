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

/// A chat template, rendered as transformers renders it.
///
/// Jinja2 with `trim_blocks`, `lstrip_blocks`, `break`/`continue`, Python's methods of strings, lists and dicts,
/// `raise_exception`, `strftime_now`, `namespace` and a `tojson` that writes what Python's `json.dumps` writes. Numbers
/// are written as Python writes them, everywhere.
///
/// Two differences from transformers. `strftime_now` gives UTC, at the time the template was read, so that a
/// conversation renders the same for a whole run. A rendering that takes too many steps or writes too much is an error;
/// the limits grow with the conversation.
pub struct ChatTemplate {
    environment: Environment<'static>,
    special_tokens: BTreeMap<String, String>,
    /// As `environment`, with marks around what `{% generation %}` blocks write, where there are such blocks.
    marking: Option<Environment<'static>>,
    /// The file and perhaps the name, for errors.
    origin: Option<String>,
}

/// A rendering and what of it stands in `{% generation %}` blocks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marked {
    /// What [`ChatTemplate::render`] gives.
    pub text: String,
    /// Byte ranges, in order and apart, none of them empty.
    pub spans: Vec<Range<usize>>,
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

    /// Names the file that the template is from in errors.
    #[must_use]
    pub(crate) fn with_origin(self, origin: String) -> Self {
        ChatTemplate { origin: Some(origin), ..self }
    }

    /// The file that the template is from, for errors.
    pub(crate) fn origin(&self) -> &str {
        self.origin.as_deref().unwrap_or("(given as text)")
    }

    /// Returns true if the template marks what the assistant says, with `{% generation %}` blocks.
    pub fn has_marks(&self) -> bool {
        self.marking.is_some()
    }

    /// The text of a conversation.
    ///
    /// # Errors
    /// [`Error::Template`] when the template fails or calls `raise_exception`.
    pub fn render(&self, messages: &[Message], options: &RenderOptions) -> Result<String> {
        self.try_render(messages, options).map_err(|message| self.error(message))
    }

    /// The text of a conversation, and what of it the template marks with `{% generation %}` blocks: transformers'
    /// `return_assistant_tokens_mask` before it goes to tokens.
    ///
    /// # Errors
    /// [`Error::Template`] as for [`render`](Self::render), and when the template looks into what a block wrote.
    pub fn render_marked(&self, messages: &[Message], options: &RenderOptions) -> Result<Marked> {
        self.try_render_marked(messages, options).map_err(|message| self.error(message))
    }

    fn error(&self, message: String) -> Error {
        Error::Template(match &self.origin {
            Some(origin) => format!("{origin}: {message}"),
            None => message,
        })
    }

    pub(crate) fn try_render_marked(&self, messages: &[Message], options: &RenderOptions) -> Result<Marked, String> {
        let text = self.try_render(messages, options)?;
        let Some(marking) = &self.marking else { return Ok(Marked { text, spans: Vec::new() }) };
        let (plain, spans) = generation::extract(&self.render_in(marking, messages, options)?);
        if plain != text {
            return Err("the text depends on what its {% generation %} blocks hold".to_owned());
        }
        Ok(Marked { text, spans })
    }

    /// As [`render`](Self::render), with the bare message for whoever knows the place better.
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

/// Jinja with what transformers adds to it, and text as Python has it.
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
