//! The chat templates of a checkpoint, and the choice among them.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::OnceLock;

use crate::template::ChatTemplate;

/// The name of a template without a name.
pub(super) const DEFAULT: &str = "default";
/// The template for conversations with tools.
const TOOL_USE: &str = "tool_use";

/// A template in a file.
#[derive(Debug)]
pub(crate) struct TemplateSource {
    /// The name, or `default`.
    pub(crate) name: String,
    /// The file.
    pub(crate) path: PathBuf,
    pub(crate) text: String,
}

/// A template of a checkpoint.
#[derive(Debug)]
pub(crate) struct NamedTemplate {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// The template, or the error if it does not parse, which is reported only when the template is used.
    template: Result<ChatTemplate, String>,
    pub(crate) end_of_turn: OnceLock<Option<u32>>,
}

/// The templates of a checkpoint.
#[derive(Debug)]
pub(crate) struct Templates(Vec<NamedTemplate>);

impl NamedTemplate {
    pub(crate) fn template(&self) -> Result<&ChatTemplate, &str> {
        self.template.as_ref().map_err(String::as_str)
    }
}

impl Templates {
    pub(super) fn new(sources: Vec<TemplateSource>, special_tokens: &BTreeMap<String, String>) -> Self {
        let is_one = sources.len() == 1;
        let parse = |TemplateSource { name, path, text }: TemplateSource| {
            let origin = match is_one || name == DEFAULT {
                true => path.display().to_string(),
                false => format!("{} ({name})", path.display()),
            };
            let template = ChatTemplate::with_special_tokens(&text, special_tokens)
                .map_err(|error| format!("{origin}: {error}"))
                .map(|template| template.with_origin(origin));
            NamedTemplate { name, path, template, end_of_turn: OnceLock::new() }
        };
        Templates(sources.into_iter().map(parse).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &NamedTemplate> {
        self.0.iter()
    }

    /// Chooses as transformers' `apply_chat_template` does: the one with this name; else `tool_use` for a conversation
    /// with tools if it exists; else `default`, or the only one.
    pub(super) fn choose(&self, name: Option<&str>, has_tools: bool) -> Result<&NamedTemplate, String> {
        // As in a dict of Python, the last of several of one name.
        let called = |name: &str| self.0.iter().rev().find(|template| template.name == name);
        let names = || self.0.iter().map(|template| format!("{:?}", template.name)).collect::<Vec<_>>().join(", ");
        if let Some(name) = name {
            return called(name).ok_or_else(|| match self.0.is_empty() {
                true => format!("data.chat_template = {name:?}: this checkpoint has no chat template"),
                false => {
                    format!("data.chat_template = {name:?}: this checkpoint has no such template, only: {}", names())
                }
            });
        }
        match self.0.as_slice() {
            [] => {
                Err("this checkpoint has no chat template; add a chat_template.jinja, or use rows with \"prompt\" and \
                       \"completion\" or \"text\""
                    .to_owned())
            }
            [only] => Ok(only),
            _ => called(TOOL_USE).filter(|_| has_tools).or_else(|| called(DEFAULT)).ok_or_else(|| {
                format!(
                    "none of the chat templates is called \"default\", only: {}; choose one with data.chat_template",
                    names()
                )
            }),
        }
    }
}
