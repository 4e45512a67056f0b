//! The length of a completion.

use serde::{Deserialize, Serialize};

use super::{Rule, pass};
use crate::Sample;

/// 1 if the length of the completion is from `min` to `max`, else 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Length {
    /// The smallest length that passes. Default 0.
    #[serde(default)]
    pub min: usize,
    /// The largest length that passes. Default: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<usize>,
    /// The unit. Default tokens.
    #[serde(default)]
    pub unit: LengthUnit,
}

/// The unit of a length.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LengthUnit {
    /// Token ids, the end token included.
    #[default]
    Tokens,
    /// Words between white space.
    Words,
    /// Unicode characters.
    Characters,
}

impl Length {
    pub(crate) fn problem(&self) -> Option<String> {
        match (self.min, self.max) {
            (0, None) => Some("set min or max: every length passes".to_owned()),
            (min, Some(max)) if min > max => Some(format!("min = {min} is above max = {max}")),
            _ => None,
        }
    }
}

impl Rule for Length {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let length = match self.unit {
            LengthUnit::Tokens => sample.completion_ids.len(),
            LengthUnit::Words => sample.completion.split_whitespace().count(),
            LengthUnit::Characters => sample.completion.chars().count(),
        };
        Ok(pass(length >= self.min && self.max.is_none_or(|max| length <= max)))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score_ids;

    #[test]
    fn bounds_are_inclusive() {
        let length = |unit: &str| json!({"type": "length", "min": 2, "max": 3, "unit": unit});
        for (unit, text, ids, expected) in [
            ("tokens", "", &[1, 2, 3][..], 1.0),
            ("tokens", "", &[1, 2, 3, 4][..], 0.0),
            ("words", "one  two", &[][..], 1.0),
            ("words", "one", &[][..], 0.0),
            ("characters", "öäü", &[][..], 1.0),
        ] {
            assert_eq!(score_ids(length(unit), text, ids, json!({})), Ok(Some(expected)), "{unit} {text}");
        }
        let error = score_ids(json!({"type": "length", "min": 4, "max": 3}), "", &[], json!({})).unwrap_err();
        assert!(error.contains("min = 4 is above max = 3"), "{error}");
        assert!(score_ids(json!({"type": "length"}), "", &[], json!({})).unwrap_err().contains("set min or max"));
    }
}
