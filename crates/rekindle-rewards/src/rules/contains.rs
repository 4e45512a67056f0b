//! Occurrence of texts.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Rule, column_text, column_value, pass};
use crate::Sample;

/// 1 if the completion contains every text, else 0; with `any`, if it contains at least one. The texts are `texts` of the
/// run file and those of a column, which is one text or a list. A null column gives null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contains {
    /// Texts to look for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub texts: Vec<String>,
    /// A column with one text or a list of texts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// True if one of the texts is enough. Default false.
    #[serde(default)]
    pub any: bool,
    /// False to compare without regard to case. Default true.
    #[serde(default = "crate::config::yes")]
    pub case_sensitive: bool,
}

impl Contains {
    pub(crate) fn problem(&self) -> Option<String> {
        (self.texts.is_empty() && self.column.is_none()).then(|| "set texts or column: there is nothing to find".into())
    }
}

impl Rule for Contains {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let mut texts = self.texts.clone();
        if let Some(column) = &self.column {
            match column_value(sample, column)? {
                Value::Array(list) => {
                    for value in list {
                        let text = value.as_str().ok_or_else(|| {
                            format!("column {column:?} has {value} in its list; it must hold only texts")
                        })?;
                        texts.push(text.to_owned());
                    }
                }
                _ => match column_text(sample, column)? {
                    Some(text) => texts.push(text),
                    None => return Ok(None),
                },
            }
        }
        let fold = |text: &str| if self.case_sensitive { text.to_owned() } else { text.to_lowercase() };
        let completion = fold(sample.completion);
        let mut found = texts.iter().map(|text| completion.contains(&fold(text)));
        Ok(pass(if self.any { found.any(|found| found) } else { found.all(|found| found) }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score;

    #[test]
    fn all_or_any_of_the_texts() {
        let all = json!({"type": "contains", "texts": ["red", "blue"]});
        assert_eq!(score(all.clone(), "blue and red", json!({})), Ok(Some(1.0)));
        assert_eq!(score(all, "blue and Red", json!({})), Ok(Some(0.0)));
        let any = json!({"type": "contains", "column": "words", "any": true, "case_sensitive": false});
        assert_eq!(score(any.clone(), "only RED", json!({"words": ["red", "blue"]})), Ok(Some(1.0)));
        assert_eq!(score(any.clone(), "green", json!({"words": "red"})), Ok(Some(0.0)));
        assert_eq!(score(any.clone(), "green", json!({"words": null})), Ok(None));
        assert!(score(any, "green", json!({"words": [1]})).unwrap_err().contains("only texts"));
        assert!(score(json!({"type": "contains"}), "", json!({})).unwrap_err().contains("set texts or column"));
    }
}
