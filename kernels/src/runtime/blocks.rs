//! The free parts of a growing range: first fit at the lowest address, neighbours joined.

use std::collections::BTreeMap;

/// Every block begins and ends at a multiple of this, enough for any access and for whole sectors of the cache.
pub(super) const ALIGN: usize = 512;

/// Free blocks within `0..end`.
#[derive(Default)]
pub(super) struct Blocks {
    free: BTreeMap<usize, usize>,
    end: usize,
    in_use: usize,
    /// The highest end of a block that was in use since the start or the last reset.
    extent: usize,
}

impl Blocks {
    /// Takes `size` bytes, a multiple of [`ALIGN`]; `None` when no free block is long enough.
    pub(super) fn take(&mut self, size: usize) -> Option<usize> {
        let (&offset, &free) = self.free.iter().find(|&(_, &free)| free >= size)?;
        self.free.remove(&offset);
        if free > size {
            self.free.insert(offset + size, free - size);
        }
        self.in_use += size;
        self.extent = self.extent.max(offset + size);
        Some(offset)
    }

    /// Gives a block back.
    pub(super) fn give(&mut self, offset: usize, size: usize) {
        self.in_use -= size;
        self.insert(offset, size);
    }

    /// Appends `size` bytes at the end.
    pub(super) fn grow(&mut self, size: usize) {
        let end = self.end;
        self.end += size;
        self.insert(end, size);
    }

    /// Cuts `size` free bytes off the end.
    pub(super) fn shrink(&mut self, size: usize) {
        let (offset, free) = self.tail().expect("the end is free when it is cut off");
        debug_assert!(size <= free);
        self.free.remove(&offset);
        if free > size {
            self.free.insert(offset, free - size);
        }
        self.end -= size;
    }

    /// The free block that touches the end: where it begins and its size.
    pub(super) fn tail(&self) -> Option<(usize, usize)> {
        let (&offset, &size) = self.free.last_key_value()?;
        (offset + size == self.end).then_some((offset, size))
    }

    pub(super) fn end(&self) -> usize {
        self.end
    }

    pub(super) fn in_use(&self) -> usize {
        self.in_use
    }

    /// The highest end of a block in use at any time since the start or the last reset: what has to be mapped.
    pub(super) fn extent(&self) -> usize {
        self.extent
    }

    /// Begins a new measurement of the extent.
    pub(super) fn reset_extent(&mut self) {
        self.extent = self.tail().map_or(self.end, |(offset, _)| offset);
    }

    fn insert(&mut self, mut offset: usize, mut size: usize) {
        if let Some((&before, &length)) = self.free.range(..offset).next_back()
            && before + length == offset
        {
            self.free.remove(&before);
            (offset, size) = (before, length + size);
        }
        if let Some(length) = self.free.remove(&(offset + size)) {
            size += length;
        }
        self.free.insert(offset, size);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(size: usize) -> Blocks {
        let mut blocks = Blocks::default();
        blocks.grow(size);
        blocks
    }

    #[test]
    fn lowest_address_first() {
        let mut blocks = of(100);
        assert_eq!([10, 20, 30].map(|size| blocks.take(size)), [Some(0), Some(10), Some(30)]);
        blocks.give(0, 10);
        blocks.give(10, 20);
        assert_eq!(blocks.take(25), Some(0), "neighbours were joined");
        assert_eq!(blocks.take(41), None);
        assert_eq!(blocks.tail(), Some((60, 40)));
        assert_eq!((blocks.in_use(), blocks.extent()), (55, 60));
        blocks.give(30, 30);
        blocks.reset_extent();
        assert_eq!((blocks.in_use(), blocks.extent()), (25, 25));
    }

    #[test]
    fn the_end_moves() {
        let mut blocks = of(10);
        blocks.take(10);
        assert_eq!(blocks.tail(), None);
        blocks.grow(5);
        blocks.grow(5);
        assert_eq!(blocks.tail(), Some((10, 10)));
        blocks.shrink(7);
        assert_eq!((blocks.tail(), blocks.end()), (Some((10, 3)), 13));
        blocks.shrink(3);
        assert_eq!((blocks.tail(), blocks.end()), (None, 10));
    }

    #[test]
    fn random_use_never_overlaps_and_all_comes_back() {
        let mut blocks = of(1 << 16);
        let (mut live, mut state) = (Vec::<(usize, usize)>::new(), 7u64);
        for _ in 0..20_000 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let random = (state >> 33) as usize;
            if random.is_multiple_of(3) && !live.is_empty() {
                let (offset, size) = live.swap_remove(random % live.len());
                blocks.give(offset, size);
            } else if let size = 1 + random % 900
                && let Some(offset) = blocks.take(size)
            {
                assert!(live.iter().all(|&(o, s)| offset + size <= o || o + s <= offset));
                live.push((offset, size));
            }
            assert_eq!(blocks.in_use(), live.iter().map(|block| block.1).sum::<usize>());
        }
        for (offset, size) in live {
            blocks.give(offset, size);
        }
        assert_eq!(blocks.tail(), Some((0, 1 << 16)));
    }
}
