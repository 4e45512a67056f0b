//! Rewards that are rules: functions of one sample without state.

mod choice;
mod contains;
mod exact;
mod format;
mod json;
mod length;
mod number;
mod numeric;
mod overlong;
mod pattern;
mod repetition;

use core::fmt::Debug;

use serde_json::Value;

use crate::{Reward, RewardError, Sample};

pub use choice::Choice;
pub use contains::Contains;
pub use exact::Exact;
pub use format::Format;
pub use json::{Json, JsonFrom};
pub use length::{Length, LengthUnit};
pub use numeric::{Extract, Numeric};
pub use overlong::SoftOverlong;
pub use pattern::{Occurrence, Pattern};
pub use repetition::Repetition;

/// A rule that is ready to score: its patterns are compiled and its options valid.
pub(crate) trait Rule: Debug + Send {
    /// Scores a sample. The error says what is wrong with the sample's row.
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String>;
}

/// A rule under a name.
#[derive(Debug)]
pub(crate) struct RuleReward {
    pub(crate) name: String,
    pub(crate) rule: Box<dyn Rule>,
}

impl Reward for RuleReward {
    fn name(&self) -> &str {
        &self.name
    }

    fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        let score = |(index, sample): (usize, &Sample)| {
            let failed = |problem| RewardError::failed(&self.name, format!("completion {index}: {problem}"));
            self.rule.score(sample).map_err(failed)
        };
        samples.iter().enumerate().map(score).collect()
    }
}

/// Returns a column of the sample's row as text; `None` for null.
fn column_text(sample: &Sample, column: &str) -> Result<Option<String>, String> {
    match column_value(sample, column)? {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(text.clone())),
        value @ (Value::Number(_) | Value::Bool(_)) => Ok(Some(value.to_string())),
        Value::Array(_) | Value::Object(_) => {
            Err(format!("column {column:?} is a list or an object; it must be text or a number"))
        }
    }
}

/// Returns a column of the sample's row.
fn column_value<'a>(sample: &Sample<'a>, column: &str) -> Result<&'a Value, String> {
    sample.row.get(column).ok_or_else(|| {
        let names: Vec<&str> = sample.row.keys().map(String::as_str).collect();
        let known = if names.is_empty() { "it has none".to_owned() } else { format!("it has {}", names.join(", ")) };
        format!("the row has no column {column:?}; {known}")
    })
}

/// Returns 1 for true and 0 for false.
fn pass(passed: bool) -> Option<f64> {
    Some(f64::from(u8::from(passed)))
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::RewardConfig;

    /// Scores one completion with the reward that `config` describes.
    pub(crate) fn score(config: Value, completion: &str, row: Value) -> Result<Option<f64>, String> {
        score_ids(config, completion, &[], row)
    }

    /// Scores one completion with token ids.
    pub(crate) fn score_ids(config: Value, completion: &str, ids: &[u32], row: Value) -> Result<Option<f64>, String> {
        let config: RewardConfig = serde_json::from_value(config).map_err(|error| error.to_string())?;
        let mut reward = config.build(&mut |name, _| panic!("{name} is a rule")).map_err(|error| error.to_string())?;
        let Value::Object(row) = row else { panic!("a row is an object") };
        let sample = Sample {
            prompt: "",
            prompt_ids: &[],
            completion,
            completion_ids: ids,
            truncated: false,
            row: &row,
            messages: None,
        };
        reward.score(&[sample]).map(|scores| scores[0]).map_err(|error| error.to_string())
    }
}
