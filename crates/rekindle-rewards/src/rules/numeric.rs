//! Numbers compared with a column.

use regex::Regex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::number::{last_boxed, last_number, whole_number};
use super::{Rule, column_value, pass, pattern};
use crate::Sample;

/// 1 if the number of the completion is that of a column, else 0: |found − expected| ≤ max(`tolerance`,
/// `relative_tolerance`·|expected|). A completion without a number scores 0.
///
/// Numbers may have a sign, thousands separators, decimals, an exponent, a currency or percent sign, and may be fractions
/// (`3/4`, `\frac{3}{4}`). The expected number is the column itself, its `\boxed{…}`, the text after its last `####` (as
/// GSM8K has it), or its last number. A column without a number gives null, as in TRL's `accuracy_reward`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Numeric {
    /// The column with the expected number, as a number or as text.
    pub column: String,
    /// The largest absolute difference that passes. Default 1e-9.
    #[serde(default = "default_tolerance")]
    pub tolerance: f64,
    /// The largest difference that passes, relative to the expected number. Default 0.
    #[serde(default)]
    pub relative_tolerance: f64,
    /// The place of the completion's number. Default `boxed_or_last`.
    #[serde(default)]
    pub extract: Extract,
    /// A regular expression whose first group captures the completion's number; replaces `extract`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pattern: Option<String>,
}

/// The place of a number in a completion.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extract {
    /// The last `\boxed{…}`, or the last number of a completion without one.
    #[default]
    BoxedOrLast,
    /// The last `\boxed{…}` alone.
    Boxed,
    /// The last number.
    Last,
    /// The whole completion.
    Whole,
}

fn default_tolerance() -> f64 {
    1e-9
}

/// A [`Numeric`] with its compiled expression.
#[derive(Debug)]
struct CompiledNumeric {
    options: Numeric,
    pattern: Option<Regex>,
}

impl Numeric {
    pub(crate) fn compile(&self) -> Result<Box<dyn Rule>, String> {
        for (key, value) in [("tolerance", self.tolerance), ("relative_tolerance", self.relative_tolerance)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(format!("{key} = {value} must be a finite number, 0 or above"));
            }
        }
        let pattern = self.pattern.as_deref().map(pattern::compile).transpose()?;
        if let Some(regex) = pattern.as_ref().filter(|regex| regex.captures_len() < 2) {
            return Err(format!("pattern {:?} has no group; put parentheses around the number", regex.as_str()));
        }
        Ok(Box::new(CompiledNumeric { options: self.clone(), pattern }))
    }
}

impl CompiledNumeric {
    fn found(&self, completion: &str) -> Option<f64> {
        let inside = |text: &str| whole_number(text).or_else(|| last_number(text));
        if let Some(pattern) = &self.pattern {
            let captures = pattern.captures_iter(completion).last()?;
            return inside(captures.get(1)?.as_str());
        }
        match self.options.extract {
            Extract::BoxedOrLast => last_boxed(completion).map_or_else(|| last_number(completion), inside),
            Extract::Boxed => last_boxed(completion).and_then(inside),
            Extract::Last => last_number(completion),
            Extract::Whole => whole_number(completion),
        }
    }
}

/// Returns the number of a column that holds text.
fn expected_number(text: &str) -> Option<f64> {
    let text = text.rsplit_once("####").map_or(text, |(_, answer)| answer);
    let text = last_boxed(text).unwrap_or(text);
    whole_number(text).or_else(|| last_number(text))
}

impl Rule for CompiledNumeric {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let column = &self.options.column;
        let expected = match column_value(sample, column)? {
            Value::Number(number) => number.as_f64(),
            Value::String(text) => expected_number(text),
            Value::Null => None,
            _ => return Err(format!("column {column:?} is neither a number nor text")),
        };
        let Some(expected) = expected else { return Ok(None) };
        let allowed = self.options.tolerance.max(self.options.relative_tolerance * expected.abs());
        Ok(pass(self.found(sample.completion).is_some_and(|found| (found - expected).abs() <= allowed)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score;

    #[test]
    fn the_number_of_the_completion_is_compared() {
        let numeric = json!({"type": "numeric", "column": "answer"});
        let row = |answer: &str| json!({"answer": answer});
        assert_eq!(score(numeric.clone(), r"so 3 is \boxed{1,250} or 7", row("#### 1250")), Ok(Some(1.0)));
        assert_eq!(score(numeric.clone(), "first 3, then 42.", json!({"answer": 42})), Ok(Some(1.0)));
        assert_eq!(score(numeric.clone(), r"\boxed{0.5}", row(r"$\frac{1}{2}$")), Ok(Some(1.0)));
        assert_eq!(score(numeric.clone(), "no idea", row("42")), Ok(Some(0.0)));
        assert_eq!(score(numeric.clone(), "42", row("unknown")), Ok(None));
        assert_eq!(score(numeric, "42", json!({"answer": null})), Ok(None));
    }

    #[test]
    fn tolerances_and_places() {
        let numeric = |more: serde_json::Value| {
            let mut all = json!({"type": "numeric", "column": "a"});
            all.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            all
        };
        let row = json!({"a": 100});
        assert_eq!(score(numeric(json!({"tolerance": 0.5})), "100.5", row.clone()), Ok(Some(1.0)));
        assert_eq!(score(numeric(json!({"relative_tolerance": 0.01})), "101.1", row.clone()), Ok(Some(0.0)));
        assert_eq!(score(numeric(json!({"extract": "boxed"})), "100", row.clone()), Ok(Some(0.0)));
        assert_eq!(score(numeric(json!({"extract": "last"})), r"\boxed{100} 5", row.clone()), Ok(Some(0.0)));
        assert_eq!(score(numeric(json!({"extract": "whole"})), "100 apples", row.clone()), Ok(Some(0.0)));
        let pattern = json!({"pattern": "<answer>(.*?)</answer>"});
        assert_eq!(score(numeric(pattern), "<answer> $100 </answer> 7", row.clone()), Ok(Some(1.0)));
        let error = score(numeric(json!({"tolerance": -1})), "", row.clone()).unwrap_err();
        assert!(error.contains("tolerance = -1 must be"), "{error}");
        assert!(score(numeric(json!({"pattern": "a"})), "", row).unwrap_err().contains("has no group"));
    }
}
