//! Sampling of the next token from logits.

use core::cmp::Ordering;
use std::collections::BTreeSet;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{Error, GenerationConfig};

/// A sampler with the settings of a [`GenerationConfig`].
///
/// The filters and their order are those of transformers: repetition penalty, then temperature, `top_k`, `top_p` and
/// `min_p`. One difference: `top_k` keeps exactly k tokens, the lower ids of equal ones, where transformers keeps all
/// that are equal to the k-th.
pub(crate) struct Sampler {
    temperature: f32,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f32,
    /// The tokens of the text so far; empty without a penalty.
    seen: BTreeSet<u32>,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler for a text that begins with `prompt`, whose ids are in the vocabulary.
    ///
    /// # Errors
    /// [`Error::Argument`] for numbers out of range.
    pub(crate) fn new(config: &GenerationConfig, prompt: &[u32]) -> Result<Self, Error> {
        let GenerationConfig { temperature, top_k, top_p, min_p, repetition_penalty, seed, .. } = *config;
        let problem = if !(temperature >= 0.0 && temperature.is_finite()) {
            format!("temperature is {temperature}; it must be 0 (greedy) or above")
        } else if !(top_p > 0.0 && top_p <= 1.0) {
            format!("top_p is {top_p}; it must be above 0 and at most 1")
        } else if !(0.0..=1.0).contains(&min_p) {
            format!("min_p is {min_p}; it must be 0 (off) to 1")
        } else if !(repetition_penalty > 0.0 && repetition_penalty.is_finite()) {
            format!("repetition_penalty is {repetition_penalty}; it must be above 0, and 1 is none")
        } else {
            let seen = if repetition_penalty == 1.0 { BTreeSet::new() } else { prompt.iter().copied().collect() };
            let (top_p, min_p) = (f64::from(top_p), f64::from(min_p));
            let rng = ChaCha8Rng::seed_from_u64(seed);
            return Ok(Self { temperature, top_k, top_p, min_p, repetition_penalty, seen, rng });
        };
        Err(Error::Argument(problem))
    }

    /// Returns the next token, or `None` when a logit is infinite or not a number. Changes `logits`.
    pub(crate) fn next(&mut self, logits: &mut [f32]) -> Option<u32> {
        if !logits.iter().all(|logit| logit.is_finite()) {
            return None;
        }
        self.penalize(logits);
        let id = if self.temperature == 0.0 { argmax(logits) } else { self.draw(logits) };
        if self.repetition_penalty != 1.0 {
            self.seen.insert(id);
        }
        Some(id)
    }

    /// Divides the positive logits of tokens that the text has already by the penalty, and multiplies the negative ones.
    fn penalize(&self, logits: &mut [f32]) {
        for &id in &self.seen {
            let logit = &mut logits[id as usize];
            let penalized =
                if *logit < 0.0 { *logit * self.repetition_penalty } else { *logit / self.repetition_penalty };
            *logit = penalized.clamp(f32::MIN, f32::MAX);
        }
    }

    fn draw(&mut self, logits: &[f32]) -> u32 {
        let mut candidates = self.candidates(logits);
        let total: f64 = candidates.tokens.iter().map(|(_, weight)| weight).sum();
        let mut left = self.rng.random::<f64>() * total;
        let mut last = 0;
        for rank in 0..candidates.tokens.len() {
            let (id, weight) = candidates.get(rank);
            left -= weight;
            last = id;
            if left < 0.0 {
                break;
            }
        }
        last
    }

    /// The tokens that may be drawn, with weights in proportion to their probabilities; the largest weight is 1.
    fn candidates(&self, logits: &[f32]) -> Ranked {
        let mut order: Vec<u32> = (0..logits.len() as u32).collect();
        if self.top_k > 0 && self.top_k < order.len() {
            let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
            order.select_nth_unstable_by(self.top_k - 1, by_logit);
            order.truncate(self.top_k);
        }
        let max = order.iter().map(|&id| logits[id as usize]).fold(f32::MIN, f32::max);
        let weight = |id: u32| f64::from((logits[id as usize] - max) / self.temperature).exp();
        let mut ranked = Ranked::new(order.into_iter().map(|id| (id, weight(id))).collect());
        if self.top_p < 1.0 {
            let kept = ranked.nucleus(self.top_p);
            ranked.tokens.truncate(kept);
        }
        if self.min_p > 0.0 {
            ranked.tokens.retain(|(_, weight)| *weight >= self.min_p);
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

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampling() -> GenerationConfig {
        GenerationConfig { temperature: 1.0, ..GenerationConfig::default() }
    }

    /// The filtered distribution by id, of the tokens that are left.
    fn distribution(config: &GenerationConfig, prompt: &[u32], logits: &[f32]) -> Vec<(u32, f64)> {
        let sampler = Sampler::new(config, prompt).unwrap();
        let mut logits = logits.to_vec();
        sampler.penalize(&mut logits);
        let mut tokens = sampler.candidates(&logits).tokens;
        let total: f64 = tokens.iter().map(|(_, weight)| weight).sum();
        tokens.sort_unstable_by_key(|(id, _)| *id);
        tokens.into_iter().map(|(id, weight)| (id, weight / total)).collect()
    }

    /// Logits are rounded to f32, so probabilities are right to 1e-6.
    fn assert_is(got: &[(u32, f64)], expected: &[(u32, f64)]) {
        let ids = |list: &[(u32, f64)]| list.iter().map(|(id, _)| *id).collect::<Vec<_>>();
        assert_eq!(ids(got), ids(expected));
        for ((id, got), (_, expected)) in got.iter().zip(expected) {
            assert!((got - expected).abs() < 1e-6, "token {id}: {got} for {expected}");
        }
    }

    /// Probabilities 1/2, 1/4, 1/8, 1/16 and 1/16, not in order.
    fn halves() -> Vec<f32> {
        [0.125f32, 0.5, 0.0625, 0.25, 0.0625].map(f32::ln).to_vec()
    }

    #[test]
    fn cuts_and_shares() {
        let config = GenerationConfig { temperature: 1.0, top_k: 2, seed: 1, ..GenerationConfig::default() };
        let logits = [0.0, 3f32.ln(), 0.5f32.ln(), 0.0];
        let mut sampler = Sampler::new(&config, &[]).unwrap();
        let draws: Vec<u32> = (0..4000).map(|_| sampler.next(&mut logits.to_vec()).unwrap()).collect();
        let count = |id| draws.iter().filter(|&&d| d == id).count();
        assert_eq!(count(2) + count(3), 0, "outside the top 2 (ties go to the lower id)");
        // 4,000 draws with p = 3/4: standard deviation 27; five of them.
        assert!(count(1).abs_diff(3000) < 137, "{}", count(1));
        let nucleus = |weights: &[f64], top_p| Ranked::new((0..).zip(weights.iter().copied()).collect()).nucleus(top_p);
        assert_eq!(nucleus(&[0.5, 0.3, 0.2], 0.5), 1);
        assert_eq!(nucleus(&[0.5, 0.3, 0.2], 0.51), 2);
        assert_eq!(nucleus(&[0.5, 0.3, 0.2], 1.0), 3);
        let mut greedy = Sampler::new(&GenerationConfig::default(), &[]).unwrap();
        assert_eq!(greedy.next(&mut [1.0, 2.0, 2.0]), Some(1));
        assert!(Sampler::new(&GenerationConfig { top_p: 0.0, ..config }, &[]).is_err());
    }

    #[test]
    fn temperature_divides_logits() {
        let config = GenerationConfig { temperature: 0.5, ..sampling() };
        // Squares of 2, 4, 1 and 1, in twenty-seconds.
        let logits = [2f32.ln(), 4f32.ln(), 0.0, 0.0];
        let expected = [(0, 4.0 / 22.0), (1, 16.0 / 22.0), (2, 1.0 / 22.0), (3, 1.0 / 22.0)];
        assert_is(&distribution(&config, &[], &logits), &expected);
    }

    #[test]
    fn top_k_and_top_p_renormalize_what_they_keep() {
        let top_k = GenerationConfig { top_k: 3, ..sampling() };
        assert_is(&distribution(&top_k, &[], &halves()), &[(0, 1.0 / 7.0), (1, 4.0 / 7.0), (3, 2.0 / 7.0)]);
        // 1/2 + 1/4 are not yet 0.8.
        let top_p = GenerationConfig { top_p: 0.8, ..sampling() };
        assert_is(&distribution(&top_p, &[], &halves()), &[(0, 1.0 / 7.0), (1, 4.0 / 7.0), (3, 2.0 / 7.0)]);
        // The share is of what top_k left: 4/7 + 2/7 reach 0.8, of all tokens they would not.
        let both = GenerationConfig { top_k: 3, top_p: 0.8, ..sampling() };
        assert_is(&distribution(&both, &[], &halves()), &[(1, 2.0 / 3.0), (3, 1.0 / 3.0)]);
    }

    #[test]
    fn min_p_is_a_share_of_the_most_likely_token() {
        let with = |min_p| GenerationConfig { min_p, ..sampling() };
        // The bounds are 0.5 · 0.3 = 0.15 and 0.5 · 0.2 = 0.1: below 1/4 and 1/8.
        assert_is(&distribution(&with(0.3), &[], &halves()), &[(1, 2.0 / 3.0), (3, 1.0 / 3.0)]);
        assert_is(&distribution(&with(0.2), &[], &halves()), &[(0, 1.0 / 7.0), (1, 4.0 / 7.0), (3, 2.0 / 7.0)]);
        assert_is(&distribution(&with(1.0), &[], &halves()), &[(1, 1.0)]);
        // After the temperature: squares of the shares, 1, 1/4, 1/16 and 1/64 twice.
        let hot = GenerationConfig { temperature: 0.5, ..with(0.1) };
        assert_is(&distribution(&hot, &[], &halves()), &[(1, 0.8), (3, 0.2)]);
        for wrong in [-0.1, 1.1, f32::NAN] {
            assert!(Sampler::new(&with(wrong), &[]).is_err_and(|e| e.to_string().contains("min_p")), "{wrong}");
        }
    }

    #[test]
    fn the_repetition_penalty_counts_each_token_once() {
        let config = GenerationConfig { repetition_penalty: 2.0, ..GenerationConfig::default() };
        let mut sampler = Sampler::new(&config, &[0, 3, 3]).unwrap();
        let mut logits = [4.0, 3.0, -1.0, -3.0];
        assert_eq!(sampler.next(&mut logits), Some(1), "4 became 2");
        assert_eq!(logits, [2.0, 3.0, -1.0, -6.0]);
        let mut logits = [4.0, 3.0, 2.5, -3.0];
        assert_eq!(sampler.next(&mut logits), Some(2), "what was chosen is penalized too");
        assert_eq!(logits, [2.0, 1.5, 2.5, -6.0]);
        // Before the temperature: 2 · ln 2 becomes ln 2, divided by 1/2 twice that.
        let warm = GenerationConfig { temperature: 0.5, ..config.clone() };
        assert_is(&distribution(&warm, &[0], &[4f32.ln(), 0.0]), &[(0, 0.8), (1, 0.2)]);
        for wrong in [0.0, -1.0, f32::NAN, f32::INFINITY] {
            let config = GenerationConfig { repetition_penalty: wrong, ..config.clone() };
            assert!(Sampler::new(&config, &[]).is_err_and(|e| e.to_string().contains("repetition_penalty")), "{wrong}");
        }
    }

    #[test]
    fn nothing_is_drawn_from_what_is_not_finite() {
        for config in [GenerationConfig::default(), sampling()] {
            let mut sampler = Sampler::new(&config, &[]).unwrap();
            for wrong in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                assert_eq!(sampler.next(&mut [0.0, wrong, 1.0]), None);
            }
            assert!(sampler.next(&mut [f32::MAX, f32::MIN]).is_some());
        }
    }

    /// A vocabulary that is sorted in parts: ranks are those of a whole sort.
    #[test]
    fn ranks_are_those_of_a_sort() {
        let tokens: Vec<(u32, f64)> = (0..1000).map(|id| (id, f64::from(id * 7919 % 101))).collect();
        let mut sorted = tokens.clone();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1));
        let mut ranked = Ranked::new(tokens);
        for (rank, expected) in sorted.iter().enumerate() {
            assert_eq!(ranked.get(rank), *expected, "{rank}");
        }
    }
}
