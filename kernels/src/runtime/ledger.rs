//! Counts of memory in use and of its peak, by use.

use super::MemoryUse;

/// Memory of a device in use and its peak, in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes in buffers.
    pub in_use: usize,
    /// The maximum of `in_use` since the start or the last reset.
    pub high_water: usize,
    /// Taken from the driver.
    pub mapped: usize,
    /// The end of the highest buffer at any time since then: with the gaps between buffers, what had to be taken.
    pub extent: usize,
    /// Bytes in buffers by use, largest first.
    pub by_use: Vec<(MemoryUse, usize)>,
    /// Bytes by use when [`MemoryStats::high_water`] was reached.
    pub at_high_water: Vec<(MemoryUse, usize)>,
}

/// Bytes by use.
type ByUse = [usize; MemoryUse::ALL.len()];

/// Counts bytes by use, and keeps the counts of the moment when there were most.
#[derive(Debug, Default)]
pub(crate) struct MemoryLedger {
    now: ByUse,
    in_use: usize,
    peak: ByUse,
    high_water: usize,
    /// Bytes in use when the first of each use came, since the last reset.
    before: [Option<usize>; MemoryUse::ALL.len()],
}

impl MemoryLedger {
    /// Counts a new block.
    pub(crate) fn charge(&mut self, usage: MemoryUse, bytes: usize) {
        self.before[usage as usize].get_or_insert(self.in_use);
        self.now[usage as usize] += bytes;
        self.in_use += bytes;
        if self.in_use >= self.high_water {
            (self.high_water, self.peak) = (self.in_use, self.now);
        }
    }

    /// Counts a block that is gone.
    pub(crate) fn release(&mut self, usage: MemoryUse, bytes: usize) {
        self.now[usage as usize] -= bytes;
        self.in_use -= bytes;
    }

    /// Returns the bytes that were in use when the first block for `usage` came, since the last reset.
    pub(crate) fn in_use_before(&self, usage: MemoryUse) -> Option<usize> {
        self.before[usage as usize]
    }

    /// Begins a new measurement of the most.
    pub(crate) fn reset(&mut self) {
        (self.high_water, self.peak) = (self.in_use, self.now);
        self.before = Default::default();
    }

    /// Returns what was counted; a device without gaps between its buffers has no other `mapped` and `extent`.
    pub(crate) fn stats(&self) -> MemoryStats {
        MemoryStats {
            in_use: self.in_use,
            high_water: self.high_water,
            mapped: self.high_water,
            extent: self.high_water,
            by_use: largest_first(&self.now),
            at_high_water: largest_first(&self.peak),
        }
    }
}

fn largest_first(bytes: &ByUse) -> Vec<(MemoryUse, usize)> {
    let mut sorted: Vec<_> = MemoryUse::ALL.into_iter().zip(*bytes).filter(|&(_, bytes)| bytes > 0).collect();
    sorted.sort_by_key(|&(_, bytes)| core::cmp::Reverse(bytes));
    sorted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_is_kept_by_use() {
        let mut ledger = MemoryLedger::default();
        ledger.charge(MemoryUse::Weights, 10);
        ledger.charge(MemoryUse::Activations, 7);
        ledger.charge(MemoryUse::Logits, 5);
        ledger.release(MemoryUse::Logits, 5);
        ledger.release(MemoryUse::Activations, 7);
        ledger.charge(MemoryUse::Scratch, 11);
        let stats = ledger.stats();
        assert_eq!((stats.in_use, stats.high_water), (21, 22));
        let peak = [(MemoryUse::Weights, 10), (MemoryUse::Activations, 7), (MemoryUse::Logits, 5)];
        assert_eq!(stats.at_high_water, peak);
        assert_eq!(stats.by_use, [(MemoryUse::Scratch, 11), (MemoryUse::Weights, 10)]);
        assert_eq!(ledger.in_use_before(MemoryUse::Logits), Some(17));
        ledger.reset();
        assert_eq!((ledger.stats().high_water, ledger.in_use_before(MemoryUse::Logits)), (21, None));
    }

    #[test]
    fn every_use_has_its_place() {
        assert!(MemoryUse::ALL.into_iter().enumerate().all(|(i, usage)| usage as usize == i));
    }
}
