//! Weighted rewards with gates.

use crate::{Reward, RewardError, Sample};

/// A condition under which a reward counts: another reward of the same sample reaches a value.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardGate {
    /// The name of a reward earlier in the set.
    pub reward: String,
    /// The smallest score of that reward that passes.
    pub at_least: f64,
}

/// Rewards with their weights and gates.
///
/// The total of a sample is Σ wᵢ·rᵢ over the rewards that are not null, as in TRL. A gated reward scores only samples that
/// pass its gate and is null for the others.
#[derive(Default)]
pub struct RewardSet {
    entries: Vec<WeightedReward>,
}

struct WeightedReward {
    reward: Box<dyn Reward>,
    weight: f64,
    /// The index of an earlier entry and the score that passes.
    gate: Option<(usize, f64)>,
}

/// The scores of a batch.
#[derive(Clone, Debug, PartialEq)]
pub struct Scores {
    /// The scores of each reward, in the order of the set.
    pub columns: Vec<RewardColumn>,
    /// The weighted total of each sample; `None` if all its scores are null.
    pub totals: Vec<Option<f64>>,
}

/// The scores of one reward.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardColumn {
    /// The reward's name.
    pub name: String,
    /// The reward's weight in the total.
    pub weight: f64,
    /// One score per sample, not weighted; `None` is a null.
    pub values: Vec<Option<f64>>,
}

impl RewardSet {
    /// Returns an empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a reward.
    ///
    /// # Errors
    ///
    /// A name that the set has already, or a weight that is not finite.
    pub fn push(&mut self, reward: Box<dyn Reward>, weight: f64) -> Result<(), RewardError> {
        self.insert(reward, weight, None)
    }

    /// Adds a reward that counts only for samples that pass `gate`.
    ///
    /// # Errors
    ///
    /// Those of [`RewardSet::push`], and a gate that names no earlier reward.
    pub fn push_gated(&mut self, reward: Box<dyn Reward>, weight: f64, gate: &RewardGate) -> Result<(), RewardError> {
        let Some(index) = self.names().position(|name| name == gate.reward) else {
            let names: Vec<String> = self.names().map(|name| format!("{name:?}")).collect();
            let known = if names.is_empty() { "there is none".to_owned() } else { names.join(", ") };
            return Err(RewardError::config(
                reward.name(),
                format!("the gate {:?} is no reward before this one; rewards before it: {known}", gate.reward),
            ));
        };
        if !gate.at_least.is_finite() {
            return Err(RewardError::config(
                reward.name(),
                format!("the gate's threshold {} is not a finite number", gate.at_least),
            ));
        }
        self.insert(reward, weight, Some((index, gate.at_least)))
    }

    fn insert(&mut self, reward: Box<dyn Reward>, weight: f64, gate: Option<(usize, f64)>) -> Result<(), RewardError> {
        if self.names().any(|name| name == reward.name()) {
            return Err(RewardError::config(
                reward.name(),
                "two rewards have this name; give one of them another `name`",
            ));
        }
        if !weight.is_finite() {
            return Err(RewardError::config(reward.name(), format!("weight = {weight} is not a finite number")));
        }
        self.entries.push(WeightedReward { reward, weight, gate });
        Ok(())
    }

    /// Returns the rewards' names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(|entry| entry.reward.name())
    }

    /// Returns the number of rewards.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns true if the set has no reward.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Scores a batch with every reward.
    ///
    /// # Errors
    ///
    /// The first error of a reward, a number of scores that differs from the number of samples, and a score that is not
    /// finite.
    pub fn score(&mut self, samples: &[Sample]) -> Result<Scores, RewardError> {
        let mut columns: Vec<RewardColumn> = Vec::with_capacity(self.entries.len());
        for entry in &mut self.entries {
            let values = match entry.gate {
                None => entry.checked(samples)?,
                Some((gate, at_least)) => {
                    let passing: Vec<usize> = (0..samples.len())
                        .filter(|&sample| columns[gate].values[sample].is_some_and(|score| score >= at_least))
                        .collect();
                    let mut values = vec![None; samples.len()];
                    if !passing.is_empty() {
                        let subset: Vec<Sample> = passing.iter().map(|&sample| samples[sample]).collect();
                        for (sample, value) in passing.into_iter().zip(entry.checked(&subset)?) {
                            values[sample] = value;
                        }
                    }
                    values
                }
            };
            columns.push(RewardColumn { name: entry.reward.name().to_owned(), weight: entry.weight, values });
        }
        let totals = (0..samples.len()).map(|sample| total(&columns, sample)).collect();
        Ok(Scores { columns, totals })
    }
}

impl WeightedReward {
    fn checked(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
        let values = self.reward.score(samples)?;
        let reward = || self.reward.name().to_owned();
        if values.len() != samples.len() {
            return Err(RewardError::Count { reward: reward(), got: values.len(), expected: samples.len() });
        }
        for (index, value) in values.iter().enumerate() {
            if let Some(value) = value.filter(|value| !value.is_finite()) {
                return Err(RewardError::NotFinite { reward: reward(), index, value });
            }
        }
        Ok(values)
    }
}

fn total(columns: &[RewardColumn], sample: usize) -> Option<f64> {
    columns
        .iter()
        .filter_map(|column| column.values[sample].map(|value| column.weight * value))
        .fold(None, |sum, term| Some(sum.unwrap_or(0.0) + term))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns prepared scores for the completions that it is given, looked up by their first token.
    struct Fixed(&'static str, Vec<Option<f64>>);

    impl Reward for Fixed {
        fn name(&self) -> &str {
            self.0
        }

        fn score(&mut self, samples: &[Sample]) -> Result<Vec<Option<f64>>, RewardError> {
            Ok(samples.iter().filter_map(|sample| self.1.get(sample.completion_ids[0] as usize).copied()).collect())
        }
    }

    fn score(set: &mut RewardSet, ids: &[u32]) -> Result<Scores, RewardError> {
        let row = serde_json::Map::new();
        let samples: Vec<Sample> = ids
            .chunks(1)
            .map(|ids| Sample {
                prompt: "",
                completion: "",
                prompt_ids: &[],
                completion_ids: ids,
                truncated: false,
                row: &row,
                messages: None,
            })
            .collect();
        set.score(&samples)
    }

    #[test]
    fn nulls_are_left_out_of_the_weighted_sum() {
        let mut set = RewardSet::new();
        set.push(Box::new(Fixed("a", vec![Some(1.0), None, None])), 2.0).unwrap();
        set.push(Box::new(Fixed("b", vec![Some(-0.5), Some(3.0), None])), 0.5).unwrap();
        let scores = score(&mut set, &[0, 1, 2]).unwrap();
        assert_eq!(scores.totals, [Some(1.75), Some(1.5), None]);
        assert_eq!(scores.columns[1].values, [Some(-0.5), Some(3.0), None]);
    }

    #[test]
    fn a_gated_reward_scores_only_samples_that_pass() {
        let mut set = RewardSet::new();
        set.push(Box::new(Fixed("format", vec![Some(1.0), Some(0.0), None])), 0.0).unwrap();
        let gate = RewardGate { reward: "format".into(), at_least: 0.5 };
        set.push_gated(Box::new(Fixed("answer", vec![Some(5.0), Some(6.0), Some(7.0)])), 1.0, &gate).unwrap();
        let scores = score(&mut set, &[2, 1, 0]).unwrap();
        assert_eq!(scores.columns[1].values, [None, None, Some(5.0)]);
        assert_eq!(scores.totals, [None, Some(0.0), Some(5.0)]);
    }

    #[test]
    fn wrong_counts_and_values_are_errors_that_name_the_reward() {
        let mut set = RewardSet::new();
        set.push(Box::new(Fixed("few", vec![Some(1.0)])), 1.0).unwrap();
        assert_eq!(
            score(&mut set, &[0, 9]).unwrap_err().to_string(),
            "reward \"few\" returned 1 score for 2 completions; return one number or null for each"
        );
        let mut set = RewardSet::new();
        set.push(Box::new(Fixed("nan", vec![Some(1.0), Some(f64::NAN)])), 1.0).unwrap();
        let error = score(&mut set, &[0, 1]).unwrap_err();
        assert!(matches!(error, RewardError::NotFinite { index: 1, .. }), "{error}");
        assert_eq!(error.reward(), "nan");
    }

    #[test]
    fn bad_sets_are_refused() {
        let mut set = RewardSet::new();
        set.push(Box::new(Fixed("a", vec![])), 1.0).unwrap();
        assert!(set.push(Box::new(Fixed("a", vec![])), 1.0).unwrap_err().to_string().contains("two rewards"));
        assert!(set.push(Box::new(Fixed("b", vec![])), f64::INFINITY).unwrap_err().to_string().contains("weight"));
        let gate = RewardGate { reward: "b".into(), at_least: 1.0 };
        let error = set.push_gated(Box::new(Fixed("b", vec![])), 1.0, &gate).unwrap_err();
        assert_eq!(
            error.to_string(),
            "reward \"b\": the gate \"b\" is no reward before this one; rewards before it: \"a\""
        );
    }
}
