//! Regular expressions.

use regex::Regex;
use serde::{Deserialize, Serialize};

use super::{Rule, column_text, pass};
use crate::Sample;

/// 1 if a regular expression matches the completion, else 0. With `column`, the text that a group of the expression captures
/// must equal that column, white space around both ignored.
///
/// The syntax is that of the crate `regex`: matching takes linear time, and there are no look-arounds or backreferences.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pattern {
    /// The regular expression.
    pub pattern: String,
    /// The column that the captured text must equal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// The number of the group to compare. Default 1.
    #[serde(default = "first_group")]
    pub group: usize,
    /// The match to compare where there are several. Default `last`.
    #[serde(default)]
    pub occurrence: Occurrence,
}

/// One of several matches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Occurrence {
    /// The first match.
    First,
    /// The last match.
    #[default]
    Last,
    /// Every match: one that equals the column is enough.
    Any,
}

fn first_group() -> usize {
    1
}

/// A [`Pattern`] with its compiled expression.
#[derive(Debug)]
struct CompiledPattern {
    regex: Regex,
    options: Pattern,
}

impl Pattern {
    pub(crate) fn compile(&self) -> Result<Box<dyn Rule>, String> {
        let regex = compile(&self.pattern)?;
        let groups = regex.captures_len() - 1;
        if self.column.is_some() && self.group > groups {
            return Err(format!(
                "group = {}, but pattern {:?} has {groups} groups; put parentheses around the text to compare",
                self.group, self.pattern
            ));
        }
        Ok(Box::new(CompiledPattern { regex, options: self.clone() }))
    }
}

/// Compiles a regular expression of the run file.
pub(super) fn compile(pattern: &str) -> Result<Regex, String> {
    Regex::new(pattern).map_err(|error| format!("pattern {pattern:?} cannot be compiled: {error}"))
}

impl Rule for CompiledPattern {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let Some(column) = &self.options.column else { return Ok(pass(self.regex.is_match(sample.completion))) };
        let Some(expected) = column_text(sample, column)? else { return Ok(None) };
        let captured = self.regex.captures_iter(sample.completion);
        let mut texts = captured.map(|captures| captures.get(self.options.group).map_or("", |group| group.as_str()));
        let equal = |text: &str| text.trim() == expected.trim();
        Ok(pass(match self.options.occurrence {
            Occurrence::First => texts.next().is_some_and(equal),
            Occurrence::Last => texts.last().is_some_and(equal),
            Occurrence::Any => texts.any(equal),
        }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score;

    #[test]
    fn captures_are_compared_with_the_column() {
        let regex = |occurrence: &str| json!({"type": "regex", "pattern": "answer: *([a-z]+)", "column": "gold", "occurrence": occurrence});
        let (text, row) = ("answer: one, answer:  two", |gold: &str| json!({"gold": gold}));
        assert_eq!(score(regex("last"), text, row("two")), Ok(Some(1.0)));
        assert_eq!(score(regex("last"), text, row("one")), Ok(Some(0.0)));
        assert_eq!(score(regex("first"), text, row("one")), Ok(Some(1.0)));
        assert_eq!(score(regex("any"), text, row("one")), Ok(Some(1.0)));
        assert_eq!(score(regex("any"), "nothing", row("one")), Ok(Some(0.0)));
        assert_eq!(score(json!({"type": "regex", "pattern": "^o"}), "one", json!({})), Ok(Some(1.0)));
    }

    #[test]
    fn bad_patterns_are_refused() {
        let error = score(json!({"type": "regex", "pattern": "("}), "", json!({})).unwrap_err();
        assert!(error.starts_with("reward \"regex\": pattern \"(\" cannot be compiled"), "{error}");
        let error = score(json!({"type": "regex", "pattern": "a", "column": "c"}), "", json!({})).unwrap_err();
        assert!(error.contains("has 0 groups; put parentheses"), "{error}");
    }
}
