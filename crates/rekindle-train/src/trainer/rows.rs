//! The examples and batches of each step.

use std::ops::Range;

use rekindle_data::{Order, Packs};
use rekindle_dist::{RankPosition, deal_by_length};
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
pub(crate) struct StepRows {
    /// The micro-batches of all ranks, as one rank would have them.
    pub(crate) batches: Vec<Batch>,
    /// The micro-batches of this rank, if there are several.
    pub(crate) dealt: Option<Vec<Batch>>,
    /// The example of each row of the step; [`Batch::rows`] are indices into it.
    pub(crate) examples: Vec<usize>,
}

impl StepRows {
    /// Returns the micro-batches of this rank.
    pub(crate) fn own(&self) -> &[Batch] {
        self.dealt.as_ref().unwrap_or(&self.batches)
    }
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
    /// The number of rows taken determines the position in the epoch, so a resumed run continues with the same steps. They
    /// do not depend on the number of ranks, among which the rows are dealt by their tokens.
    pub(super) fn next_step(&mut self, from: &Batches<'_>, position: RankPosition) -> StepRows {
        let left = self.packs.len() - (self.seen % self.packs.len() as u64) as usize;
        let rows: Vec<usize> = self.order.by_ref().take(self.rows_per_step.min(left)).collect();
        self.seen += rows.len() as u64;
        let mut examples: Vec<usize> = Vec::new();
        // The examples of each row.
        let mut parts: Vec<Range<usize>> = Vec::with_capacity(rows.len());
        for row in rows {
            let first = examples.len();
            examples.extend(self.packs.pack(row));
            parts.push(first..examples.len());
        }
        let whole = |rows: &[Range<usize>]| {
            let first = rows[0].start;
            from.batch(&examples[first..rows[rows.len() - 1].end], first)
        };
        let batches = parts.chunks(self.batch_size).map(whole).collect();
        let dealt = (position.world_size > 1).then(|| {
            let tokens = |part: &Range<usize>| examples[part.clone()].iter().map(|&example| from.tokens(example)).sum();
            let lengths: Vec<usize> = parts.iter().map(tokens).collect();
            let own = deal_by_length(&lengths, position.world_size).swap_remove(position.rank);
            let batch = |rows: &[usize]| {
                let numbers: Vec<u32> =
                    rows.iter().flat_map(|&row| parts[row].clone()).map(|number| number as u32).collect();
                let indices: Vec<usize> = numbers.iter().map(|&number| examples[number as usize]).collect();
                from.batch_with_rows(&indices, &numbers)
            };
            own.chunks(self.batch_size).map(batch).collect()
        });
        StepRows { batches, dealt, examples }
    }
}
