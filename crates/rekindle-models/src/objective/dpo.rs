//! Direct preference optimization.

use rekindle_kernels::linear_cross_entropy::LogProbValues;

use super::{BatchLoss, Objective};
use crate::{Batch, IGNORED};

/// Direct preference optimization: L = mean over pairs of −ln σ(β·m), with the margin
/// m = (ln π(chosen) − ln π_ref(chosen)) − (ln π(rejected) − ln π_ref(rejected)).
///
/// ln π(y) is the sum of the log-probabilities of a document's labels, and the reference model π_ref is the base model without its
/// adapter. Documents 2i and 2i + 1 of a batch are the chosen and the rejected answer of pair i.
///
/// # Gradients
/// ∂L/∂ln π(chosen) = −β·σ(−β·m) and ∂L/∂ln π(rejected) = β·σ(−β·m), each divided by the number of pairs.
///
/// Source: Rafailov et al., arXiv:2305.18290, equation 7; TRL's `loss_type="sigmoid"`. The golden is
/// `tests/goldens/dpo`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dpo {
    /// β, above 0: how far the model may move from the reference model.
    pub beta: f64,
}

impl Objective for Dpo {
    fn count(&self, batch: &Batch) -> usize {
        batch.rows.len() / 2
    }

    fn needs_reference(&self) -> bool {
        true
    }

    /// # Panics
    /// If the number of documents is odd, or without a reference.
    fn loss(&self, batch: &Batch, log_probs: &LogProbValues, reference: Option<&LogProbValues>) -> BatchLoss {
        let reference = reference.expect("needs_reference is true");
        let documents: Vec<_> = batch.documents().collect();
        let (pairs, rest) = documents.as_chunks::<2>();
        assert!(rest.is_empty(), "documents come in pairs");
        let mut sum = 0.0;
        let mut weights = vec![0.0; batch.tokens()];
        let [mut chosen_rewards, mut rejected_rewards, mut accuracies] = [0.0; 3];
        for pair in pairs {
            // β·(ln π − ln π_ref) of both documents, the implicit rewards.
            let [chosen, rejected] = pair.clone().map(|document| {
                let counted = document.filter(|&t| batch.targets[t] != IGNORED);
                let ratio = |t: usize| f64::from(log_probs.log_probs[t]) - f64::from(reference.log_probs[t]);
                self.beta * counted.map(ratio).sum::<f64>()
            });
            let margin = chosen - rejected;
            // −ln σ(x) = ln(1 + e^−x), without overflow for any x.
            sum += (-margin.abs()).exp().ln_1p() + (-margin).max(0.0);
            let weight = (self.beta / (1.0 + margin.exp())) as f32;
            for (document, weight) in pair.iter().zip([weight, -weight]) {
                weights[document.clone()].fill(weight);
            }
            chosen_rewards += chosen;
            rejected_rewards += rejected;
            accuracies += f64::from(u8::from(margin > 0.0));
        }
        let metrics = vec![
            ("rewards/chosen", chosen_rewards),
            ("rewards/rejected", rejected_rewards),
            ("rewards/margins", chosen_rewards - rejected_rewards),
            ("rewards/accuracies", accuracies),
        ];
        BatchLoss { sum, weights, metrics }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_and_weights_of_a_pair() {
        let row = (&[1u32, 2, 3][..], &[IGNORED, 2, 3][..]);
        let batch = Batch::from_rows([row, row], 0);
        let values = |log_probs: [f32; 6]| LogProbValues { log_probs: log_probs.to_vec(), ..LogProbValues::default() };
        let reference = values([-1.0, -1.0, 0.0, -1.0, -1.0, 0.0]);
        let dpo = Dpo { beta: 0.5 };
        let same = dpo.loss(&batch, &reference, Some(&reference));
        assert_eq!((same.sum, dpo.count(&batch)), (2f64.ln(), 1));
        assert_eq!(same.weights, [0.25, 0.25, 0.25, -0.25, -0.25, -0.25]);
        // The ratios are 2 and −1: a margin of 1.5.
        let better = dpo.loss(&batch, &values([0.0, 0.0, 0.0, -2.0, -1.0, 0.0]), Some(&reference));
        assert!((better.sum - (1.0 + (-1.5f64).exp()).ln()).abs() < 1e-12);
        assert_eq!(
            better.metrics,
            [
                ("rewards/chosen", 1.0),
                ("rewards/rejected", -0.5),
                ("rewards/margins", 1.5),
                ("rewards/accuracies", 1.0)
            ]
        );
        let far = dpo.loss(&batch, &values([-4e3, 0.0, 0.0, 0.0, 0.0, 0.0]), Some(&reference));
        assert!((far.sum - 0.5 * 4e3).abs() < 1.0 && far.weights[0] == 0.5);
    }
}
