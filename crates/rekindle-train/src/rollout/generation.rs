//! A generation: completions that were sampled together, and the steps that use them.

use rekindle_data::{Dataset, Order};
use rekindle_dist::{Communicator, RankPosition, deal_by_length};
use rekindle_kernels::linear_cross_entropy::LogProbValues;
use rekindle_models::{Batch, CausalLm, IGNORED, SampledCompletion};
use serde::{Deserialize, Serialize};

use super::advantages::{RewardTable, advantages, mean, standard_deviation};
use super::arguments::{AdvantageRule, RolloutSettings};
use super::sampling::{Sampled, ScoredGroup};
use crate::Error;
use crate::trainer::StepRows;
use crate::world::{decode, encode, other_version};

/// Completions that were sampled together. It is a part of checkpoints as long as steps use it, because later weights would
/// sample others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Generation {
    /// Steps that have used it.
    pub(super) used: usize,
    /// The mean number of tokens in the loss.
    mean_tokens: f64,
    /// In the order of steps.
    rows: Vec<RolloutRow>,
}

/// A completion with its advantage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct RolloutRow {
    /// The index of the prompt in its dataset.
    example: usize,
    ids: Vec<u32>,
    /// True if it has no loss.
    masked: bool,
    advantage: f64,
    old_log_probs: Option<Vec<f32>>,
    sampler_log_probs: Option<Vec<f32>>,
    reference_log_probs: Option<Vec<f32>>,
}

impl Generation {
    /// The name of its file in a checkpoint.
    pub(crate) const FILE: &str = "rollouts.json";

    /// Returns the generation of scored groups, with numbers about it under TRL's names. `batch_size` completions are in one
    /// pass.
    pub(super) fn of(
        groups: Vec<ScoredGroup>,
        settings: &RolloutSettings,
        model: &CausalLm,
        dataset: &Dataset,
        batch_size: usize,
        world: &dyn Communicator,
    ) -> Result<(Self, Vec<(String, f64)>), Error> {
        let mut table = RewardTable::default();
        let mut names = Vec::new();
        let mut rows = Vec::new();
        for ScoredGroup { example, completions, scores, .. } in groups {
            table.totals.extend(scores.totals);
            for (index, column) in scores.columns.into_iter().enumerate() {
                if names.len() == index {
                    names.push(column.name);
                    table.columns.push(Vec::new());
                    table.weights.push(column.weight);
                }
                table.columns[index].extend(column.values);
            }
            rows.extend(completions.into_iter().map(|completion| (example, completion)));
        }
        let mut metrics = lengths(rows.iter().map(|(_, completion)| completion));
        let mut generation = Self { used: 0, mean_tokens: 1.0, rows: Vec::new() };
        generation.rows =
            rows.into_iter().map(|(example, completion)| RolloutRow::new(example, completion, settings)).collect();
        let counted: usize = generation.rows.iter().map(RolloutRow::counted).sum();
        generation.mean_tokens = counted.max(1) as f64 / generation.rows.len().max(1) as f64;
        generation.add_log_probs(settings, model, dataset, batch_size, world)?;
        if let (AdvantageRule::Rloo(_), true) = (&settings.advantages, settings.beta != 0.0) {
            table.divergences = generation.rows.iter().map(RolloutRow::divergence).collect();
            metrics.push(("kl".to_owned(), table.divergences.iter().sum::<f64>() / counted.max(1) as f64));
        }
        let found = advantages(&settings.advantages, &table, settings.num_generations, settings.beta);
        generation.rows.iter_mut().zip(&found.values).for_each(|(row, advantage)| row.advantage = *advantage);
        metrics.extend(reward_metrics(&names, &table, found.zero_std));
        Ok((generation, metrics))
    }

    /// Puts the completions into a random order, so that the steps of a generation have completions of all of its prompts.
    pub(super) fn shuffle(&mut self, seed: u64, number: u64) {
        let order = Order::new(self.rows.len(), true, seed).epoch(number);
        let mut rows: Vec<Option<RolloutRow>> = std::mem::take(&mut self.rows).into_iter().map(Some).collect();
        self.rows = order.into_iter().filter_map(|index| rows[index].take()).collect();
    }

    /// Returns the rows of the next step, one of `steps` parts, with those of this rank.
    pub(super) fn next_step(
        &mut self,
        dataset: &Dataset,
        steps: usize,
        batch_size: usize,
        position: RankPosition,
    ) -> StepRows {
        let per_step = self.rows.len().div_ceil(steps).max(1);
        let first = self.used % steps * per_step;
        self.used += 1;
        let rows = &self.rows[first..(first + per_step).min(self.rows.len())];
        let batches = |numbers: &[usize]| -> Vec<Batch> {
            numbers.chunks(batch_size.max(1)).map(|numbers| self.batch(rows, numbers, dataset)).collect()
        };
        let all: Vec<usize> = (0..rows.len()).collect();
        let dealt = (position.world_size > 1).then(|| {
            let tokens = |row: &RolloutRow| dataset.example(row.example).input_ids.len() + row.ids.len();
            let lengths: Vec<usize> = rows.iter().map(tokens).collect();
            batches(&deal_by_length(&lengths, position.world_size)[position.rank])
        });
        StepRows { batches: batches(&all), dealt, examples: rows.iter().map(|row| row.example).collect() }
    }

    /// Returns a batch of some of `rows`, those of a step, by their numbers.
    fn batch(&self, rows: &[RolloutRow], numbers: &[usize], dataset: &Dataset) -> Batch {
        let rows: Vec<&RolloutRow> = numbers.iter().map(|&number| &rows[number]).collect();
        let documents: Vec<_> = rows.iter().map(|row| row.document(dataset)).collect();
        let documents = documents.iter().map(|(ids, labels)| (&ids[..], &labels[..]));
        let completions = rows.iter().map(|row| SampledCompletion {
            advantage: row.advantage,
            mean_tokens: self.mean_tokens,
            old_log_probs: row.old_log_probs.clone(),
            sampler_log_probs: row.sampler_log_probs.clone(),
            reference_log_probs: row.reference_log_probs.clone(),
        });
        let numbers = numbers.iter().map(|&number| number as u32).collect();
        Batch { completions: completions.collect(), rows: numbers, ..Batch::from_rows(documents, 0) }
    }

    /// Computes the log-probabilities that steps need, under the current model and under the reference model. Each rank
    /// computes those of its batches.
    fn add_log_probs(
        &mut self,
        settings: &RolloutSettings,
        model: &CausalLm,
        dataset: &Dataset,
        batch_size: usize,
        world: &dyn Communicator,
    ) -> Result<(), Error> {
        let (needs_old, needs_reference) = (settings.needs_old_log_probs(), settings.beta != 0.0);
        if !needs_old && !needs_reference {
            return Ok(());
        }
        let temperature = settings.temperature as f32;
        let mut own: Vec<RowLogProbs> = Vec::new();
        let numbers: Vec<usize> = (0..self.rows.len()).collect();
        for part in numbers.chunks(batch_size.max(1)).skip(world.rank()).step_by(world.size()) {
            let batch = self.batch(&self.rows, part, dataset);
            let old = needs_old.then(|| model.log_probs_at(&batch, temperature)).transpose()?;
            let reference = needs_reference.then(|| model.base_log_probs_at(&batch, temperature)).transpose()?;
            let (old, reference) = (old.map(|found| found.values()), reference.map(|found| found.values()));
            for (&row, document) in part.iter().zip(batch.documents()) {
                let tokens = || document.clone().filter(|&token| batch.targets[token] != IGNORED);
                let of = |values: &Option<LogProbValues>| {
                    let values = values.as_ref()?;
                    Some(tokens().map(|token| values.log_probs[token].to_bits()).collect())
                };
                own.push((row, of(&old), of(&reference)));
            }
        }
        let values = |bits: Option<Vec<u32>>| bits.map(|bits| bits.into_iter().map(f32::from_bits).collect());
        let all = match world.size() {
            1 => vec![own],
            _ => world.all_gather(&encode(&own))?.iter().map(|bytes| decode(bytes)).collect::<Result<_, _>>()?,
        };
        for (row, old, reference) in all.into_iter().flatten() {
            let row = self.rows.get_mut(row).ok_or_else(other_version)?;
            (row.old_log_probs, row.reference_log_probs) = (values(old), values(reference));
        }
        Ok(())
    }
}

/// The number of a row, and the bits of its log-probabilities under the current model and under the reference model.
type RowLogProbs = (usize, Option<Vec<u32>>, Option<Vec<u32>>);

impl RolloutRow {
    fn new(example: usize, completion: Sampled, settings: &RolloutSettings) -> Self {
        let masked = completion.truncated && settings.arguments.mask_truncated_completions;
        let known = completion.log_probs.iter().all(|value| value.is_finite());
        let mut sampler_log_probs = known.then_some(completion.log_probs);
        if let Some(values) = sampler_log_probs.as_mut().filter(|_| masked) {
            values.clear();
        }
        Self {
            example,
            ids: completion.ids,
            masked,
            advantage: 0.0,
            old_log_probs: None,
            sampler_log_probs,
            reference_log_probs: None,
        }
    }

    /// Returns the number of tokens in the loss.
    fn counted(&self) -> usize {
        if self.masked { 0 } else { self.ids.len() }
    }

    /// Returns the ids and labels of prompt and completion.
    fn document(&self, dataset: &Dataset) -> (Vec<u32>, Vec<i32>) {
        let prompt = dataset.example(self.example).input_ids;
        let mut labels = vec![IGNORED; prompt.len()];
        labels.extend(self.ids.iter().map(|&id| if self.masked { IGNORED } else { id as i32 }));
        (prompt.iter().chain(&self.ids).copied().collect(), labels)
    }

    /// Returns Σ ln π_old − ln π_ref.
    fn divergence(&self) -> f64 {
        let both = self.old_log_probs.iter().flatten().zip(self.reference_log_probs.iter().flatten());
        both.map(|(old, reference)| f64::from(*old) - f64::from(*reference)).sum()
    }
}

/// Returns the metrics of rewards.
fn reward_metrics(names: &[String], table: &RewardTable, zero_std: f64) -> Vec<(String, f64)> {
    let columns = names.iter().zip(&table.columns);
    let of_each = columns.flat_map(|(name, column)| {
        let of = |what: &str, value: f64| (format!("rewards/{name}/{what}"), value);
        [of("mean", mean(column)), of("std", standard_deviation(column))]
    });
    let mut metrics: Vec<_> = of_each.collect();
    metrics.push(("reward".to_owned(), mean(&table.totals)));
    metrics.push(("reward_std".to_owned(), standard_deviation(&table.totals)));
    metrics.push(("frac_reward_zero_std".to_owned(), zero_std));
    // A reward that is null for every completion has no mean.
    metrics.retain(|(_, value)| value.is_finite());
    metrics
}

/// Returns the metrics of completions' lengths.
fn lengths<'a>(completions: impl Iterator<Item = &'a Sampled> + Clone) -> Vec<(String, f64)> {
    let of_all: Vec<f64> = completions.clone().map(|completion| completion.ids.len() as f64).collect();
    let ended = completions.filter(|completion| !completion.truncated);
    let of_ended: Vec<f64> = ended.map(|completion| completion.ids.len() as f64).collect();
    let truncated = of_all.len() - of_ended.len();
    let three = |name: &str, values: &[f64]| {
        let mean = values.iter().sum::<f64>() / values.len().max(1) as f64;
        let least = values.iter().copied().reduce(f64::min).unwrap_or(0.0);
        let most = values.iter().copied().reduce(f64::max).unwrap_or(0.0);
        [("mean", mean), ("min", least), ("max", most)]
            .map(|(what, value)| (format!("completions/{what}_{name}"), value))
    };
    let mut metrics: Vec<(String, f64)> = Vec::new();
    metrics.extend(three("length", &of_all));
    metrics.extend(three("terminated_length", &of_ended));
    metrics.push(("completions/clipped_ratio".to_owned(), truncated as f64 / of_all.len().max(1) as f64));
    metrics
}

#[cfg(test)]
mod tests;
