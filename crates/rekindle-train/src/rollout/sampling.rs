//! Completions of prompts by the engine, scored while others are sampled.

use std::collections::HashMap;
use std::sync::mpsc;
use std::time::Instant;

use rekindle_data::{Dataset, Tokenizer};
use rekindle_engine::{CacheSize, Engine, EngineConfig, Event, FinishReason, Request, SamplingParams};
use rekindle_models::CausalLm;
use rekindle_rewards::{RewardError, RewardSet, Sample, Scores};

use super::advantages::has_spread;
use super::{PromptColumns, PromptRow, RolloutSettings, RolloutTask};
use crate::{Error, RewardedCompletion};

/// Separates the random numbers of evaluations from those of training.
pub(super) const EVALUATION: u64 = 0x6576_616c_7561_7465;

/// A completion that the model has sampled.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Sampled {
    pub(super) ids: Vec<u32>,
    /// ln p of each token, as the sampler computed it at the temperature of training; NaN if it is unknown.
    pub(super) log_probs: Vec<f32>,
    /// True if it has no end token.
    pub(super) truncated: bool,
}

/// The completions of a prompt.
#[derive(Clone, Debug)]
pub(super) struct ScoredGroup {
    /// The index of the prompt in its dataset.
    pub(super) example: usize,
    pub(super) completions: Vec<Sampled>,
    pub(super) scores: Scores,
    pub(super) prompt: String,
    /// The completions as text.
    pub(super) texts: Vec<String>,
}

impl ScoredGroup {
    /// Returns a completion with its rewards, for the records of `step`.
    fn record(&self, index: usize, step: usize, evaluation: bool) -> RewardedCompletion {
        let rewards = self.scores.columns.iter().map(|column| (column.name.clone(), column.values[index]));
        RewardedCompletion {
            step,
            evaluation,
            prompt: self.prompt.clone(),
            completion: self.texts[index].clone(),
            reward: self.scores.totals[index],
            rewards: rewards.collect(),
            new_tokens: self.completions[index].ids.len(),
            ended: !self.completions[index].truncated,
        }
    }

    /// Returns the completions with the highest and the lowest reward, for a step of training.
    pub(super) fn extremes(&self, step: usize) -> Vec<RewardedCompletion> {
        let reward = |index: &usize| self.scores.totals[*index].unwrap_or(f64::NEG_INFINITY);
        let by_reward = |a: &usize, b: &usize| reward(a).total_cmp(&reward(b));
        let (most, least) = ((0..self.texts.len()).max_by(by_reward), (0..self.texts.len()).min_by(by_reward));
        let both = most.into_iter().chain(least.filter(|least| Some(*least) != most));
        both.map(|index| self.record(index, step, false)).collect()
    }

    /// Returns the first completion, for an evaluation after `step` steps. Its seed is the same in every evaluation.
    pub(super) fn first(&self, step: usize) -> RewardedCompletion {
        self.record(0, step, true)
    }

    /// Returns true if the rewards differ, so that advantages are not all 0.
    pub(super) fn has_spread(&self) -> bool {
        has_spread(&self.scores.totals)
    }
}

/// A prompt in progress.
struct Pending {
    index: usize,
    completions: Vec<Sampled>,
    left: usize,
}

/// A group on its way to the rewards.
struct Finished {
    index: usize,
    example: usize,
    completions: Vec<Sampled>,
    prompt: String,
    prompt_ids: Vec<u32>,
    texts: Vec<String>,
    row: PromptRow,
}

/// Completions of some prompts, with their scores.
#[derive(Clone, Debug)]
pub(super) struct SampledGroups {
    pub(super) groups: Vec<ScoredGroup>,
    /// Seconds that rewards took, most of them while other completions were sampled.
    pub(super) scoring: f64,
}

/// Samples the completions of prompts, each given by its index and by the number that its seed follows from, and scores each
/// group when all of its completions are done. Returns `None` if `go_on` returns false before the end.
pub(super) fn sample(
    task: &mut RolloutTask<'_>,
    settings: &RolloutSettings,
    model: &CausalLm,
    dataset: &Dataset,
    prompts: &[(usize, u64)],
    seed: u64,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<Option<SampledGroups>, Error> {
    let RolloutTask { rewards, columns, stop_ids, tokenizer } = task;
    let requests = Requests { settings, stop_ids, tokenizer: *tokenizer, columns, dataset, prompts, seed };
    let (sender, finished) = mpsc::channel();
    std::thread::scope(|scope| {
        let scoring = scope.spawn(move || score(rewards, finished.into_iter()));
        let complete = requests.run(model, &sender, go_on);
        drop(sender);
        let scored = scoring.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // A reward that failed has ended the sampling, so its error comes first.
        let (mut groups, scoring) = scored?;
        // A stop that came during the last groups ends the generation too, so that its time does not matter.
        if !complete? || !go_on() {
            return Ok(None);
        }
        groups.sort_unstable_by_key(|(index, _)| *index);
        Ok(Some(SampledGroups { groups: groups.into_iter().map(|(_, group)| group).collect(), scoring }))
    })
}

/// Scores groups until there are no more, or until a reward fails; returns them with the seconds that rewards took.
fn score(
    rewards: &mut RewardSet,
    finished: impl Iterator<Item = Finished>,
) -> Result<(Vec<(usize, ScoredGroup)>, f64), RewardError> {
    let (mut groups, mut seconds) = (Vec::new(), 0.0);
    for group in finished {
        let Finished { index, example, completions, prompt, prompt_ids, texts, row } = group;
        let samples: Vec<Sample<'_>> = completions
            .iter()
            .zip(&texts)
            .map(|(completion, text)| Sample {
                prompt: &prompt,
                prompt_ids: &prompt_ids,
                completion: text,
                completion_ids: &completion.ids,
                truncated: completion.truncated,
                row: &row.columns,
                messages: row.messages.as_ref(),
            })
            .collect();
        let began = Instant::now();
        let scores = rewards.score(&samples)?;
        seconds += began.elapsed().as_secs_f64();
        groups.push((index, ScoredGroup { example, completions, scores, prompt, texts }));
    }
    Ok((groups, seconds))
}

struct Requests<'a> {
    settings: &'a RolloutSettings,
    stop_ids: &'a [u32],
    tokenizer: Option<&'a Tokenizer>,
    columns: &'a PromptColumns,
    dataset: &'a Dataset,
    prompts: &'a [(usize, u64)],
    seed: u64,
}

impl Requests<'_> {
    /// Runs all requests; returns false if `go_on` or the receiver ended them before.
    fn run(
        &self,
        model: &CausalLm,
        finished: &mpsc::Sender<Finished>,
        go_on: &mut dyn FnMut() -> bool,
    ) -> Result<bool, Error> {
        let Self { settings, dataset, prompts, .. } = *self;
        let ids = |index: usize| dataset.example(index).input_ids;
        let longest = prompts.iter().map(|&(index, _)| ids(index).len() + settings.max_completion_length).max();
        let longest = longest.unwrap_or(1).min(model.max_seq_length());
        let max_sequences = settings.arguments.max_sequences;
        let defaults = EngineConfig::default();
        let limits = EngineConfig {
            max_sequences,
            max_batch_tokens: defaults.max_batch_tokens.max(max_sequences),
            max_waiting: usize::MAX,
            cache: CacheSize::Pages(settings.pages(longest)),
        };
        let mut engine = Engine::new(model, limits)?;
        let mut pending = HashMap::new();
        for (index, &(example, number)) in prompts.iter().enumerate() {
            let request = Request {
                n: settings.num_generations,
                max_tokens: settings.max_completion_length,
                sampling: self.sampling(number),
                stop_ids: self.stop_ids.to_vec(),
                ..Request::new(ids(example).to_vec())
            };
            let completions = vec![Sampled::default(); settings.num_generations];
            let left = completions.len();
            pending.insert(engine.submit(request)?, Pending { index, completions, left });
        }
        while engine.has_work() {
            if !go_on() {
                return Ok(false);
            }
            for event in engine.step() {
                let Some(group) = pending.get_mut(&event.request()) else { continue };
                match event {
                    Event::Token { sample, token, .. } => {
                        let completion = &mut group.completions[sample];
                        completion.ids.push(token.id);
                        completion.log_probs.push(self.log_prob(&token));
                    }
                    Event::Finished { request, sample, reason, .. } => {
                        group.completions[sample].truncated = !matches!(reason, FinishReason::Stop(_));
                        group.left -= 1;
                        let done = if group.left == 0 { pending.remove(&request) } else { None };
                        if let Some(done) = done
                            && finished.send(self.finish(done)).is_err()
                        {
                            return Ok(false);
                        }
                    }
                    Event::Failed { error, .. } => return Err(error.into()),
                    Event::Prompt { .. } => {}
                }
            }
        }
        Ok(true)
    }

    fn sampling(&self, number: u64) -> SamplingParams {
        let arguments = &self.settings.arguments;
        SamplingParams {
            temperature: self.settings.temperature as f32,
            top_k: arguments.top_k,
            top_p: arguments.top_p as f32,
            min_p: arguments.min_p.unwrap_or(0.0) as f32,
            repetition_penalty: arguments.repetition_penalty as f32,
            seed: mixed(self.seed, number),
            ..SamplingParams::default()
        }
    }

    fn log_prob(&self, token: &rekindle_engine::NewToken) -> f32 {
        match (self.settings.temperature == 1.0, self.settings.samples_unchanged()) {
            (true, _) => token.log_prob,
            (false, true) => token.sampling_log_prob,
            (false, false) => f32::NAN,
        }
    }

    fn finish(&self, pending: Pending) -> Finished {
        let Pending { index, completions, .. } = pending;
        let (example, _) = self.prompts[index];
        let row = self.dataset.example(example);
        let texts = completions.iter().map(|completion| {
            let end = usize::from(!completion.truncated);
            self.text(&completion.ids[..completion.ids.len() - end], true)
        });
        let of_row = self.columns.get(&(row.path.to_owned(), row.row)).cloned().unwrap_or_default();
        Finished {
            index,
            example,
            prompt: self.text(row.input_ids, false),
            prompt_ids: row.input_ids.to_vec(),
            texts: texts.collect(),
            completions,
            row: of_row,
        }
    }

    /// Decodes tokens; a `completion` without special tokens.
    fn text(&self, ids: &[u32], completion: bool) -> String {
        let text = self.tokenizer.and_then(|tokenizer| tokenizer.decode(ids, completion).ok());
        text.unwrap_or_else(|| ids.iter().map(u32::to_string).collect::<Vec<_>>().join(" "))
    }
}

/// Returns a seed for each number (SplitMix64).
fn mixed(seed: u64, number: u64) -> u64 {
    let mut z = seed.wrapping_add(number.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
