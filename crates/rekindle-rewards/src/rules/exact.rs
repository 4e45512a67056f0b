//! Equality with a column.

use serde::{Deserialize, Serialize};

use super::{Rule, column_text, pass};
use crate::Sample;

/// 1 if the completion equals a column of the row, else 0. White space around both is ignored. A null column gives null.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exact {
    /// The column with the expected text.
    pub column: String,
    /// False to compare without regard to case. Default true.
    #[serde(default = "crate::config::yes")]
    pub case_sensitive: bool,
}

impl Rule for Exact {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let Some(expected) = column_text(sample, &self.column)? else { return Ok(None) };
        let (found, expected) = (sample.completion.trim(), expected.trim());
        Ok(pass(match self.case_sensitive {
            true => found == expected,
            false => found.to_lowercase() == expected.to_lowercase(),
        }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score;

    #[test]
    fn the_completion_is_compared_without_surrounding_space() {
        let exact = json!({"type": "exact", "column": "answer"});
        assert_eq!(score(exact.clone(), " Paris\n", json!({"answer": "Paris"})), Ok(Some(1.0)));
        assert_eq!(score(exact.clone(), "paris", json!({"answer": "Paris"})), Ok(Some(0.0)));
        assert_eq!(score(exact.clone(), "42", json!({"answer": 42})), Ok(Some(1.0)));
        assert_eq!(score(exact.clone(), "42", json!({"answer": null})), Ok(None));
        let any_case = json!({"type": "exact", "column": "answer", "case_sensitive": false});
        assert_eq!(score(any_case, "paris", json!({"answer": "Paris"})), Ok(Some(1.0)));
        let error = score(exact, "x", json!({"question": "?", "gold": 1})).unwrap_err();
        assert_eq!(error, "reward \"exact\": completion 0: the row has no column \"answer\"; it has question, gold");
    }
}
