//! The choice of the tokens of each step.
//!
//! Samples run in the order of their requests. A step first takes the next token of every sample that has its prompt
//! behind it, then parts of prompts, then it starts samples that wait, up to `max_batch_tokens`. If pages run out, the
//! youngest running sample gives up its pages and waits again; its tokens are kept and computed again later.

use std::collections::{BTreeMap, BTreeSet};

use rekindle_kernels::paged_attention::PAGE;

use crate::pages::{Node, PagePool};
use crate::request::RequestId;

/// One sample of a request. The order is that of arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct SampleId {
    pub(crate) request: RequestId,
    pub(crate) sample: usize,
}

/// The tokens of a sample, and the part of them that is in the cache.
#[derive(Clone, Debug)]
pub(crate) struct Cached {
    /// Prompt and new tokens.
    pub(crate) tokens: Vec<u32>,
    /// Tokens whose keys and values are in `pages`.
    pub(crate) computed: usize,
    pub(crate) pages: Vec<u32>,
    prompt_tokens: usize,
    /// The beginning of its chain.
    root: Node,
    /// The end of the chain of its full pages, and their number.
    chain: (Node, usize),
    /// True if it may begin with the pages of others.
    reuses: bool,
    /// Tokens found in the cache when it started for the first time.
    pub(crate) found: Option<usize>,
}

/// Tokens of one sample to compute in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) id: SampleId,
    /// The first of them.
    pub(crate) start: usize,
    pub(crate) count: usize,
}

/// The work of a step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct StepPlan {
    /// Pages to copy before anything is computed, from and to, in this order.
    pub(crate) copies: Vec<(u32, u32)>,
    pub(crate) parts: Vec<Part>,
}

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct SchedulerCounts {
    pub(crate) preemptions: u64,
    /// Tokens that were looked up in the cache.
    pub(crate) looked_up: u64,
    /// Tokens that were found there.
    pub(crate) found: u64,
}

/// All samples that run or wait, and their pages.
#[derive(Debug)]
pub(crate) struct Scheduler {
    max_batch_tokens: usize,
    max_sequences: usize,
    pub(crate) pool: PagePool,
    samples: BTreeMap<SampleId, Cached>,
    running: BTreeSet<SampleId>,
    waiting: BTreeSet<SampleId>,
    pub(crate) counts: SchedulerCounts,
}

impl Scheduler {
    pub(crate) fn new(max_batch_tokens: usize, max_sequences: usize, pages: usize) -> Self {
        Self {
            max_batch_tokens,
            max_sequences,
            pool: PagePool::new(pages),
            samples: BTreeMap::new(),
            running: BTreeSet::new(),
            waiting: BTreeSet::new(),
            counts: SchedulerCounts::default(),
        }
    }

    /// Adds a sample of a prompt, whose pages are shared with those of the same `root` if it `reuses`.
    pub(crate) fn add(&mut self, id: SampleId, prompt: &[u32], root: Node, reuses: bool) {
        let cached = Cached {
            tokens: prompt.to_vec(),
            computed: 0,
            pages: Vec::new(),
            prompt_tokens: prompt.len(),
            root,
            chain: (root, 0),
            reuses,
            found: None,
        };
        self.samples.insert(id, cached);
        self.waiting.insert(id);
    }

    pub(crate) fn get(&self, id: SampleId) -> Option<&Cached> {
        self.samples.get(&id)
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Adds a new token to a sample.
    pub(crate) fn push(&mut self, id: SampleId, token: u32) {
        self.samples.get_mut(&id).expect("it runs").tokens.push(token);
    }

    /// Removes a sample; its pages lose a holder.
    pub(crate) fn remove(&mut self, id: SampleId) {
        self.give_up(id);
        self.samples.remove(&id);
        self.running.remove(&id);
        self.waiting.remove(&id);
    }

    /// Makes all running samples wait and forgets what pages hold: the states were dropped, or the weights changed.
    pub(crate) fn restart(&mut self) {
        for id in std::mem::take(&mut self.running) {
            self.give_up(id);
            self.waiting.insert(id);
        }
        self.pool.forget_all();
    }

    /// Starts a waiting sample of the same prompt from another one that has just computed it. Returns false if no more
    /// samples can run.
    pub(crate) fn fork(&mut self, from: SampleId, to: SampleId) -> bool {
        if self.running.len() >= self.max_sequences || !self.waiting.contains(&to) {
            return false;
        }
        let source = &self.samples[&from];
        let copy = Cached { found: Some(source.prompt_tokens), ..source.clone() };
        copy.pages.iter().for_each(|&page| self.pool.hold(page));
        self.samples.insert(to, copy);
        self.waiting.remove(&to);
        self.running.insert(to);
        true
    }

    /// Records that a part was computed.
    pub(crate) fn computed(&mut self, part: &Part) {
        let cached = self.samples.get_mut(&part.id).expect("it runs");
        cached.computed = part.start + part.count;
        let (mut node, mut full) = cached.chain;
        while (full + 1) * PAGE <= cached.computed {
            node = self.pool.register(cached.pages[full], node, &cached.tokens[full * PAGE..(full + 1) * PAGE]);
            full += 1;
        }
        cached.chain = (node, full);
    }

    /// Chooses the work of the next step and reserves its pages.
    pub(crate) fn schedule(&mut self) -> StepPlan {
        let mut plan = StepPlan::default();
        let mut budget = self.max_batch_tokens;
        let preemptions = self.counts.preemptions;
        let (texts, prompts): (Vec<SampleId>, Vec<SampleId>) =
            self.running.iter().partition(|id| self.missing(**id) == 1);
        for id in texts.into_iter().chain(prompts) {
            // An older sample may have taken its pages.
            if self.running.contains(&id) {
                self.continue_running(id, &mut budget, &mut plan);
            }
        }
        if self.counts.preemptions == preemptions {
            self.start_waiting(&mut budget, &mut plan);
        }
        plan
    }

    /// Returns true if the samples that run could go on before their next tokens are known: no other sample may start.
    pub(crate) fn can_run_ahead(&self) -> bool {
        self.waiting.is_empty() || self.running.len() >= self.max_sequences
    }

    /// Reserves a page for the token after the last known one of each of these samples, whose next tokens are being
    /// computed. Returns false, with nothing reserved, if there are too few pages.
    pub(crate) fn reserve_ahead(&mut self, ids: &[SampleId]) -> bool {
        let needs = |scheduler: &Self, id: &SampleId| {
            let cached = &scheduler.samples[id];
            cached.pages.len() * PAGE < cached.tokens.len() + 1
        };
        let wanting: Vec<SampleId> = ids.iter().copied().filter(|id| needs(self, id)).collect();
        if wanting.len() > self.pool.available() {
            return false;
        }
        for id in wanting {
            let page = self.pool.allocate().expect("enough pages were available");
            self.samples.get_mut(&id).expect("it runs").pages.push(page);
        }
        true
    }

    fn continue_running(&mut self, id: SampleId, budget: &mut usize, plan: &mut StepPlan) {
        let count = self.missing(id).min(*budget);
        if count == 0 {
            return;
        }
        while !self.reserve(id, count, plan) {
            let victim = *self.running.last().expect("this one runs");
            self.give_up(victim);
            self.running.remove(&victim);
            self.waiting.insert(victim);
            self.counts.preemptions += 1;
            plan.parts.retain(|part| {
                let stays = part.id != victim;
                *budget += if stays { 0 } else { part.count };
                stays
            });
            if victim == id {
                return;
            }
        }
        self.take(id, count, budget, plan);
    }

    fn start_waiting(&mut self, budget: &mut usize, plan: &mut StepPlan) {
        let waiting: Vec<SampleId> = self.waiting.iter().copied().collect();
        for id in waiting {
            if self.running.len() >= self.max_sequences || *budget == 0 {
                return;
            }
            if self.prompt_is_on_its_way(id) {
                continue;
            }
            let found = self.find_prefix(id);
            let cached = &self.samples[&id];
            // The whole text and its next token must fit, or the sample would soon be preempted.
            let needed = (cached.tokens.len() + 1).div_ceil(PAGE) - found.len();
            let unheld = found.iter().filter(|(page, _)| self.pool.is_unheld(*page)).count();
            if needed + unheld > self.pool.available() {
                return;
            }
            found.iter().for_each(|&(page, _)| self.pool.hold(page));
            let cached = self.samples.get_mut(&id).expect("it waits");
            cached.computed = found.len() * PAGE;
            cached.chain = (found.last().map_or(cached.root, |&(_, node)| node), found.len());
            cached.pages = found.into_iter().map(|(page, _)| page).collect();
            if cached.reuses {
                self.counts.looked_up += cached.tokens.len() as u64;
                self.counts.found += cached.computed as u64;
            }
            cached.found.get_or_insert(cached.computed);
            let count = self.missing(id).min(*budget);
            self.waiting.remove(&id);
            self.running.insert(id);
            let fits = self.reserve(id, count, plan);
            assert!(fits, "enough pages were available");
            self.take(id, count, budget, plan);
        }
    }

    /// Returns true if the first sample of the request is computing the prompt, which the others then share.
    fn prompt_is_on_its_way(&self, id: SampleId) -> bool {
        let first = SampleId { sample: 0, ..id };
        let is_new = self.samples[&id].tokens.len() == self.samples[&id].prompt_tokens;
        id.sample > 0
            && is_new
            && self.running.contains(&first)
            && self.samples[&first].computed < self.samples[&first].prompt_tokens
    }

    /// Returns the known pages that a sample begins with; its last token is never among them, because its logits are
    /// needed.
    fn find_prefix(&self, id: SampleId) -> Vec<(u32, Node)> {
        let cached = &self.samples[&id];
        let mut found = Vec::new();
        if !cached.reuses {
            return found;
        }
        let mut node = cached.root;
        for ids in cached.tokens[..cached.tokens.len() - 1].chunks_exact(PAGE) {
            let Some((page, next)) = self.pool.find(node, ids) else { break };
            found.push((page, next));
            node = next;
        }
        found
    }

    /// Returns the number of tokens that are not computed.
    fn missing(&self, id: SampleId) -> usize {
        let cached = &self.samples[&id];
        cached.tokens.len() - cached.computed
    }

    /// Gives a sample the pages for its next tokens, and a copy of a page that it shares and would write to. Returns
    /// false if there are too few pages; those that it got stay.
    fn reserve(&mut self, id: SampleId, count: usize, plan: &mut StepPlan) -> bool {
        let cached = self.samples.get_mut(&id).expect("it runs");
        let first = cached.computed / PAGE;
        if let Some(&shared) = cached.pages.get(first).filter(|&&page| self.pool.is_shared(page)) {
            let Some(own) = self.pool.allocate() else { return false };
            plan.copies.push((shared, own));
            self.pool.release(shared);
            cached.pages[first] = own;
        }
        while cached.pages.len() * PAGE < cached.computed + count {
            let Some(page) = self.pool.allocate() else { return false };
            cached.pages.push(page);
        }
        true
    }

    fn take(&mut self, id: SampleId, count: usize, budget: &mut usize, plan: &mut StepPlan) {
        plan.parts.push(Part { id, start: self.samples[&id].computed, count });
        *budget -= count;
    }

    /// Takes all pages from a sample, the last first, so that the beginning of its chain stays known the longest.
    fn give_up(&mut self, id: SampleId) {
        let Some(cached) = self.samples.get_mut(&id) else { return };
        cached.pages.drain(..).rev().for_each(|page| self.pool.release(page));
        cached.computed = 0;
        cached.chain = (cached.root, 0);
    }
}

#[cfg(test)]
mod tests;
