//! The best evaluation, and early stopping.

use crate::SftConfig;
use crate::checkpoint::BestEvaluation;

/// The evaluation losses of a run, as in transformers' `EarlyStoppingCallback`.
///
/// An evaluation is an improvement for `early_stopping_patience` if its loss is below the previous best by more than
/// `early_stopping_threshold`. The best evaluation is the one with the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Stopping {
    pub(crate) best: Option<BestEvaluation>,
    /// Consecutive evaluations without improvement.
    pub(crate) counter: usize,
    patience: Option<usize>,
    threshold: f64,
}

impl Stopping {
    /// Returns the state after `best` and `counter` evaluations without improvement, or at the beginning of a run.
    pub(crate) fn new(config: &SftConfig, best: Option<BestEvaluation>, counter: usize) -> Self {
        Self { best, counter, patience: config.early_stopping_patience, threshold: config.early_stopping_threshold }
    }

    /// Counts an evaluation; returns true if its loss is the lowest so far.
    pub(crate) fn evaluated(&mut self, step: usize, eval_loss: f64) -> bool {
        let better_by = |margin| self.best.is_none_or(|best| best.eval_loss - eval_loss > margin);
        self.counter = if better_by(self.threshold) { 0 } else { self.counter + 1 };
        let is_best = better_by(0.0);
        if is_best {
            self.best = Some(BestEvaluation { step, eval_loss });
        }
        is_best
    }

    /// Returns true if the run must end.
    pub(crate) fn is_over(&self) -> bool {
        self.patience.is_some_and(|patience| self.counter >= patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_gains_move_the_best_and_do_not_stay_the_end() {
        let config =
            SftConfig { early_stopping_patience: Some(2), early_stopping_threshold: 0.125, ..SftConfig::default() };
        let mut stopping = Stopping::new(&config, None, 0);
        let seen: Vec<_> = [(2, 2.0), (4, 1.5), (6, 1.4375), (8, 1.5), (10, 1.0)]
            .into_iter()
            .map(|(step, loss)| (stopping.evaluated(step, loss), stopping.counter, stopping.is_over()))
            .collect();
        assert_eq!(seen, [(true, 0, false), (true, 0, false), (true, 1, false), (false, 2, true), (true, 0, false)]);
        assert_eq!(stopping.best, Some(BestEvaluation { step: 10, eval_loss: 1.0 }));
    }

    #[test]
    fn an_equal_loss_is_not_better_and_no_patience_means_no_end() {
        let mut stopping = Stopping::new(&SftConfig::default(), None, 0);
        assert!(stopping.evaluated(1, 1.0));
        for step in 2..20 {
            assert!(!stopping.evaluated(step, 1.0));
            assert!(!stopping.is_over());
        }
        assert_eq!(stopping.best.map(|best| best.step), Some(1));
    }
}
