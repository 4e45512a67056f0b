use std::fmt;

use crate::{Error, HubErrorKind};

/// `organization/name`, checked against the hub's rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RepoName {
    pub(crate) kind: RepoKind,
    pub(crate) organization: String,
    pub(crate) name: String,
}

/// What a repository holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RepoKind {
    /// A model or an adapter.
    Model,
    /// Rows.
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

/// The longest name that the hub gives.
const LONGEST: usize = 96;

impl RepoName {
    /// # Errors
    /// [`HubErrorKind::Name`], with the rule that is broken.
    pub(crate) fn parse(kind: RepoKind, name: &str) -> Result<RepoName, Error> {
        let refuse = |reason: String| Error::Hub { kind: HubErrorKind::Name, name: name.to_owned(), reason };
        let Some((organization, own)) = name.split_once('/') else {
            return Err(refuse(format!(
                "there is no such directory, and a name on the hub has the form organization/{}",
                kind.noun()
            )));
        };
        for part in [organization, own] {
            if let Some(rule) = broken_rule(part) {
                return Err(refuse(format!("there is no such directory, and {part:?} is no name on the hub: {rule}")));
            }
        }
        Ok(RepoName { kind, organization: organization.to_owned(), name: own.to_owned() })
    }

    /// The directory in the cache.
    pub(crate) fn folder(&self) -> String {
        format!("{}s--{}--{}", self.kind.noun(), self.organization, self.name)
    }

    /// Where its page and its files are, below the hub's address.
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
    if part.len() > LONGEST {
        return Some(format!("it is longer than {LONGEST} characters"));
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
    fn names_of_the_hub_and_of_the_cache() {
        for name in ["unsloth/Qwen3-4B-Thinking-2507", "meta-llama/Llama-3.2-1B", "a/b", "_x/0.1_y"] {
            assert_eq!(RepoName::parse(RepoKind::Model, name).unwrap().to_string(), name);
        }
        assert_eq!(RepoName::parse(RepoKind::Model, "Qwen/Qwen3-0.6B").unwrap().folder(), "models--Qwen--Qwen3-0.6B");
        let rows = RepoName::parse(RepoKind::Dataset, "org/rows").unwrap();
        assert_eq!((rows.folder(), rows.path()), ("datasets--org--rows".to_owned(), "datasets/org/rows".to_owned()));
    }

    #[test]
    fn says_which_rule_is_broken() {
        let cases = [
            ("qwen3", "has the form organization/model"),
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
