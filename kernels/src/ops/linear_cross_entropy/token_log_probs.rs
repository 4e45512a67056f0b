//! Log-probabilities of targets, with what a later backward needs of them.

use super::IGNORED;
use crate::runtime::Array;

/// Sums over the logits x of a row, about their maximum: 16 bytes instead of a vocabulary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct RowStatistics {
    /// The logit of the target.
    pub(super) logit: f32,
    /// max x.
    pub(super) max: f32,
    /// Σ e^(x − max).
    pub(super) sum: f32,
    /// Σ e^(x − max) · (x − max).
    pub(super) shifted: f32,
}

impl RowStatistics {
    /// The statistics of a row with one logit. They stand for rows whose values are not computed.
    pub(super) const SINGLE: Self = Self { logit: 0.0, max: 0.0, sum: 1.0, shifted: 0.0 };

    /// −log p of the target.
    pub(super) fn nll(self) -> f32 {
        self.sum.ln() + self.max - self.logit
    }

    /// −Σ p·log p over the vocabulary.
    fn entropy(self) -> f32 {
        self.sum.ln() - self.shifted / self.sum
    }
}

/// The log-probabilities of a batch's targets, as [`log_probs`](super::log_probs) computes them, with what
/// [`backward`](super::backward) needs: 16 bytes a token. On CUDA they may still be on their way.
#[derive(Clone, Debug)]
pub struct TokenLogProbs {
    pub(super) targets: Vec<i32>,
    pub(super) rows: Storage,
}

/// The statistics of the rows that have a target, one after another.
#[derive(Clone, Debug)]
pub(super) enum Storage {
    Host(Vec<RowStatistics>),
    /// `[rows, 4]`, with at least as many rows.
    Cuda(Array),
}

/// The values of [`TokenLogProbs`] on the host, each `[tokens]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LogProbValues {
    /// log p of the target; 0 where there is none.
    pub log_probs: Vec<f32>,
    /// The entropy of the distribution that the target is drawn from, −Σ p·log p in nats; 0 where there is no target.
    pub entropy: Vec<f32>,
    /// True if no logit is larger than the target's; false where there is no target.
    pub is_argmax: Vec<bool>,
}

impl TokenLogProbs {
    /// Returns the values. Waits for the device; after an error of the device they are NaN.
    pub fn values(&self) -> LogProbValues {
        let tokens = self.targets.len();
        let mut values =
            LogProbValues { log_probs: vec![0.0; tokens], entropy: vec![0.0; tokens], is_argmax: vec![false; tokens] };
        let counted = (0..tokens).filter(|&t| self.targets[t] != IGNORED);
        for (t, row) in counted.zip(self.statistics()) {
            values.log_probs[t] = -row.nll();
            values.entropy[t] = row.entropy();
            values.is_argmax[t] = row.logit >= row.max;
        }
        values
    }

    fn statistics(&self) -> Vec<RowStatistics> {
        match &self.rows {
            Storage::Host(rows) => rows.clone(),
            Storage::Cuda(rows) if rows.cuda().is_planned() => vec![RowStatistics::SINGLE; rows.rows()],
            Storage::Cuda(rows) => {
                let values = crate::to_f32(crate::Tensor::<2>::Cuda(rows.clone()));
                let row = |&[logit, max, sum, shifted]: &[f32; 4]| RowStatistics { logit, max, sum, shifted };
                values.as_chunks().0.iter().map(row).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_a_uniform_and_a_certain_row() {
        // Four equal logits of 2, and logits 0 and −87: p = [1, e^−87].
        let uniform = RowStatistics { logit: 2.0, max: 2.0, sum: 4.0, shifted: 0.0 };
        let unlikely = RowStatistics { logit: -87.0, max: 0.0, sum: 1.0, shifted: 0.0 };
        let all = TokenLogProbs { targets: vec![1, IGNORED, 0], rows: Storage::Host(vec![uniform, unlikely]) };
        let values = all.values();
        assert_eq!(values.log_probs, [-4f32.ln(), 0.0, -87.0]);
        assert_eq!(values.entropy, [4f32.ln(), 0.0, 0.0]);
        assert_eq!(values.is_argmax, [true, false, false]);
    }
}
