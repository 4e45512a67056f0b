//! The engine: requests in, events out, one step at a time.

mod ahead;
mod compute;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use rekindle_kernels::paged_attention::PAGE;
use rekindle_models::{DecodeStates, DecodeSteps, RowAdapter, Sampler};

use self::ahead::StepAhead;
use crate::pages::Node;
use crate::request::{AdapterChoice, Event, FinishReason, Request, RequestId, Usage};
use crate::scheduler::{Part, SampleId, Scheduler};
use crate::sequence::{Sequence, Settings};
use crate::{EngineConfig, EngineModel, Error};

/// Runs requests on a model.
///
/// The engine is single-threaded and deterministic: the events of a step depend only on the calls before it.
/// [`EngineHandle`](crate::EngineHandle) gives it a thread of its own.
#[derive(Debug)]
pub struct Engine<M> {
    model: M,
    config: EngineConfig,
    scheduler: Scheduler,
    /// The keys and values; `None` while the engine sleeps.
    states: Option<DecodeStates>,
    /// Recorded steps for `states` and the weights as they are.
    steps: DecodeSteps,
    /// A step that the device computes.
    ahead: Option<StepAhead>,
    sequences: BTreeMap<SampleId, Sequence>,
    /// The beginnings of the chains of pages, by adapter.
    roots: HashMap<Option<String>, Node>,
    /// The adapters that steps with several can mix, on the device; `None` for one that cannot be mixed.
    row_adapters: HashMap<String, Option<Arc<RowAdapter>>>,
    /// Events that the next step returns first.
    events: Vec<Event>,
    next_request: u64,
    /// The number of the next sequence in `states`.
    next_sequence: u64,
    counts: Counts,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    steps: u64,
    computed_tokens: u64,
    new_tokens: u64,
    finished: u64,
    aborted: u64,
    failed: u64,
}

/// The state of an engine, and counts since its start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Samples that run.
    pub running: usize,
    /// Samples that wait, preempted ones included.
    pub waiting: usize,
    /// Pages of the cache; each holds 16 tokens.
    pub pages: usize,
    /// Pages that running samples hold.
    pub pages_used: usize,
    /// Pages that nobody holds, with prefixes that new requests can share.
    pub pages_cached: usize,
    /// Tokens of starting samples that were looked up in the cache.
    pub prefix_queries: u64,
    /// Tokens of starting samples that were found there and not computed.
    pub prefix_hits: u64,
    /// Samples that gave up their pages and were computed again.
    pub preemptions: u64,
    /// Steps that computed something.
    pub steps: u64,
    /// Tokens that went through the model, in prompts and texts, recomputed ones included.
    pub computed_tokens: u64,
    /// Tokens that were chosen.
    pub new_tokens: u64,
    /// Samples that ended by a stop id or their length.
    pub finished: u64,
    /// Samples that were aborted.
    pub aborted: u64,
    /// Samples that ended with an error.
    pub failed: u64,
    /// True if the engine sleeps.
    pub is_asleep: bool,
}

impl<M: EngineModel> Engine<M> {
    /// Returns an engine for `model`, with an empty cache. The model may be owned, or borrowed as `&CausalLm` or
    /// `&mut CausalLm`.
    ///
    /// # Errors
    /// [`Error::Argument`] for limits that contradict each other and for a cache without a page, [`Error::Model`] when the
    /// device has no memory for the cache.
    pub fn new(model: M, config: EngineConfig) -> Result<Self, Error> {
        config.check()?;
        let lm = model.causal_lm();
        let pages = config.pages(lm)?;
        let states = lm.decoder().paged_states(pages).map_err(rekindle_models::Error::from)?;
        Ok(Self {
            model,
            config,
            scheduler: Scheduler::new(config.max_batch_tokens, config.max_sequences, pages),
            states: Some(states),
            steps: DecodeSteps::default(),
            ahead: None,
            sequences: BTreeMap::new(),
            roots: HashMap::new(),
            row_adapters: HashMap::new(),
            events: Vec::new(),
            next_request: 0,
            next_sequence: 0,
            counts: Counts::default(),
        })
    }

    /// Returns the model.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// Calls `change` with the model. Running samples are computed again with the changed model, and cached prefixes are
    /// dropped.
    pub fn with_model<R>(&mut self, change: impl FnOnce(&mut M) -> R) -> R {
        self.restart();
        change(&mut self.model)
    }

    /// Returns the model; requests that are not complete are dropped.
    pub fn into_model(self) -> M {
        self.model
    }

    /// Adds a request.
    ///
    /// # Errors
    /// [`Error::Model`] for a prompt that the model cannot continue and for sampling parameters out of range,
    /// [`Error::Argument`] for other values out of range and for an unknown adapter, [`Error::QueueFull`].
    pub fn submit(&mut self, request: Request) -> Result<RequestId, Error> {
        let adapter = self.check(&request)?;
        let id = RequestId(self.next_request);
        self.next_request += 1;
        let Request { prompt, n, max_tokens, sampling, stop_ids, min_tokens, top_log_probs, .. } = request;
        let lm = self.model.causal_lm();
        let most = lm.max_seq_length().min(self.scheduler.pool.len() * PAGE) - prompt.len();
        let (vocab_size, shares_prefixes) = (lm.config().vocab_size(), lm.decoder().shares_prefixes());
        let settings = Arc::new(Settings {
            prompt_tokens: prompt.len(),
            max_tokens: max_tokens.min(most),
            min_tokens,
            stop_ids,
            top_log_probs,
            prompt_log_probs: request.prompt_log_probs,
            adapter,
        });
        let pool = &mut self.scheduler.pool;
        let root = *self.roots.entry(settings.adapter.clone()).or_insert_with(|| pool.root());
        for sample in 0..n {
            let sampler = Sampler::new(&sampling, &prompt, sample as u64, vocab_size)?;
            let collects = sample == 0 && settings.prompt_log_probs.is_some();
            let sequence = Sequence {
                number: self.next_sequence,
                settings: Arc::clone(&settings),
                sampler,
                constraint: request.constraint.as_ref().map(|constraint| constraint.fork()),
                new_tokens: 0,
                prompt: collects.then(|| vec![None]),
            };
            self.next_sequence += 1;
            let sample = SampleId { request: id, sample };
            self.scheduler.add(sample, &prompt, root, !collects && shares_prefixes);
            self.sequences.insert(sample, sequence);
        }
        Ok(id)
    }

    /// Ends all samples of a request; the next step returns their [`Event::Finished`]. Returns false if the request is
    /// unknown or complete.
    pub fn abort(&mut self, request: RequestId) -> bool {
        let samples: Vec<SampleId> =
            self.sequences.keys().filter(|sample| sample.request == request).copied().collect();
        samples.iter().for_each(|&sample| self.finish(sample, FinishReason::Aborted));
        !samples.is_empty()
    }

    /// Ends one sample, as [`abort`](Self::abort) does.
    pub fn abort_sample(&mut self, request: RequestId, sample: usize) -> bool {
        let sample = SampleId { request, sample };
        let is_known = self.sequences.contains_key(&sample);
        if is_known {
            self.finish(sample, FinishReason::Aborted);
        }
        is_known
    }

    /// Returns true if a step has something to compute or to return.
    pub fn has_work(&self) -> bool {
        !self.events.is_empty() || !self.sequences.is_empty() && self.states.is_some()
    }

    /// Drops the key/value cache. Requests wait until [`wake`](Self::wake) and are then computed again.
    pub fn sleep(&mut self) {
        self.restart();
        self.states = None;
    }

    /// Allocates the key/value cache again after [`sleep`](Self::sleep).
    ///
    /// # Errors
    /// [`Error::Model`] when the device fails.
    pub fn wake(&mut self) -> Result<(), Error> {
        if self.states.is_none() {
            let decoder = self.model.causal_lm().decoder();
            let states = decoder.paged_states(self.scheduler.pool.len()).map_err(rekindle_models::Error::from)?;
            self.states = Some(states);
        }
        Ok(())
    }

    /// Returns the state of the engine.
    pub fn stats(&self) -> EngineStats {
        let (pool, scheduler) = (&self.scheduler.pool, self.scheduler.counts);
        let Counts { steps, computed_tokens, new_tokens, finished, aborted, failed } = self.counts;
        EngineStats {
            running: self.scheduler.running(),
            waiting: self.scheduler.waiting(),
            pages: pool.len(),
            pages_used: pool.len() - pool.available(),
            pages_cached: pool.cached(),
            prefix_queries: scheduler.looked_up,
            prefix_hits: scheduler.found,
            preemptions: scheduler.preemptions,
            steps,
            computed_tokens,
            new_tokens,
            finished,
            aborted,
            failed,
            is_asleep: self.states.is_none(),
        }
    }

    /// Returns the reason why the device computes single tokens without recorded steps, if it was tried.
    pub fn steps_refusal(&self) -> Option<&str> {
        self.steps.refusal()
    }

    /// Computes the next tokens of samples; returns what happened, in order.
    pub fn step(&mut self) -> Vec<Event> {
        if let Some(step) = self.ahead.take().filter(|_| !self.sequences.is_empty()) {
            self.ahead = self.begin_next(&step);
            self.end_step(step);
        } else if self.states.is_some() && !self.sequences.is_empty() {
            let plan = self.scheduler.schedule();
            if let Some(states) = &mut self.states {
                plan.copies.iter().for_each(|&(from, to)| states.copy_page(from, to));
            }
            self.counts.steps += u64::from(!plan.parts.is_empty());
            let groups = self.by_adapter(plan.parts);
            let is_single = groups.len() == 1;
            let groups = if is_single { groups } else { self.compute_mixed(groups) };
            for (adapter, parts) in groups {
                if let Err(error) = self.prepare(adapter.as_deref()) {
                    self.fail_all(parts.iter().map(|part| part.id), &error);
                    continue;
                }
                let Some(step) = self.begin_step(&parts, adapter.is_some()) else {
                    self.compute(&parts, adapter.is_some(), &[]);
                    continue;
                };
                if is_single {
                    self.ahead = self.begin_next(&step);
                }
                self.end_step(step);
            }
        }
        std::mem::take(&mut self.events)
    }

    /// Checks a request; returns its adapter.
    fn check(&mut self, request: &Request) -> Result<Option<String>, Error> {
        let lm = self.model.causal_lm();
        lm.check_prompt(&request.prompt)?;
        request.sampling.check(lm.config().vocab_size())?;
        if request.n == 0 {
            return Err(Error::Argument("n is 0; a request has at least 1 sample".to_owned()));
        }
        let most = self.scheduler.pool.len() * PAGE;
        if request.prompt.len() >= most {
            return Err(Error::Argument(format!(
                "the prompt has {} tokens and the key/value cache {most}; make the cache larger",
                request.prompt.len()
            )));
        }
        let (waiting, max_waiting) = (self.scheduler.waiting(), self.config.max_waiting);
        if waiting + request.n > max_waiting {
            return Err(Error::QueueFull { waiting, max_waiting });
        }
        match &request.adapter {
            AdapterChoice::Active => Ok(lm.active_adapter().map(str::to_owned)),
            AdapterChoice::Base => {
                lm.check_base()?;
                Ok(None)
            }
            AdapterChoice::Named(name) if self.model.has_adapter(name) => Ok(Some(name.clone())),
            AdapterChoice::Named(name) => {
                let known = self.model.causal_lm().adapters();
                Err(Error::Argument(format!(
                    "adapter {name:?} is not available to the engine; the model has {known:?}, and only an engine that \
                     owns its model can use inactive ones"
                )))
            }
        }
    }

    /// Sorts parts by adapter: the active one first, so that it is not activated twice.
    fn by_adapter(&self, parts: Vec<Part>) -> Vec<(Option<String>, Vec<Part>)> {
        let active = self.model.causal_lm().active_adapter().map(str::to_owned);
        let mut groups: Vec<(Option<String>, Vec<Part>)> = Vec::new();
        for part in parts {
            let adapter = &self.sequences[&part.id].settings.adapter;
            match groups.iter_mut().find(|(known, _)| known == adapter) {
                Some((_, group)) => group.push(part),
                None => groups.push((adapter.clone(), vec![part])),
            }
        }
        groups.sort_by_key(|(adapter, _)| adapter.is_some() && *adapter != active);
        groups
    }

    /// Computes parts with different adapters in one batch, those of the base included, and returns the groups that cannot be
    /// mixed.
    fn compute_mixed(&mut self, groups: Vec<(Option<String>, Vec<Part>)>) -> Vec<(Option<String>, Vec<Part>)> {
        let (mut mixed, mut others) = (Vec::new(), Vec::new());
        for (name, parts) in groups {
            let adapter = match &name {
                Some(name) => self.row_adapter(name).map(Some),
                None => self.model.causal_lm().check_base().is_ok().then_some(None),
            };
            match adapter {
                Some(adapter) => mixed.push((name, parts, adapter)),
                None => others.push((name, parts)),
            }
        }
        if mixed.len() < 2 {
            // One group by itself is faster with its adapter active.
            others.splice(0..0, mixed.into_iter().map(|(name, parts, _)| (name, parts)));
            return others;
        }
        let adapters: Vec<_> = mixed.iter().flat_map(|(_, parts, own)| parts.iter().map(|_| own.clone())).collect();
        let parts: Vec<Part> = mixed.into_iter().flat_map(|(_, parts, _)| parts).collect();
        self.compute(&parts, false, &adapters);
        others
    }

    /// Returns the factors of an adapter on the device; `None` if it cannot be mixed with others.
    fn row_adapter(&mut self, name: &str) -> Option<Arc<RowAdapter>> {
        let lm = self.model.causal_lm();
        let load = || lm.row_adapter(name).ok().flatten().map(Arc::new);
        self.row_adapters.entry(name.to_owned()).or_insert_with(load).clone()
    }

    /// Makes the model ready for an adapter, or for the base.
    fn prepare(&mut self, adapter: Option<&str>) -> Result<(), Error> {
        match adapter {
            Some(name) => {
                if self.model.causal_lm().active_adapter() != Some(name) {
                    self.steps = DecodeSteps::default();
                }
                Ok(self.model.activate(name)?)
            }
            None => Ok(self.model.causal_lm().check_base()?),
        }
    }

    fn finish(&mut self, id: SampleId, reason: FinishReason) {
        let Some(sequence) = self.take_sequence(id) else { return };
        let cached_tokens = self.scheduler.get(id).and_then(|cached| cached.found).unwrap_or(0);
        self.scheduler.remove(id);
        match reason {
            FinishReason::Aborted => self.counts.aborted += 1,
            FinishReason::Stop(_) | FinishReason::Length => self.counts.finished += 1,
        }
        let usage =
            Usage { prompt_tokens: sequence.settings.prompt_tokens, cached_tokens, new_tokens: sequence.new_tokens };
        self.events.push(Event::Finished { request: id.request, sample: id.sample, reason, usage });
    }

    /// Removes a sample and its state.
    fn take_sequence(&mut self, id: SampleId) -> Option<Sequence> {
        let sequence = self.sequences.remove(&id)?;
        if let Some(states) = &mut self.states {
            states.remove_sequence(sequence.number);
        }
        Some(sequence)
    }

    fn fail(&mut self, id: SampleId, error: Error) {
        self.take_sequence(id);
        self.scheduler.remove(id);
        self.counts.failed += 1;
        self.events.push(Event::Failed { request: id.request, sample: id.sample, error });
    }

    fn fail_all(&mut self, samples: impl Iterator<Item = SampleId>, error: &Error) {
        samples.for_each(|id| self.fail(id, Error::Step(error.to_string())));
    }

    /// Makes running samples wait and forgets what pages hold.
    fn restart(&mut self) {
        self.ahead = None;
        self.scheduler.restart();
        self.steps = DecodeSteps::default();
        self.row_adapters.clear();
    }
}
