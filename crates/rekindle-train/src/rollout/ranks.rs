//! Sampling that is spread over the ranks of a run.
//!
//! Each rank samples and scores whole groups, every N-th prompt, and all ranks get all groups. What is sampled follows from the
//! seed and the number of the prompt, so on the CPU it has the same bits for any number of ranks.

use rekindle_dist::Communicator;
use rekindle_rewards::{RewardColumn, Scores};
use serde::{Deserialize, Serialize};

use super::sampling::{Sampled, ScoredGroup};
use crate::Error;
use crate::world::{decode, encode};

/// Returns the prompts that this rank samples.
pub(super) fn own_prompts(world: &dyn Communicator, prompts: &[(usize, u64)]) -> Vec<(usize, u64)> {
    prompts.iter().skip(world.rank()).step_by(world.size()).copied().collect()
}

/// Returns the groups of all prompts from those of [`own_prompts`]; `None` if a rank has stopped before its end.
///
/// # Errors
/// [`Error::Ranks`] if a rank failed.
pub(super) fn gather_groups(
    world: &dyn Communicator,
    own: Option<Vec<ScoredGroup>>,
) -> Result<Option<Vec<ScoredGroup>>, Error> {
    if world.size() == 1 {
        return Ok(own);
    }
    let own: Option<Vec<GroupBits>> = own.map(|groups| groups.into_iter().map(GroupBits::from).collect());
    let mut of_ranks = Vec::with_capacity(world.size());
    for bytes in world.all_gather(&encode(&own))? {
        match decode::<Option<Vec<GroupBits>>>(&bytes)? {
            Some(groups) => of_ranks.push(groups.into_iter()),
            None => return Ok(None),
        }
    }
    let mut all = Vec::new();
    while let Some(group) = of_ranks[all.len() % world.size()].next() {
        all.push(group.into());
    }
    Ok(Some(all))
}

/// A [`ScoredGroup`] with the bits of its numbers, which JSON would lose where they are not finite.
#[derive(Serialize, Deserialize)]
struct GroupBits {
    example: usize,
    completions: Vec<(Vec<u32>, Vec<u32>, bool)>,
    totals: Vec<Option<u64>>,
    columns: Vec<(String, u64, Vec<Option<u64>>)>,
    prompt: String,
    texts: Vec<String>,
}

fn bits(values: Vec<Option<f64>>) -> Vec<Option<u64>> {
    values.into_iter().map(|value| value.map(f64::to_bits)).collect()
}

fn numbers(bits: Vec<Option<u64>>) -> Vec<Option<f64>> {
    bits.into_iter().map(|bits| bits.map(f64::from_bits)).collect()
}

impl From<ScoredGroup> for GroupBits {
    fn from(ScoredGroup { example, completions, scores, prompt, texts }: ScoredGroup) -> Self {
        let Scores { columns, totals } = scores;
        let completion = |Sampled { ids, log_probs, truncated }: Sampled| {
            (ids, log_probs.into_iter().map(f32::to_bits).collect(), truncated)
        };
        let column = |RewardColumn { name, weight, values }: RewardColumn| (name, weight.to_bits(), bits(values));
        Self {
            example,
            completions: completions.into_iter().map(completion).collect(),
            totals: bits(totals),
            columns: columns.into_iter().map(column).collect(),
            prompt,
            texts,
        }
    }
}

impl From<GroupBits> for ScoredGroup {
    fn from(GroupBits { example, completions, totals, columns, prompt, texts }: GroupBits) -> Self {
        let completion = |(ids, log_probs, truncated): (Vec<u32>, Vec<u32>, bool)| Sampled {
            ids,
            log_probs: log_probs.into_iter().map(f32::from_bits).collect(),
            truncated,
        };
        let column = |(name, weight, values): (String, u64, Vec<Option<u64>>)| RewardColumn {
            name,
            weight: f64::from_bits(weight),
            values: numbers(values),
        };
        let columns = columns.into_iter().map(column).collect();
        let scores = Scores { columns, totals: numbers(totals) };
        let completions = completions.into_iter().map(completion).collect();
        Self { example, completions, scores, prompt, texts }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_come_back_bit_for_bit() {
        let group = ScoredGroup {
            example: 3,
            completions: vec![Sampled { ids: vec![1, 2], log_probs: vec![-0.1, f32::NAN], truncated: true }],
            scores: Scores {
                columns: vec![RewardColumn {
                    name: "even".to_owned(),
                    weight: 0.1,
                    values: vec![None, Some(f64::INFINITY)],
                }],
                totals: vec![Some(0.1), None],
            },
            prompt: "q".to_owned(),
            texts: vec!["a".to_owned()],
        };
        let bytes = encode(&GroupBits::from(group.clone()));
        let back = ScoredGroup::from(decode::<GroupBits>(&bytes).unwrap());
        assert_eq!((back.example, &back.scores), (3, &group.scores));
        assert_eq!((&back.prompt, &back.texts), (&group.prompt, &group.texts));
        let completion = &back.completions[0];
        assert_eq!((&completion.ids[..], completion.truncated), (&[1, 2][..], true));
        assert!(completion.log_probs[0] == -0.1 && completion.log_probs[1].is_nan());
    }
}
