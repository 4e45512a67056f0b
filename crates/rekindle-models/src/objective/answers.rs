//! The documents of a batch as answers: their log-probabilities, and the weights of their tokens.

use core::ops::Range;

use rekindle_kernels::linear_cross_entropy::LogProbValues;

use super::{BatchLoss, Metric};
use crate::{Batch, IGNORED};

/// A document as an answer to its prompt.
#[derive(Clone, Debug)]
pub(super) struct ScoredAnswer {
    /// The tokens of the document.
    pub(super) document: Range<usize>,
    /// The document's row in the step.
    pub(super) row: u32,
    /// The number of the answer's tokens.
    pub(super) tokens: usize,
    /// Σ factor_t · ln π(token t) over the answer.
    pub(super) log_prob: f64,
    /// The same of the reference model; 0 without one.
    pub(super) reference: f64,
    /// True for a desirable answer; false if the batch does not know.
    pub(super) preferred: bool,
    /// The number of leading tokens with factor 1, and the factor of the others.
    tail: (usize, f64),
}

impl ScoredAnswer {
    /// Returns ln π − ln π_ref.
    pub(super) fn log_ratio(&self) -> f64 {
        self.log_prob - self.reference
    }

    /// Returns the answer's tokens with their factors.
    fn factors<'a>(&self, batch: &'a Batch) -> impl Iterator<Item = (usize, f64)> + use<'a> {
        let (whole, tail) = self.tail;
        let tokens = answer_tokens(batch, self.document.clone()).enumerate();
        tokens.map(move |(index, token)| (token, if index < whole { 1.0 } else { tail }))
    }
}

/// Returns the positions whose targets are the tokens of the answer in `document`.
pub(super) fn answer_tokens(batch: &Batch, document: Range<usize>) -> impl Iterator<Item = usize> + use<'_> {
    document.filter(|&token| batch.is_answer(token))
}

/// Returns the answers of a batch. `tail_factor` is the factor of the tokens of a pair's longer answer beyond the length of the
/// shorter one; without it documents need not come in pairs.
pub(super) fn answers(
    batch: &Batch,
    log_probs: &LogProbValues,
    reference: Option<&LogProbValues>,
    tail_factor: Option<f64>,
) -> Vec<ScoredAnswer> {
    let lengths: Vec<usize> = batch.documents().map(|document| answer_tokens(batch, document).count()).collect();
    let answer = |(index, document): (usize, Range<usize>)| {
        let tail = match tail_factor {
            Some(factor) => (lengths[index].min(lengths[index ^ 1]), factor),
            None => (usize::MAX, 1.0),
        };
        let given = batch.answers.get(index);
        let mut answer = ScoredAnswer {
            document,
            row: batch.rows[index],
            tokens: lengths[index],
            log_prob: 0.0,
            reference: given.and_then(|given| given.reference).unwrap_or(0.0),
            preferred: given.is_some_and(|given| given.preferred),
            tail,
        };
        let sum = |of: &LogProbValues| -> f64 {
            answer.factors(batch).map(|(token, factor)| factor * f64::from(of.log_probs[token])).sum()
        };
        let sums = (sum(log_probs), reference.map(sum));
        answer.log_prob = sums.0;
        answer.reference = sums.1.unwrap_or(answer.reference);
        answer
    };
    batch.documents().enumerate().map(answer).collect()
}

/// Returns the answers in pairs of chosen and rejected.
///
/// # Panics
/// If their number is odd.
pub(super) fn pairs(answers: &[ScoredAnswer]) -> &[[ScoredAnswer; 2]] {
    let (pairs, rest) = answers.as_chunks::<2>();
    assert!(rest.is_empty(), "documents come in pairs");
    pairs
}

impl BatchLoss {
    /// Returns a loss of 0 without metrics.
    pub(super) fn zero(batch: &Batch) -> Self {
        Self { sum: 0.0, weights: vec![0.0; batch.tokens()], metrics: Vec::new() }
    }

    /// Adds the derivative ∂sum/∂log_prob of an answer to the weights of its tokens.
    pub(super) fn add_slope(&mut self, batch: &Batch, answer: &ScoredAnswer, slope: f64) {
        for (token, factor) in answer.factors(batch) {
            self.weights[token] -= (slope * factor) as f32;
        }
    }

    /// Adds `weight` · Σ nll over the tokens of a document that have a target, prompts included. Returns Σ nll.
    pub(super) fn add_nll(
        &mut self,
        batch: &Batch,
        document: Range<usize>,
        log_probs: &LogProbValues,
        weight: f64,
    ) -> f64 {
        let mut nll = 0.0;
        for token in document.filter(|&token| batch.targets[token] != IGNORED) {
            nll -= f64::from(log_probs.log_probs[token]);
            self.weights[token] += weight as f32;
        }
        self.sum += weight * nll;
        nll
    }

    /// Adds the metrics of a pair with the given rewards and log-probabilities.
    pub(super) fn add_pair_metrics(&mut self, rewards: [f64; 2], log_probs: [f64; 2]) {
        let [chosen, rejected] = rewards;
        let metrics = [
            ("rewards/chosen", chosen),
            ("rewards/rejected", rejected),
            ("rewards/accuracies", f64::from(u8::from(chosen > rejected))),
            ("rewards/margins", chosen - rejected),
            ("logps/chosen", log_probs[0]),
            ("logps/rejected", log_probs[1]),
        ];
        Metric::add(&mut self.metrics, metrics.map(|(name, value)| Metric::new(name, value, 1)));
    }

    /// Adds the mean entropy over the tokens of all answers.
    pub(super) fn add_entropy(&mut self, batch: &Batch, log_probs: &LogProbValues) {
        let tokens = || (0..batch.tokens()).filter(|&token| batch.is_answer(token));
        let sum = tokens().map(|token| f64::from(log_probs.entropy[token])).sum();
        Metric::add(&mut self.metrics, [Metric::new("entropy", sum, tokens().count())]);
    }

    /// Adds the share of tokens of an answer that are the most likely ones.
    pub(super) fn add_accuracy(&mut self, batch: &Batch, answer: &ScoredAnswer, log_probs: &LogProbValues) {
        let tokens = answer_tokens(batch, answer.document.clone());
        let right = tokens.filter(|&token| log_probs.is_argmax[token]).count();
        Metric::add(&mut self.metrics, [Metric::new("mean_token_accuracy", right as f64, answer.tokens)]);
    }
}

/// Returns the number of pairs of a step, divided by the number of targets in the chosen documents: the factor of a mean
/// over tokens in a sum over pairs.
pub(super) fn pairs_per_chosen_token(batches: &[Batch]) -> f64 {
    let (mut pairs, mut tokens) = (0, 0);
    for batch in batches {
        pairs += batch.rows.len() / 2;
        let chosen = batch.documents().step_by(2).flatten();
        tokens += chosen.filter(|&token| batch.targets[token] != IGNORED).count();
    }
    pairs as f64 / tokens.max(1) as f64
}
