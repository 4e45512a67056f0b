//! Which examples each step takes, and the batches that they become.

use rekindle_data::{Dataset, Order, Packs};
use rekindle_models::Batch;

use crate::SftConfig;
use crate::evaluate::batch;

/// The rows of a run from a cursor on, step by step; a row is a pack of examples.
pub(super) struct Rows {
    packs: Packs,
    order: Box<dyn Iterator<Item = usize>>,
    rows_per_step: usize,
    batch_size: usize,
    seen: u64,
}

/// What one optimizer step goes through.
pub(super) struct StepRows {
    /// The micro-batches.
    pub(super) batches: Vec<Batch>,
    /// The example of each row of the step: the numbers in [`Batch::rows`] are places in here.
    pub(super) examples: Vec<usize>,
}

impl Rows {
    /// Those of a run over `packs` after the first `cursor`; `num_train_epochs` may end in the middle of a step.
    pub(super) fn new(config: &SftConfig, packs: Packs, shuffle: bool, seed: u64, cursor: u64) -> Self {
        let count = packs.len();
        let rows_per_step = config.rows_per_step();
        let limit = match config.max_steps {
            Some(steps) => steps.saturating_mul(rows_per_step),
            None => (config.num_train_epochs * count as f64).ceil() as usize,
        };
        let order = Order::new(count, shuffle, seed).from_cursor(cursor).take(limit.saturating_sub(cursor as usize));
        let batch_size = config.per_device_train_batch_size;
        Self { packs, order: Box::new(order), rows_per_step, batch_size, seen: cursor }
    }

    /// How often all rows were gone through.
    pub(super) fn epoch(&self) -> f64 {
        self.seen() as f64 / self.packs.len() as f64
    }

    /// Rows taken so far, those before the cursor included: where another run would go on.
    pub(super) fn seen(&self) -> u64 {
        self.seen
    }

    /// The next step's.
    pub(super) fn next_step(&mut self, dataset: &Dataset) -> StepRows {
        let rows: Vec<usize> = self.order.by_ref().take(self.rows_per_step).collect();
        self.seen += rows.len() as u64;
        let (mut batches, mut examples) = (Vec::new(), Vec::new());
        for part in rows.chunks(self.batch_size) {
            let first = examples.len();
            examples.extend(part.iter().flat_map(|&row| self.packs.pack(row)));
            batches.push(batch(examples[first..].iter().map(|&example| dataset.example(example)), first));
        }
        StepRows { batches, examples }
    }
}
