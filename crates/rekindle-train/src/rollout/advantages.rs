//! Advantages from rewards.

use super::arguments::{AdvantageRule, GrpoAdvantages, MultiObjectiveAggregation, RlooAdvantages, ScaleRewards};

/// The rewards of completions, group after group.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct RewardTable {
    /// The scores of each reward, `[rewards][completions]`.
    pub(super) columns: Vec<Vec<Option<f64>>>,
    /// The weight of each reward, `[rewards]`.
    pub(super) weights: Vec<f64>,
    /// The weighted totals, `[completions]`; `None` if there is no score.
    pub(super) totals: Vec<Option<f64>>,
    /// Σ ln π_old − ln π_ref of each completion, `[completions]`; empty without a penalty in the reward.
    pub(super) divergences: Vec<f64>,
}

/// Advantages, `[completions]`, with the share of groups whose rewards are all equal.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Advantages {
    pub(super) values: Vec<f64>,
    pub(super) zero_std: f64,
}

/// The constant beside the standard deviation, as in TRL.
const EPSILON: f64 = 1e-4;
/// The standard deviation up to which rewards are equal, as in `torch.isclose`.
const ZERO: f64 = 1e-8;

/// Returns the advantages of groups of `num_generations` completions. A completion without a reward has the advantage 0 and no
/// effect on the others.
pub(super) fn advantages(rule: &AdvantageRule, table: &RewardTable, num_generations: usize, beta: f64) -> Advantages {
    match rule {
        AdvantageRule::Grpo(grpo) => match grpo.multi_objective_aggregation {
            MultiObjectiveAggregation::SumThenNormalize => of_totals(grpo, table, num_generations),
            MultiObjectiveAggregation::NormalizeThenSum => of_each_reward(table, num_generations),
        },
        AdvantageRule::Rloo(rloo) => leave_one_out(rloo, table, num_generations, beta),
    }
}

/// The mean of the values that there are; NaN without one.
pub(super) fn mean(values: &[Option<f64>]) -> f64 {
    let known: Vec<f64> = values.iter().copied().flatten().collect();
    known.iter().sum::<f64>() / known.len() as f64
}

/// The unbiased standard deviation of the values that there are; NaN for fewer than two.
pub(super) fn standard_deviation(values: &[Option<f64>]) -> f64 {
    let (mean, count) = (mean(values), values.iter().flatten().count());
    if count < 2 {
        return f64::NAN;
    }
    let squares: f64 = values.iter().flatten().map(|value| (value - mean).powi(2)).sum();
    (squares / (count - 1) as f64).sqrt()
}

/// Returns the standard deviation of a group, 0 for a group of one.
fn spread(values: &[Option<f64>]) -> f64 {
    if values.len() == 1 { 0.0 } else { standard_deviation(values) }
}

/// Returns true if the rewards of a group differ.
pub(super) fn has_spread(totals: &[Option<f64>]) -> bool {
    standard_deviation(totals) > ZERO
}

fn or_zero(values: impl Iterator<Item = f64>) -> Vec<f64> {
    values.map(|value| if value.is_finite() { value } else { 0.0 }).collect()
}

fn of_totals(grpo: &GrpoAdvantages, table: &RewardTable, num_generations: usize) -> Advantages {
    let of_all = spread(&table.totals);
    let (mut values, mut zeros) = (Vec::new(), 0);
    for group in table.totals.chunks(num_generations) {
        let mean = mean(group);
        let std = if grpo.scale_rewards == ScaleRewards::Batch { of_all } else { spread(group) };
        zeros += usize::from(std.abs() <= ZERO);
        let divisor = if grpo.scale_rewards == ScaleRewards::None { 1.0 } else { std + EPSILON };
        values.extend(group.iter().map(|total| (total.unwrap_or(f64::NAN) - mean) / divisor));
    }
    Advantages { zero_std: share(zeros, table, num_generations), values: or_zero(values.into_iter()) }
}

fn of_each_reward(table: &RewardTable, num_generations: usize) -> Advantages {
    let mut sums: Vec<Option<f64>> = table.totals.iter().map(|total| total.map(|_| 0.0)).collect();
    for (column, weight) in table.columns.iter().zip(&table.weights) {
        for (group, sums) in column.chunks(num_generations).zip(sums.chunks_mut(num_generations)) {
            let (mean, std) = (mean(group), spread(group));
            for (score, sum) in group.iter().zip(sums) {
                let normalized = score.map(|score| weight * (score - mean) / (std + EPSILON));
                // A single score in a group has no standard deviation, and is not counted.
                if let (Some(normalized), Some(sum)) = (normalized.filter(|value| value.is_finite()), sum) {
                    *sum += normalized;
                }
            }
        }
    }
    let (mean, std) = (mean(&sums), spread(&sums));
    let zero_std = f64::from(u8::from(std.abs() <= ZERO));
    Advantages { values: or_zero(sums.iter().map(|sum| (sum.unwrap_or(f64::NAN) - mean) / (std + EPSILON))), zero_std }
}

fn leave_one_out(rloo: &RlooAdvantages, table: &RewardTable, num_generations: usize, beta: f64) -> Advantages {
    let clipped = |total: f64| rloo.reward_clip_range.map_or(total, |[least, most]| total.clamp(least, most));
    let penalty = |index: usize| table.divergences.get(index).map_or(0.0, |divergence| beta * divergence);
    let rewards = table.totals.iter().enumerate();
    let rewards: Vec<Option<f64>> =
        rewards.map(|(index, total)| total.map(|total| clipped(total) - penalty(index))).collect();
    let (mut values, mut zeros) = (Vec::new(), 0);
    for group in rewards.chunks(num_generations) {
        zeros += usize::from(spread(group).abs() <= ZERO);
        let (sum, count) = (group.iter().flatten().sum::<f64>(), group.iter().flatten().count() as f64);
        values.extend(group.iter().map(|reward| match num_generations {
            1 => Some(0.0),
            _ => reward.map(|reward| reward - (sum - reward) / (count - 1.0)).filter(|value| value.is_finite()),
        }));
    }
    if rloo.normalize_advantages {
        let (mean, std) = (mean(&values), standard_deviation(&values));
        values.iter_mut().flatten().for_each(|value| *value = (*value - mean) / (std + EPSILON));
    }
    let zero_std = share(zeros, table, num_generations);
    Advantages { values: or_zero(values.into_iter().map(|value| value.unwrap_or(0.0))), zero_std }
}

fn share(groups: usize, table: &RewardTable, num_generations: usize) -> f64 {
    groups as f64 / table.totals.len().div_ceil(num_generations).max(1) as f64
}
