//! Rollouts: prompts, completions that the model samples, their rewards and advantages, and the rows of training steps.
//!
//! [`RolloutArguments`] and [`GrpoAdvantages`] or [`RlooAdvantages`] are keys of a run file. A [`RolloutTask`] has what a
//! run needs besides: rewards and the columns of rows. `Rollouts` is the source of a run's steps: it samples a
//! generation with the engine on the weights as they are, scores it while the rest is sampled, and divides it into steps.
//!
//! A generation is a function of the seed, the number of prompts taken before it, and the weights.

mod advantages;
mod arguments;
mod generation;
mod ranks;
mod sampling;

use std::collections::BTreeMap;
use std::path::Path;

use rekindle_data::{Dataset, Order, RowNumber, Tokenizer};
use rekindle_dist::Communicator;
use rekindle_hub::{read_json, write_atomic};
use rekindle_models::{Batch, CausalLm, Objective};
use rekindle_rewards::RewardSet;
use serde_json::{Map, Value};

use crate::evaluate::{ObjectiveEvaluation, evaluate_objective_while};
use crate::trainer::StepRows;
use crate::world::share;
use crate::{Error, RewardedCompletion, SftConfig};

pub(crate) use arguments::{AdvantageRule, RolloutSettings};
pub use arguments::{GrpoAdvantages, MultiObjectiveAggregation, RlooAdvantages, RolloutArguments, ScaleRewards};
pub(crate) use generation::Generation;

/// Metrics with their names, in the order of a report.
pub(crate) type NamedMetrics = Vec<(String, f64)>;

/// The columns of rows besides their prompts, by file and row.
pub type PromptColumns = BTreeMap<(std::path::PathBuf, RowNumber), PromptRow>;

/// The part of a row that rewards receive.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PromptRow {
    /// Every column but the prompt.
    pub columns: Map<String, Value>,
    /// The messages of a conversation.
    pub messages: Option<Value>,
}

/// The needs of a run with sampled completions besides prompts.
pub struct RolloutTask<'a> {
    /// The rewards of completions.
    pub rewards: RewardSet,
    /// The columns of the rows to train on and to evaluate. Rows that are not in it have none.
    pub columns: PromptColumns,
    /// Tokens that end a completion.
    pub stop_ids: Vec<u32>,
    /// The tokenizer of texts for rewards. Without it, texts are token ids.
    pub tokenizer: Option<&'a Tokenizer>,
}

impl core::fmt::Debug for RolloutTask<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let rewards: Vec<&str> = self.rewards.names().collect();
        f.debug_struct("RolloutTask").field("rewards", &rewards).finish_non_exhaustive()
    }
}

/// The steps of a run with sampled completions.
pub(crate) struct Rollouts<'a> {
    task: RolloutTask<'a>,
    settings: RolloutSettings,
    /// Indices of prompts, without an end.
    order: Box<dyn Iterator<Item = usize>>,
    prompts: usize,
    /// Prompts taken so far.
    seen: u64,
    seed: u64,
    batch_size: usize,
    generation: Option<Generation>,
    /// Completions of training are recorded once in this many steps.
    recorded_every: usize,
}

/// Prompts of the evaluation set whose completions are recorded.
const RECORDED_PROMPTS: usize = 4;

/// Steps of a run whose completions are recorded.
const RECORDED_STEPS: usize = 20;

/// The rows of a step, with records of the generation if it was sampled for this step.
pub(crate) struct RolloutStep {
    pub(crate) rows: StepRows,
    pub(crate) records: RolloutRecords,
}

/// Numbers about completions that were sampled together, and some of them.
#[derive(Debug, Default)]
pub(crate) struct RolloutRecords {
    pub(crate) metrics: NamedMetrics,
    pub(crate) completions: Vec<RewardedCompletion>,
}

impl<'a> Rollouts<'a> {
    /// Returns the steps of a run over `train`, after the first `seen` prompts.
    pub(crate) fn new(
        task: RolloutTask<'a>,
        config: &SftConfig,
        settings: RolloutSettings,
        train: &Dataset,
        order: (bool, u64),
        seen: u64,
    ) -> Self {
        let (shuffle, seed) = order;
        let order = Box::new(Order::new(train.len(), shuffle, seed).from_cursor(seen));
        let batch_size = config.per_device_train_batch_size;
        Self {
            task,
            settings,
            order,
            prompts: train.len(),
            seen,
            seed,
            batch_size,
            generation: None,
            recorded_every: 1,
        }
    }

    /// Records completions of about [`RECORDED_STEPS`] of the run's steps.
    pub(crate) fn recorded_of(mut self, steps: usize) -> Self {
        self.recorded_every = (steps / RECORDED_STEPS).max(1);
        self
    }

    /// Restores a generation that the checkpoint in `dir` was still using.
    pub(crate) fn resume(&mut self, dir: &Path) -> Result<(), Error> {
        let path = dir.join(Generation::FILE);
        if path.is_file() {
            let broken =
                |error: serde_json::Error| Error::Checkpoint { path: path.clone(), problem: error.to_string() };
            self.generation = Some(serde_json::from_value(read_json(&path)?).map_err(broken)?);
        }
        Ok(())
    }

    /// Gives all ranks the generation that rank 0 has restored.
    pub(crate) fn share(&mut self, world: &dyn Communicator) -> Result<(), Error> {
        self.generation = share(world, self.generation.take())?;
        Ok(())
    }

    /// Writes the generation that later steps still use into a checkpoint.
    pub(crate) fn save(&self, dir: &Path) -> Result<(), Error> {
        let Some(generation) = self.generation.as_ref().filter(|generation| !self.is_used_up(generation)) else {
            return Ok(());
        };
        let text = serde_json::to_vec(generation).expect("numbers serialize");
        Ok(write_atomic(&dir.join(Generation::FILE), &text)?)
    }

    /// Returns the number of prompts taken.
    pub(crate) fn seen(&self) -> u64 {
        self.seen
    }

    /// Returns the number of passes over the prompts.
    pub(crate) fn epoch(&self) -> f64 {
        self.seen as f64 / self.prompts as f64
    }

    fn is_used_up(&self, generation: &Generation) -> bool {
        generation.used >= self.settings.steps * self.settings.arguments.num_iterations
    }

    /// Returns the rows of `step`, the next one; samples a generation if the last one is used up. Returns `None` if `go_on`
    /// returns false before the generation is complete.
    pub(crate) fn next_step(
        &mut self,
        model: &CausalLm,
        train: &Dataset,
        step: usize,
        world: &dyn Communicator,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<RolloutStep>, Error> {
        let mut records = RolloutRecords::default();
        if self.generation.as_ref().is_none_or(|generation| self.is_used_up(generation)) {
            self.generation = None;
            let Some((generation, of_generation)) = self.generate(model, train, step, world, go_on)? else {
                return Ok(None);
            };
            records = of_generation;
            self.generation = Some(generation);
        }
        let generation = self.generation.as_mut().expect("sampled above");
        let rows = generation.next_step(train, self.settings.steps, self.batch_size, world.position());
        Ok(Some(RolloutStep { rows, records }))
    }

    /// Samples completions for prompts of `eval` after `done` steps, and returns their loss, rewards and other metrics; `None`
    /// if `go_on` returns false before the end.
    pub(crate) fn evaluate(
        &mut self,
        model: &CausalLm,
        objective: &dyn Objective,
        eval: &Dataset,
        (batch_size, done): (usize, usize),
        world: &dyn Communicator,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<(ObjectiveEvaluation, RolloutRecords)>, Error> {
        let prompts: Vec<(usize, u64)> = (0..eval.len()).map(|index| (index, index as u64)).collect();
        let settings = self.settings.for_evaluation();
        let seed = self.seed ^ sampling::EVALUATION;
        let own = ranks::own_prompts(world, &prompts);
        let sampled = sampling::sample(&mut self.task, &settings, model, eval, &own, seed, go_on)?;
        let Some(groups) = ranks::gather_groups(world, sampled.map(|sampled| sampled.groups))? else {
            return Ok(None);
        };
        let completions = groups.iter().take(RECORDED_PROMPTS).map(|group| group.first(done)).collect();
        let (mut generation, metrics) = Generation::of(groups, &settings, model, eval, batch_size, world)?;
        let rows = generation.next_step(eval, 1, batch_size, world.position());
        let batches: &[Batch] = &rows.batches;
        // Ranks that evaluate together do not stop before the end, because the others would wait.
        let go_on = &mut || world.size() > 1 || go_on();
        let found = evaluate_objective_while(model, objective, batches, world, go_on)?;
        Ok(found.map(|found| (found, RolloutRecords { metrics, completions })))
    }

    /// Samples a generation.
    fn generate(
        &mut self,
        model: &CausalLm,
        train: &Dataset,
        step: usize,
        world: &dyn Communicator,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<Option<(Generation, RolloutRecords)>, Error> {
        let began = std::time::Instant::now();
        let wanted = self.settings.rows / self.settings.num_generations;
        let rounds = self.settings.arguments.generation_rounds();
        let (mut groups, mut spare, mut seen, mut sampled) = (Vec::new(), Vec::new(), self.seen, 0);
        let mut scoring = 0.0;
        for _ in 0..rounds {
            let count = wanted - groups.len();
            let prompts: Vec<(usize, u64)> = self.order.by_ref().take(count).zip(seen..).collect();
            seen += count as u64;
            sampled += count;
            let settings = &self.settings;
            let own = ranks::own_prompts(world, &prompts);
            let more = sampling::sample(&mut self.task, settings, model, train, &own, self.seed, go_on)?;
            scoring += more.as_ref().map_or(0.0, |more| more.scoring);
            let Some(more) = ranks::gather_groups(world, more.map(|more| more.groups))? else { return Ok(None) };
            let is_kept = |group: &sampling::ScoredGroup| !settings.arguments.dynamic_sampling || group.has_spread();
            let (kept, left): (Vec<_>, Vec<_>) = more.into_iter().partition(is_kept);
            groups.extend(kept);
            spare.extend(left);
            if groups.len() == wanted {
                break;
            }
        }
        // After the last round, groups without a signal take the remaining places.
        groups.extend(spare.drain(..).take(wanted - groups.len()));
        self.seen = seen;
        let sampling = began.elapsed().as_secs_f64();
        let (now, uses) = (step - 1, self.settings.steps * self.settings.arguments.num_iterations);
        let is_recorded = now == 0 || now / self.recorded_every > now.saturating_sub(uses) / self.recorded_every;
        let completions = match groups.first().filter(|_| is_recorded) {
            Some(group) => group.extremes(step),
            None => Vec::new(),
        };
        let began = std::time::Instant::now();
        let (mut generation, mut metrics) =
            Generation::of(groups, &self.settings, model, train, self.batch_size, world)?;
        if self.settings.steps > 1 {
            generation.shuffle(self.seed, seen);
        }
        if self.settings.arguments.dynamic_sampling {
            metrics.push(("dynamic_sampling/prompts".to_owned(), sampled as f64));
        }
        metrics.push(("time/sampling".to_owned(), sampling));
        metrics.push(("time/scoring".to_owned(), scoring));
        metrics.push(("time/log_probs".to_owned(), began.elapsed().as_secs_f64()));
        Ok(Some((generation, RolloutRecords { metrics, completions })))
    }
}
