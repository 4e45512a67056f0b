//! Repeated n-grams.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::Rule;
use crate::Sample;

/// `max_penalty` · (1 − distinct n-grams / all n-grams) of the completion's token ids; 0 for completions shorter than
/// `ngram_size`.
///
/// Source: Yeo et al., arXiv:2502.03373, appendix C.2; TRL's `get_repetition_penalty_reward`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repetition {
    /// n. Default 3.
    #[serde(default = "three")]
    pub ngram_size: usize,
    /// The reward of a completion whose n-grams are all the same, at most 0. Default -1.
    #[serde(default = "minus_one")]
    pub max_penalty: f64,
}

fn three() -> usize {
    3
}

fn minus_one() -> f64 {
    -1.0
}

impl Repetition {
    pub(crate) fn problem(&self) -> Option<String> {
        if self.ngram_size == 0 {
            return Some("ngram_size = 0; it must be at least 1".to_owned());
        }
        let penalty = self.max_penalty;
        (!(penalty <= 0.0 && penalty.is_finite())).then(|| format!("max_penalty = {penalty}; it must be at most 0"))
    }
}

impl Rule for Repetition {
    fn score(&self, sample: &Sample) -> Result<Option<f64>, String> {
        let ngrams = sample.completion_ids.windows(self.ngram_size);
        let count = ngrams.len();
        let distinct = ngrams.collect::<HashSet<_>>().len();
        if distinct == count {
            return Ok(Some(0.0));
        }
        Ok(Some((1.0 - distinct as f64 / count as f64) * self.max_penalty))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::testing::score_ids;

    #[test]
    fn repeated_ngrams_cost() {
        let repetition = json!({"type": "repetition", "ngram_size": 2});
        let score = |ids: &[u32]| score_ids(repetition.clone(), "", ids, json!({}));
        assert_eq!(score(&[1, 2, 3, 4]), Ok(Some(0.0)));
        assert_eq!(score(&[5, 5, 5, 5, 5]), Ok(Some(-0.75)));
        assert_eq!(score(&[5]), Ok(Some(0.0)));
        let bad = json!({"type": "repetition", "max_penalty": 1});
        assert!(score_ids(bad, "", &[], json!({})).unwrap_err().contains("max_penalty = 1; it must be at most 0"));
    }
}
