//! Callbacks of a training run.

use std::path::Path;

use super::RunConfig;
use crate::{EncodedRows, MemoryPlan, Model, TrainEvent};

/// Receives what happens in a training run. Every method does nothing by default, and `()` observes nothing.
///
/// ```
/// use rekindle::TrainEvent;
/// use rekindle::run::RunObserver;
///
/// struct Losses;
///
/// impl RunObserver for Losses {
///     fn event(&self, event: &TrainEvent<'_>) {
///         if let TrainEvent::Step { metrics, total } = event {
///             println!("{}/{total}: loss {:.3}", metrics.step, metrics.loss);
///         }
///     }
/// }
/// ```
#[allow(unused_variables, reason = "the defaults do nothing")]
pub trait RunObserver {
    /// Receives a notice for the user, in one sentence.
    fn notice(&self, text: &str) {}

    /// Receives the bytes downloaded so far, and those of all files to download.
    fn downloading(&self, done: u64, total: u64) {}

    /// Receives the memory plan of the run, and the available memory if it is known.
    fn planned(&self, plan: &MemoryPlan, available: Option<usize>) {}

    /// Receives the encoded rows to train on, then those to evaluate.
    fn encoded(&self, rows: &EncodedRows) {}

    /// Receives the bytes of weights read so far and in total.
    fn loading(&self, done: u64, total: u64) {}

    /// Receives the model once its weights are loaded, before an adapter of `[lora]` is attached.
    fn loaded(&self, model: &Model) {}

    /// Receives the resolved configuration before the first step, and the file that it was written to.
    fn started(&self, config: &RunConfig, written: &Path) {}

    /// Receives each step, evaluation, sample and checkpoint.
    fn event(&self, event: &TrainEvent<'_>) {}
}

impl RunObserver for () {}
