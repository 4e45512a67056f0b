//! The examples and batches of each step.

use rekindle_data::{Order, Packs};
use rekindle_models::Batch;

use crate::SftConfig;
use crate::batches::Batches;

/// The rows of a run from a position on; a row is a pack of examples.
pub(super) struct Rows {
    packs: Packs,
    /// The order of rows, without an end.
    order: Box<dyn Iterator<Item = usize>>,
    rows_per_step: usize,
    batch_size: usize,
    seen: u64,
}

/// The rows of one optimizer step.
pub(super) struct StepRows {
    /// The micro-batches.
    pub(super) batches: Vec<Batch>,
    /// The example of each row of the step; [`Batch::rows`] are indices into it.
    pub(super) examples: Vec<usize>,
}

impl Rows {
    /// Returns the rows of a run over `packs`, after the first `cursor` of them.
    pub(super) fn new(config: &SftConfig, packs: Packs, shuffle: bool, seed: u64, cursor: u64) -> Self {
        let order = Order::new(packs.len(), shuffle, seed).from_cursor(cursor);
        let (rows_per_step, batch_size) = (config.rows_per_step(), config.per_device_train_batch_size);
        Self { packs, order: Box::new(order), rows_per_step, batch_size, seen: cursor }
    }

    /// Returns the number of passes over the rows.
    pub(super) fn epoch(&self) -> f64 {
        self.seen() as f64 / self.packs.len() as f64
    }

    /// Returns the number of rows taken, including those before the start position.
    pub(super) fn seen(&self) -> u64 {
        self.seen
    }

    /// Returns the next step's rows: a full step, or the remaining rows of the epoch.
    ///
    /// The number of rows taken determines the position in the epoch, so a resumed run continues with the same steps.
    pub(super) fn next_step(&mut self, from: &Batches<'_>) -> StepRows {
        let left = self.packs.len() - (self.seen % self.packs.len() as u64) as usize;
        let rows: Vec<usize> = self.order.by_ref().take(self.rows_per_step.min(left)).collect();
        self.seen += rows.len() as u64;
        let (mut batches, mut examples) = (Vec::new(), Vec::new());
        for part in rows.chunks(self.batch_size) {
            let first = examples.len();
            examples.extend(part.iter().flat_map(|&row| self.packs.pack(row)));
            batches.push(from.batch(&examples[first..], first));
        }
        StepRows { batches, examples }
    }
}
