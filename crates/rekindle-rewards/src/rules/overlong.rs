//! Soft punishment of overlong completions.

use serde::{Deserialize, Serialize};

use super::Rule;
use crate::Sample;

/// A penalty that grows from 0 at `max_completion_len` − `soft_punish_cache` tokens to −1 at `max_completion_len`, and is −1
/// beyond.
///
/// Source: Yu et al., DAPO, arXiv:2503.14476, equation 13; TRL's `get_soft_overlong_punishment`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SoftOverlong {
    /// The length with the full penalty, in tokens.
    pub max_completion_len: usize,
    /// The number of tokens over which the penalty grows.
    pub soft_punish_cache: usize,
}

impl SoftOverlong {
    pub(crate) fn problem(&self) -> Option<String> {
        let Self { max_completion_len: max, soft_punish_cache: cache } = self;
        (cache > max).then(|| format!("soft_punish_cache = {cache} is above max_completion_len = {max}"))
    }
}

impl Rule for SoftOverlong {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let (max, cache) = (self.max_completion_len, self.soft_punish_cache);
        let length = sample.completion_ids.len();
        Ok(Some(if length <= max - cache {
            0.0
        } else if length <= max {
            ((max - cache) as f64 - length as f64) / cache as f64
        } else {
            -1.0
        }))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score_ids;

    #[test]
    fn the_penalty_grows_to_the_limit() {
        let overlong = json!({"type": "soft_overlong", "max_completion_len": 10, "soft_punish_cache": 4});
        for (length, expected) in [(0, 0.0), (6, 0.0), (7, -0.25), (10, -1.0), (11, -1.0)] {
            assert_eq!(score_ids(overlong.clone(), "", &vec![1; length], json!({})), Ok(Some(expected)), "{length}");
        }
        let bad = json!({"type": "soft_overlong", "max_completion_len": 3, "soft_punish_cache": 4});
        assert!(score_ids(bad, "", &[], json!({})).unwrap_err().contains("is above max_completion_len = 3"));
    }
}
