//! Log-probabilities of a model's own distribution.

/// A token with its log-probability.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogProb {
    /// The token.
    pub id: u32,
    /// ln p of the token.
    pub log_prob: f32,
}

/// The normalizer of the softmax of one row of logits.
///
/// ln p_i = x_i − max x − ln Σ_j exp(x_j − max x), with the sum in f64.
#[derive(Clone, Copy, Debug)]
pub struct LogSoftmax {
    max: f32,
    ln_sum: f64,
}

impl LogSoftmax {
    /// Returns the normalizer of a row of logits.
    pub fn new(logits: &[f32]) -> Self {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from((logit - max).exp())).sum();
        Self { max, ln_sum: sum.ln() }
    }

    /// Returns the log-probability of a token with this logit.
    pub fn log_prob(&self, logit: f32) -> f32 {
        (f64::from(logit) - f64::from(self.max) - self.ln_sum) as f32
    }

    /// Returns the `count` most likely tokens of the row, the most likely first.
    pub fn top(&self, logits: &[f32], count: usize) -> Vec<TokenLogProb> {
        let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
        let by_logit = |a: &u32, b: &u32| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b));
        if count == 0 {
            return Vec::new();
        }
        if count < ids.len() {
            ids.select_nth_unstable_by(count - 1, by_logit);
            ids.truncate(count);
        }
        ids.sort_unstable_by(by_logit);
        let token = |id: u32| TokenLogProb { id, log_prob: self.log_prob(logits[id as usize]) };
        ids.into_iter().map(token).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probs_of_halves() {
        let logits = [0.125f32, 0.5, 0.0625, 0.25, 0.0625].map(|p| p.ln() + 3.0);
        let softmax = LogSoftmax::new(&logits);
        let top = softmax.top(&logits, 3);
        assert_eq!(top.iter().map(|token| token.id).collect::<Vec<_>>(), [1, 3, 0]);
        for (token, expected) in top.iter().zip([0.5f32, 0.25, 0.125]) {
            assert!((token.log_prob - expected.ln()).abs() < 1e-6, "{token:?}");
        }
        assert!((softmax.log_prob(logits[4]) - 0.0625f32.ln()).abs() < 1e-6);
        assert_eq!(softmax.top(&logits, 9).len(), 5);
        assert!(softmax.top(&logits, 0).is_empty());
    }
}
