//! Tags around the sections of a completion.

use serde::{Deserialize, Serialize};

use super::{Rule, pass};
use crate::Sample;

/// 1 if the completion has the sections `<tag>…</tag>` in order, else 0.
///
/// The completion begins with the first opening tag, each opening tag occurs once, and each section is closed before the next
/// one opens. With `tags = ["think"]` this is TRL's `think_format_reward`. With `strict`, closing tags occur once too, and
/// there is only white space around the sections.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Format {
    /// The names of the tags in order. Default think.
    #[serde(default = "think")]
    pub tags: Vec<String>,
    /// True if nothing may be outside of the sections. Default false.
    #[serde(default)]
    pub strict: bool,
}

fn think() -> Vec<String> {
    vec!["think".to_owned()]
}

impl Format {
    pub(crate) fn problem(&self) -> Option<String> {
        if self.tags.is_empty() {
            return Some("tags is an empty list; name at least one tag, such as \"think\"".to_owned());
        }
        let bad = self.tags.iter().find(|tag| tag.is_empty() || tag.contains(['<', '>']));
        bad.map(|tag| format!("tags holds {tag:?}; write names without angle brackets, such as \"think\""))
    }

    fn matches(&self, completion: &str) -> bool {
        let mut rest = if self.strict { completion.trim() } else { completion };
        for (index, tag) in self.tags.iter().enumerate() {
            let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
            let once = |text: &str| completion.matches(text).count() == 1;
            if !once(&open) || (self.strict && !once(&close)) {
                return false;
            }
            let Some((before, inside)) = rest.split_once(&open) else { return false };
            let clear = match (index, self.strict) {
                (0, _) => before.is_empty(),
                (_, true) => before.trim().is_empty(),
                (_, false) => true,
            };
            // The section ends before the next one opens.
            let next = self.tags.get(index + 1).and_then(|next| inside.find(&format!("<{next}>")));
            let Some(end) = inside[..next.unwrap_or(inside.len())].find(&close) else { return false };
            if !clear {
                return false;
            }
            rest = &inside[end + close.len()..];
        }
        !self.strict || rest.is_empty()
    }
}

impl Rule for Format {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        Ok(pass(self.matches(sample.completion)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score;

    #[test]
    fn sections_come_in_order() {
        let both = json!({"type": "format", "tags": ["think", "answer"]});
        let strict = json!({"type": "format", "tags": ["think", "answer"], "strict": true});
        for (text, loose, tight) in [
            ("<think>a</think><answer>b</answer>", 1.0, 1.0),
            ("<think>a</think>\n<answer>b</answer>\n", 1.0, 1.0),
            ("<think>a</think> so <answer>b</answer>", 1.0, 0.0),
            ("<think>a</think><answer>b</answer> end", 1.0, 0.0),
            ("<answer>b</answer><think>a</think>", 0.0, 0.0),
            ("<think>a<answer>b</answer></think>", 0.0, 0.0),
            ("<think>a</think><answer>b", 0.0, 0.0),
            (" <think>a</think><answer>b</answer>", 0.0, 1.0),
            ("<think>a</think><think></think><answer>b</answer>", 0.0, 0.0),
        ] {
            assert_eq!(score(both.clone(), text, json!({})), Ok(Some(loose)), "{text}");
            assert_eq!(score(strict.clone(), text, json!({})), Ok(Some(tight)), "{text}");
        }
        let error = score(json!({"type": "format", "tags": ["<think>"]}), "", json!({})).unwrap_err();
        assert!(error.contains("without angle brackets"), "{error}");
    }
}
