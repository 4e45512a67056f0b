use std::fmt;

use crate::{Error, HubErrorKind};

/// A name `organization/name` that follows the hub's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RepoName {
    pub(crate) kind: RepoKind,
    pub(crate) organization: String,
    pub(crate) name: String,
}

/// The kind of a repository.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RepoKind {
    /// A model or an adapter.
    Model,
    /// A dataset.
    Dataset,
}

impl RepoKind {
    pub(crate) fn noun(self) -> &'static str {
        match self {
            RepoKind::Model => "model",
            RepoKind::Dataset => "dataset",
        }
    }
}

/// The maximum length of each part of a name.
const MAX_LENGTH: usize = 96;

impl RepoName {
    /// Parses a name.
    ///
    /// # Errors
    /// [`HubErrorKind::Name`], with the violated rule.
    pub(crate) fn parse(kind: RepoKind, name: &str) -> Result<RepoName, Error> {
        let refuse = |reason: String| Error::Hub { kind: HubErrorKind::Name, name: name.to_owned(), reason };
        let Some((organization, own)) = name.split_once('/') else {
            return Err(refuse(format!(
                "there is no such directory, and hub names have the form organization/{}",
                kind.noun()
            )));
        };
        for part in [organization, own] {
            if let Some(rule) = broken_rule(part) {
                return Err(refuse(format!(
                    "there is no such directory, and {part:?} is not a valid hub name: {rule}"
                )));
            }
        }
        Ok(RepoName { kind, organization: organization.to_owned(), name: own.to_owned() })
    }

    /// Returns the directory name in the cache.
    pub(crate) fn folder(&self) -> String {
        format!("{}s--{}--{}", self.kind.noun(), self.organization, self.name)
    }

    /// Returns the path of its page and files on the hub.
    pub(crate) fn path(&self) -> String {
        match self.kind {
            RepoKind::Model => self.to_string(),
            RepoKind::Dataset => format!("datasets/{self}"),
        }
    }
}

impl fmt::Display for RepoName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.organization, self.name)
    }
}

fn broken_rule(part: &str) -> Option<String> {
    let is_word = |character: char| character.is_ascii_alphanumeric() || character == '_';
    if part.is_empty() {
        return Some("a part is empty".to_owned());
    }
    if part.len() > MAX_LENGTH {
        return Some(format!("it is longer than {MAX_LENGTH} characters"));
    }
    if let Some(wrong) = part.chars().find(|&character| !is_word(character) && !"-.".contains(character)) {
        return Some(format!("it has {wrong:?}; letters, digits, '-', '_' and '.' are allowed"));
    }
    if !part.starts_with(is_word) || !part.ends_with(is_word) {
        return Some("it begins or ends with '-' or '.'".to_owned());
    }
    ["--", ".."].iter().find(|twice| part.contains(**twice)).map(|twice| format!("it has {twice:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_map_to_the_hub_and_to_the_cache() {
        for name in ["unsloth/Qwen3-4B-Thinking-2507", "meta-llama/Llama-3.2-1B", "a/b", "_x/0.1_y"] {
            assert_eq!(RepoName::parse(RepoKind::Model, name).unwrap().to_string(), name);
        }
        assert_eq!(RepoName::parse(RepoKind::Model, "Qwen/Qwen3-0.6B").unwrap().folder(), "models--Qwen--Qwen3-0.6B");
        let rows = RepoName::parse(RepoKind::Dataset, "org/rows").unwrap();
        assert_eq!((rows.folder(), rows.path()), ("datasets--org--rows".to_owned(), "datasets/org/rows".to_owned()));
    }

    #[test]
    fn the_violated_rule_is_named() {
        let cases = [
            ("qwen3", "have the form organization/model"),
            ("a/b/c", "it has '/'"),
            ("/b", "a part is empty"),
            ("Qwen/", "a part is empty"),
            ("Qwen/Qwen3 4B", "it has ' '"),
            ("Qwen/Qwen3:4b", "it has ':'"),
            ("Qwen/-x", "begins or ends with"),
            ("Qwen/x.", "begins or ends with"),
            ("Qwen/a--b", "it has \"--\""),
            ("Qwen/a..b", "it has \"..\""),
            (&format!("Qwen/{}", "x".repeat(97)), "longer than 96"),
        ];
        for (name, expected) in cases {
            let error = RepoName::parse(RepoKind::Model, name).unwrap_err();
            assert_eq!(error.hub_kind(), Some(HubErrorKind::Name));
            assert!(error.to_string().contains(expected), "{error}");
        }
    }
}
