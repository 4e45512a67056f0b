//! How much is held, for what, and the most of it.

use std::cell::RefCell;

use serde::Serialize;

/// What memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Use {
    /// Weights of the model, with the factors that lie among them on CUDA; the tables of angles.
    Weights,
    /// Trained parameters beside the model's weights.
    Adapters,
    /// Gradients of what is trained.
    Gradients,
    /// The optimizer's state.
    Optimizer,
    /// What waits for the backward.
    SavedActivations,
    /// What passes through: results on their way, decoded weights, the products' work space.
    Scratch,
    /// Logits of one chunk of rows, and what is made of them.
    LossChunks,
}

impl Use {
    /// All of them, in the order of tables.
    pub const ALL: [Self; 7] = [
        Self::Weights,
        Self::Adapters,
        Self::Gradients,
        Self::Optimizer,
        Self::SavedActivations,
        Self::Scratch,
        Self::LossChunks,
    ];

    /// In words.
    pub fn label(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Adapters => "adapters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::SavedActivations => "saved activations",
            Self::Scratch => "scratch",
            Self::LossChunks => "loss chunks",
        }
    }
}

/// Bytes by use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bytes([usize; 7]);

impl Bytes {
    /// All of them.
    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }

    /// Those of one use.
    pub fn of(&self, what: Use) -> usize {
        self.0[what as usize]
    }

    /// Counts more.
    pub fn add(&mut self, what: Use, bytes: usize) {
        self.0[what as usize] += bytes;
    }
}

/// What is held now, and what was when that was the most.
#[derive(Debug, Default)]
pub(super) struct Ledger(RefCell<Entries>);

#[derive(Debug, Default)]
struct Entries {
    now: Bytes,
    peak: Bytes,
}

/// Memory of some size, until it is dropped.
#[derive(Debug)]
pub(super) struct Held<'l> {
    ledger: &'l Ledger,
    what: Use,
    bytes: usize,
}

impl Ledger {
    pub(super) fn hold(&self, what: Use, bytes: usize) -> Held<'_> {
        let mut entries = self.0.borrow_mut();
        entries.now.add(what, bytes);
        if entries.now.total() > entries.peak.total() {
            entries.peak = entries.now;
        }
        Held { ledger: self, what, bytes }
    }

    pub(super) fn peak(&self) -> Bytes {
        self.0.borrow().peak
    }
}

impl Held<'_> {
    /// The same memory for another use.
    pub(super) fn becoming(mut self, what: Use) -> Self {
        let mut entries = self.ledger.0.borrow_mut();
        entries.now.0[self.what as usize] -= self.bytes;
        entries.now.0[what as usize] += self.bytes;
        drop(entries);
        self.what = what;
        self
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.ledger.0.borrow_mut().now.0[self.what as usize] -= self.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_is_kept_by_use() {
        let ledger = Ledger::default();
        let weights = ledger.hold(Use::Weights, 10);
        let passing = ledger.hold(Use::Scratch, 7);
        let saved = passing.becoming(Use::SavedActivations);
        drop(ledger.hold(Use::LossChunks, 5));
        drop(saved);
        drop(ledger.hold(Use::Scratch, 11));
        drop(weights);
        let peak = ledger.peak();
        assert_eq!(peak.total(), 22);
        assert_eq!(Use::ALL.map(|what| peak.of(what)), [10, 0, 0, 0, 7, 0, 5]);
    }
}
