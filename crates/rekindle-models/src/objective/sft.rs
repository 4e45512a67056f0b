//! Supervised fine-tuning.

use rekindle_kernels::linear_cross_entropy::{LogProbValues, TokenWeights};

use super::{BatchLoss, Objective, StepTerms};
use crate::{Batch, IGNORED};

/// The mean negative log-likelihood of the labels: L = Σ nll_t / n over n labels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sft;

impl Objective for Sft {
    fn count(&self, batch: &Batch) -> usize {
        batch.counted()
    }

    fn fixed_weights<'a>(&'a self, _: &'a Batch) -> Option<TokenWeights<'a>> {
        Some(TokenWeights::Uniform(1.0))
    }

    fn loss(&self, batch: &Batch, log_probs: &LogProbValues, _: Option<&LogProbValues>, _: &StepTerms) -> BatchLoss {
        let counted = batch.targets.iter().zip(&log_probs.log_probs).filter(|(target, _)| **target != IGNORED);
        let sum = counted.map(|(_, &log_prob)| -f64::from(log_prob)).sum();
        BatchLoss { sum, weights: vec![1.0; batch.tokens()], metrics: Vec::new() }
    }
}
