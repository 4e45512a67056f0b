use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The order of examples: epoch after epoch, each a permutation of `0..len`.
///
/// Position `p` of the endless sequence is element `p mod len` of epoch `p div len`, so a run resumes from the number
/// of examples that it has taken ([`Order::from_cursor`]) and nothing else.
///
/// With `shuffle`, epoch `e` is the Fisher–Yates shuffle of `0..len`: for `i = len − 1, …, 1` swap elements `i` and
/// `⌊u·(i + 1) / 2⁶⁴⌋`, where the `u` are the successive 64-bit words of ChaCha8 with the seed (little-endian,
/// zero-padded) as its key and `e` as its stream. It depends on no library's shuffle. Without `shuffle`, every epoch is
/// `0..len`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    len: usize,
    shuffle: bool,
    seed: u64,
}

impl Order {
    /// Returns the order of `len` examples.
    pub fn new(len: usize, shuffle: bool, seed: u64) -> Self {
        Order { len, shuffle, seed }
    }

    /// Returns the number of examples in an epoch.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns true if there are no examples.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns the permutation of epoch `epoch`, counted from 0.
    pub fn epoch(&self, epoch: u64) -> Vec<usize> {
        let mut indices: Vec<usize> = (0..self.len).collect();
        if self.shuffle {
            let mut rng = self.generator(epoch);
            for i in (1..self.len).rev() {
                indices.swap(i, below(rng.next_u64(), i + 1));
            }
        }
        indices
    }

    /// Returns the endless sequence of example indices after the first `cursor` of them; `take(n)` makes it finite.
    ///
    /// It is empty if there are no examples.
    pub fn from_cursor(&self, cursor: u64) -> impl Iterator<Item = usize> + use<> {
        let order = *self;
        let len = self.len.max(1) as u64;
        let mut skip = (cursor % len) as usize;
        let epochs = if order.is_empty() { 0..0 } else { cursor / len..u64::MAX };
        epochs.flat_map(move |epoch| order.epoch(epoch).into_iter().skip(std::mem::take(&mut skip)))
    }

    fn generator(&self, epoch: u64) -> ChaCha8Rng {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&self.seed.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        rng.set_stream(epoch);
        rng
    }
}

/// Returns `⌊word·n / 2⁶⁴⌋`: uniform in `0..n` up to a bias of at most n / 2⁶⁴.
fn below(word: u64, n: usize) -> usize {
    ((u128::from(word) * n as u128) >> 64) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_is_another_permutation() {
        let order = Order::new(100, true, 7);
        let (first, second) = (order.epoch(0), order.epoch(1));
        assert_ne!(first, second);
        for mut epoch in [first, second] {
            epoch.sort_unstable();
            assert_eq!(epoch, (0..100).collect::<Vec<_>>());
        }
        assert_ne!(Order::new(100, true, 8).epoch(0), order.epoch(0));
        assert_eq!(Order::new(100, true, 7).epoch(3), order.epoch(3));
    }

    /// From an independent implementation of ChaCha8 and the doc of [`Order`]; another order would break resuming.
    #[test]
    fn the_order_is_the_documented_one() {
        assert_eq!(Order::new(8, true, 0).epoch(0), [3, 2, 7, 5, 0, 1, 4, 6]);
        assert_eq!(Order::new(12, true, 3407).epoch(5), [5, 1, 3, 7, 10, 8, 2, 0, 4, 6, 9, 11]);
        assert_eq!(Order::new(3, false, 0).epoch(9), [0, 1, 2]);
    }

    #[test]
    fn resuming_anywhere_continues_the_same_sequence() {
        let order = Order::new(5, true, 1);
        let whole: Vec<_> = order.from_cursor(0).take(23).collect();
        for cursor in 0..23 {
            let rest: Vec<_> = order.from_cursor(cursor).take(23 - cursor as usize).collect();
            assert_eq!(rest, whole[cursor as usize..]);
        }
    }

    #[test]
    fn the_first_place_is_taken_by_all_equally_often() {
        let mut counts = [0_i64; 4];
        for epoch in 0..4_000 {
            counts[Order::new(4, true, 3).epoch(epoch)[0]] += 1;
        }
        // Binomial(4000, 1/4) has standard deviation 27.4; five of them.
        for count in counts {
            assert!((count - 1_000).abs() < 137, "{counts:?}");
        }
    }

    #[test]
    fn no_examples_means_an_empty_sequence() {
        assert_eq!(Order::new(0, true, 0).from_cursor(3).next(), None);
    }
}
