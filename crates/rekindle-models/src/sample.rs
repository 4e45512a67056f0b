//! Sampling of the next token from logits.

use core::cmp::Ordering;
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rekindle_kernels::decode_step::Draw;

use crate::Error;

/// The choice of a token from its logits.
///
/// The steps and their order are those of transformers and vLLM: a mask and `logit_bias`, the penalties, then
/// `temperature`, `top_k`, `top_p` and `min_p`. One difference: `top_k` keeps exactly k tokens, the lower ids of equal
/// ones, where transformers keeps all that are equal to the k-th.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 takes the most likely token; above, logits are divided by it before the draw.
    pub temperature: f32,
    /// Draw from the k most likely tokens only; 0 for all.
    pub top_k: usize,
    /// Draw from the smallest set of most likely tokens whose probabilities reach this sum.
    pub top_p: f32,
    /// Draw only from tokens whose probability is at least this share of the most likely token's; 0 for all.
    pub min_p: f32,
    /// The logits of tokens in the prompt or the text so far are divided by it where they are positive, and multiplied
    /// where they are negative; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens that the text so far has, without the prompt.
    pub presence_penalty: f32,
    /// Subtracted from the logit of a token for each time that the text so far has it, without the prompt.
    pub frequency_penalty: f32,
    /// Numbers to add to the logits of some tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of the draws. The draw of a token depends only on the seed, the number of the sample and the index of the
    /// token.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Checks that every number is in its range, for a vocabulary of this size.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check(&self, vocab_size: usize) -> Result<(), Error> {
        let Self { temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, .. } = *self;
        let problem = if !(temperature >= 0.0 && temperature.is_finite()) {
            format!("temperature is {temperature}; it must be 0 (greedy) or above")
        } else if !(top_p > 0.0 && top_p <= 1.0) {
            format!("top_p is {top_p}; it must be above 0 and at most 1")
        } else if !(0.0..=1.0).contains(&min_p) {
            format!("min_p is {min_p}; it must be 0 (off) to 1")
        } else if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            format!("repetition_penalty is {repetition_penalty}; it must be above 0, and 1 is none")
        } else if !presence_penalty.is_finite() {
            format!("presence_penalty is {presence_penalty}; it must be a finite number, and 0 is none")
        } else if !frequency_penalty.is_finite() {
            format!("frequency_penalty is {frequency_penalty}; it must be a finite number, and 0 is none")
        } else if let Some((id, bias)) = self.logit_bias.iter().find(|(_, bias)| !bias.is_finite()) {
            format!("logit_bias of token {id} is {bias}; it must be a finite number")
        } else if let Some((id, _)) = self.logit_bias.iter().find(|(id, _)| *id as usize >= vocab_size) {
            format!("logit_bias names token {id}, and the model's vocabulary has {vocab_size} tokens")
        } else {
            return Ok(());
        };
        Err(Error::Argument(problem))
    }

    /// Returns true if logits are changed before the temperature.
    fn changes_logits(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || !self.logit_bias.is_empty()
    }
}

/// A set of token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenMask {
    /// One bit for each id, from the lowest bit of the first word on.
    words: Vec<u32>,
    vocab_size: usize,
}

impl TokenMask {
    /// Returns a set without tokens, for a vocabulary of this size.
    pub fn none(vocab_size: usize) -> Self {
        Self { words: vec![0; vocab_size.div_ceil(32)], vocab_size }
    }

    /// Returns the set of all tokens.
    pub fn all(vocab_size: usize) -> Self {
        Self::from_words(vec![u32::MAX; vocab_size.div_ceil(32)], vocab_size)
    }

    /// Returns the set of these bits, the lowest of the first word for token 0. Missing words are zeros, and bits beyond
    /// the vocabulary are ignored.
    pub fn from_words(mut words: Vec<u32>, vocab_size: usize) -> Self {
        words.resize(vocab_size.div_ceil(32), 0);
        if let Some(last) = words.last_mut() {
            *last &= u32::MAX >> (vocab_size.next_multiple_of(32) - vocab_size);
        }
        Self { words, vocab_size }
    }

    /// Adds a token; one beyond the vocabulary is ignored.
    pub fn set(&mut self, id: u32) {
        if (id as usize) < self.vocab_size {
            self.words[id as usize / 32] |= 1 << (id % 32);
        }
    }

    /// Returns true if the set has this token.
    pub fn allows(&self, id: u32) -> bool {
        self.words.get(id as usize / 32).is_some_and(|word| word >> (id % 32) & 1 == 1)
    }

    /// Returns true if the set has no token.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }
}

/// Tokens that cannot be chosen next.
#[derive(Clone, Copy, Debug, Default)]
pub struct TokenLimits<'a> {
    /// The tokens that can be chosen; `None` for all.
    pub allowed: Option<&'a TokenMask>,
    /// Tokens that cannot be chosen.
    pub banned: &'a [u32],
}

/// A token that was chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampled {
    /// The token.
    pub id: u32,
    /// ln p of the token in the distribution that it was drawn from; 0 for a greedy choice.
    pub log_prob: f32,
}

/// The reason why no token was chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsampled {
    /// A logit is infinite or not a number.
    NonFinite,
    /// No token is allowed.
    NothingAllowed,
}

/// Chooses the tokens of one text, one after another.
#[derive(Clone, Debug)]
pub struct Sampler {
    params: SamplingParams,
    /// The number of the random stream.
    stream: u64,
    /// The tokens of the prompt; empty without a repetition penalty.
    prompt: BTreeSet<u32>,
    /// The number of times that the text has each token; empty without penalties.
    counts: BTreeMap<u32, u32>,
    /// Tokens chosen so far.
    index: u64,
}

impl Sampler {
    /// Returns a sampler for a text that begins with `prompt`. Samples of one prompt have a `stream` each.
    ///
    /// # Errors
    /// [`Error::Argument`] for numbers out of range, as [`SamplingParams::check`].
    pub fn new(params: &SamplingParams, prompt: &[u32], stream: u64, vocab_size: usize) -> Result<Self, Error> {
        params.check(vocab_size)?;
        let prompt = if params.repetition_penalty == 1.0 { BTreeSet::new() } else { prompt.iter().copied().collect() };
        Ok(Self { params: params.clone(), stream, prompt, counts: BTreeMap::new(), index: 0 })
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// [`Unsampled`]; the sampler is then unchanged.
    pub fn next(&mut self, logits: &[f32], limits: TokenLimits<'_>) -> Result<Sampled, Unsampled> {
        let sampled = self.choose(logits, limits)?;
        self.accept(sampled.id);
        Ok(sampled)
    }

    /// Returns the choice of the next token, which is then given to [`accept`](Self::accept).
    pub(crate) fn choose(&self, logits: &[f32], limits: TokenLimits<'_>) -> Result<Sampled, Unsampled> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return Err(Unsampled::NonFinite);
        }
        let logits = self.changed(logits, limits);
        if self.params.temperature == 0.0 {
            let id = argmax(&logits).ok_or(Unsampled::NothingAllowed)?;
            return Ok(Sampled { id, log_prob: 0.0 });
        }
        self.draw(&logits).ok_or(Unsampled::NothingAllowed)
    }

    /// Returns the choice of the next token for [`CausalLm::draw`](crate::CausalLm::draw), or of the token `ahead` tokens after
    /// it; `None` if penalties or biases change its logits. The token that was drawn is given to [`accept`](Self::accept).
    pub fn draw_on_device(&self, ahead: u64) -> Option<Draw> {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let uniform = if temperature == 0.0 { 0.0 } else { self.uniform(self.index + ahead) };
        (!self.params.changes_logits()).then_some(Draw { temperature, top_k, top_p, min_p, uniform })
    }

    /// Adds a token that was chosen elsewhere.
    pub fn accept(&mut self, id: u32) {
        self.index += 1;
        if self.params.changes_logits() {
            *self.counts.entry(id).or_default() += 1;
        }
    }

    /// Returns the logits after masks, biases and penalties; −∞ for tokens that cannot be chosen.
    fn changed<'l>(&self, logits: &'l [f32], limits: TokenLimits<'_>) -> Cow<'l, [f32]> {
        let TokenLimits { allowed, banned } = limits;
        if !self.params.changes_logits() && allowed.is_none() && banned.is_empty() {
            return Cow::Borrowed(logits);
        }
        let finite = |logit: f32| logit.clamp(f32::MIN, f32::MAX);
        let mut logits = logits.to_vec();
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, ref logit_bias, .. } =
            self.params;
        for &(id, bias) in logit_bias {
            logits[id as usize] = finite(logits[id as usize] + bias);
        }
        if repetition_penalty != 1.0 {
            let new = self.counts.keys().filter(|id| !self.prompt.contains(id));
            for &id in self.prompt.iter().chain(new) {
                let logit = &mut logits[id as usize];
                *logit = finite(if *logit < 0.0 { *logit * repetition_penalty } else { *logit / repetition_penalty });
            }
        }
        if presence_penalty != 0.0 || frequency_penalty != 0.0 {
            for (&id, &count) in &self.counts {
                let logit = &mut logits[id as usize];
                *logit = finite(*logit - presence_penalty - frequency_penalty * count as f32);
            }
        }
        if let Some(allowed) = allowed {
            let mut ids = 0..;
            logits.iter_mut().for_each(|logit| {
                if !allowed.allows(ids.next().expect("ids are endless")) {
                    *logit = f32::NEG_INFINITY;
                }
            });
        }
        for &id in banned {
            if let Some(logit) = logits.get_mut(id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Cow::Owned(logits)
    }

    fn draw(&self, logits: &[f32]) -> Option<Sampled> {
        let mut candidates = self.candidates(logits);
        let total: f64 = candidates.tokens.iter().map(|(_, weight)| weight).sum();
        let mut left = self.uniform(self.index) * total;
        let mut chosen = None;
        for rank in 0..candidates.tokens.len() {
            let (id, weight) = candidates.get(rank);
            left -= weight;
            chosen = Some(Sampled { id, log_prob: (weight / total).ln() as f32 });
            if left < 0.0 {
                break;
            }
        }
        chosen
    }

    /// Returns the random number of a token by its index, in [0, 1).
    fn uniform(&self, index: u64) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(self.params.seed);
        rng.set_stream(self.stream);
        // A number takes two words of the stream.
        rng.set_word_pos(2 * u128::from(index));
        rng.random()
    }

    /// The tokens that may be drawn, with weights in proportion to their probabilities; the largest weight is 1.
    fn candidates(&self, logits: &[f32]) -> Ranked {
        let SamplingParams { temperature, top_k, top_p, min_p, .. } = self.params;
        let (top_p, min_p) = (f64::from(top_p), f64::from(min_p));
        let mut order: Vec<u32> =
            (0..logits.len() as u32).filter(|&id| logits[id as usize] > f32::NEG_INFINITY).collect();
        if top_k > 0 && top_k < order.len() {
            let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
            order.select_nth_unstable_by(top_k - 1, by_logit);
            order.truncate(top_k);
        }
        let max = order.iter().map(|&id| logits[id as usize]).fold(f32::MIN, f32::max);
        let weight = |id: u32| f64::from((logits[id as usize] - max) / temperature).exp();
        let mut ranked = Ranked::new(order.into_iter().map(|id| (id, weight(id))).collect());
        if top_p < 1.0 {
            let kept = ranked.nucleus(top_p);
            ranked.tokens.truncate(kept);
        }
        if min_p > 0.0 {
            ranked.tokens.retain(|(_, weight)| *weight >= min_p);
            ranked.sorted = ranked.sorted.min(ranked.tokens.len());
        }
        ranked
    }
}

/// Tokens with weights, sorted from the largest weight on as far as they were asked for: a vocabulary is large, and a
/// draw seldom goes beyond its first few tokens. Of equal weights the lower id comes first.
struct Ranked {
    tokens: Vec<(u32, f64)>,
    /// The number of leading tokens that are in order and precede all others.
    sorted: usize,
}

impl Ranked {
    fn new(tokens: Vec<(u32, f64)>) -> Self {
        Self { tokens, sorted: 0 }
    }

    /// Returns the token of this rank, from 0 on.
    fn get(&mut self, rank: usize) -> (u32, f64) {
        if rank >= self.sorted {
            let order = |a: &(u32, f64), b: &(u32, f64)| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
            let rest = &mut self.tokens[self.sorted..];
            let more = (rank + 1 - self.sorted).max(64).max(3 * self.sorted).min(rest.len());
            if more < rest.len() {
                rest.select_nth_unstable_by(more - 1, order);
            }
            rest[..more].sort_unstable_by(order);
            self.sorted += more;
        }
        self.tokens[rank]
    }

    /// Returns how many tokens, the largest weights first, reach the share `top_p`; at least one.
    fn nucleus(&mut self, top_p: f64) -> usize {
        let target = self.tokens.iter().map(|(_, weight)| weight).sum::<f64>() * top_p;
        let mut sum = 0.0;
        for rank in 0..self.tokens.len() {
            sum += self.get(rank).1;
            if sum >= target {
                return rank + 1;
            }
        }
        self.tokens.len()
    }
}

/// Returns the token with the largest logit, the lower id of equal ones; `None` if all are −∞.
fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<usize> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.map_or(f32::NEG_INFINITY, |best| logits[best]) {
            best = Some(id);
        }
    }
    best.map(|id| id as u32)
}

#[cfg(test)]
mod tests;
