use std::cmp::Reverse;
use std::collections::BTreeMap;

/// The assignment of examples to rows of a batch: one each, or as many as fit into `capacity` tokens.
///
/// Packing only fills rows. Documents of a pack keep their own positions and do not attend to each other, so a step
/// learns the same from them as without packing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packs {
    /// Examples, in the order of packs.
    members: Vec<usize>,
    /// The end of each pack in `members`.
    ends: Vec<usize>,
}

impl Packs {
    /// Returns `count` packs of one example each.
    pub fn single(count: usize) -> Self {
        Packs { members: (0..count).collect(), ends: (1..=count).collect() }
    }

    /// Assigns examples by best fit decreasing: the longest example first, each into the pack that it fills best, or a
    /// new one.
    ///
    /// The result depends only on the lengths and takes O(n log n). Of examples with the same length the first comes
    /// first, of packs with the same free space the newest. A pack lists its examples in their order. It needs at most
    /// 11/9 · OPT + 4 packs (Johnson et al., SIAM J. Comput. 3, 1974). An example beyond `capacity` gets its own pack.
    pub fn best_fit(lengths: impl IntoIterator<Item = usize>, capacity: usize) -> Self {
        let lengths: Vec<usize> = lengths.into_iter().collect();
        let mut order: Vec<usize> = (0..lengths.len()).collect();
        order.sort_by_key(|&example| Reverse(lengths[example]));
        let mut packs: Vec<Vec<usize>> = Vec::new();
        // Packs by their free space.
        let mut rooms: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
        for example in order {
            let length = lengths[example];
            let (pack, room) = match take_fitting(&mut rooms, length) {
                Some(found) => found,
                None => {
                    packs.push(Vec::new());
                    (packs.len() - 1, capacity)
                }
            };
            packs[pack].push(example);
            rooms.entry(room.saturating_sub(length)).or_default().push(pack);
        }
        let mut all = Packs { members: Vec::with_capacity(lengths.len()), ends: Vec::with_capacity(packs.len()) };
        for mut pack in packs {
            pack.sort_unstable();
            all.members.extend(pack);
            all.ends.push(all.members.len());
        }
        all
    }

    /// Returns packs of examples, from packs of their pairs: pair i is the examples 2i and 2i + 1.
    #[must_use]
    pub fn of_pairs(self) -> Self {
        let members = self.members.iter().flat_map(|pair| [2 * pair, 2 * pair + 1]).collect();
        Packs { members, ends: self.ends.iter().map(|end| 2 * end).collect() }
    }

    /// Returns the number of packs.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Returns true if there are no packs.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// Returns the examples of a pack, in their order.
    ///
    /// # Panics
    /// Panics if `index` is out of range.
    pub fn pack(&self, index: usize) -> &[usize] {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.members[start..self.ends[index]]
    }

    /// Returns all packs, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[usize]> {
        (0..self.len()).map(|index| self.pack(index))
    }
}

/// Removes and returns the newest of the packs with the least free space of at least `length`, and that space.
fn take_fitting(rooms: &mut BTreeMap<usize, Vec<usize>>, length: usize) -> Option<(usize, usize)> {
    let (&room, packs) = rooms.range_mut(length..).next()?;
    let pack = packs.pop()?;
    if packs.is_empty() {
        rooms.remove(&room);
    }
    Some((pack, room))
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha8Rng;
    use rand_chacha::rand_core::{Rng, SeedableRng};

    use super::*;

    const CAPACITY: usize = 2048;

    /// Returns lengths with ln ~ N(ln 350, 0.9²), typical of conversations, up to the capacity.
    fn lognormal(count: usize, seed: u64) -> Vec<usize> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut uniform = || (rng.next_u64() >> 11) as f64 / (1_u64 << 53) as f64;
        let mut length = || {
            let normal = (-2.0 * (1.0 - uniform()).ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos();
            (350.0 * (0.9 * normal).exp()) as usize
        };
        (0..count).map(|_| length().clamp(2, CAPACITY)).collect()
    }

    fn check(lengths: &[usize], capacity: usize) -> Packs {
        let packs = Packs::best_fit(lengths.iter().copied(), capacity);
        let mut members: Vec<usize> = packs.iter().flatten().copied().collect();
        members.sort_unstable();
        assert_eq!(members, (0..lengths.len()).collect::<Vec<_>>(), "every example exactly once");
        for pack in packs.iter() {
            assert!(!pack.is_empty() && pack.is_sorted());
            let tokens: usize = pack.iter().map(|&example| lengths[example]).sum();
            assert!(tokens <= capacity || pack.len() == 1, "{pack:?} holds {tokens}");
        }
        assert_eq!(Packs::best_fit(lengths.iter().copied(), capacity), packs, "a function of the lengths");
        packs
    }

    #[test]
    fn each_goes_where_it_fits_best() {
        let packs = check(&[3, 5, 7, 2, 10, 3], 10);
        // 10; 7 with the first 3; 5 with the other 3 and 2.
        assert_eq!(packs.iter().collect::<Vec<_>>(), [&[4][..], &[0, 2], &[1, 3, 5]]);
        assert_eq!(Packs::single(2).iter().collect::<Vec<_>>(), [&[0], &[1]]);
        assert!(check(&[], 10).is_empty());
        assert_eq!(check(&[11, 4], 10).len(), 2);
    }

    #[test]
    fn packs_are_complete_and_never_over() {
        for seed in 0..40 {
            let count = 1 + (seed as usize * 37) % 500;
            check(&lognormal(count, seed), CAPACITY);
            check(&lognormal(count, seed), 700);
        }
    }

    /// Full packs cut into pieces, so that the optimal number is known.
    #[test]
    fn within_the_known_bound() {
        for seed in 0..60 {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let best = 1 + (rng.next_u64() % 120) as usize;
            let mut lengths = Vec::new();
            for _ in 0..best {
                let mut left = CAPACITY;
                while left > 0 {
                    let piece = (1 + rng.next_u64() as usize % 1200).min(left);
                    lengths.push(piece);
                    left -= piece;
                }
            }
            let packs = check(&lengths, CAPACITY).len();
            assert!(9 * packs <= 11 * best + 36, "{packs} packs where {best} are enough");
        }
    }

    /// The filled share of rows, compared with that without packing.
    #[test]
    fn a_mix_of_lengths_fills_its_packs() {
        let lengths = lognormal(20_000, 1);
        let tokens: usize = lengths.iter().sum();
        let share = |rows: usize| tokens as f64 / (rows * CAPACITY) as f64;
        let (packed, single) = (share(check(&lengths, CAPACITY).len()), share(lengths.len()));
        println!("{tokens} tokens: {:.4} of the packs are filled, {single:.4} of rows of one", packed);
        assert!(packed > 0.99 && single < 0.3, "{packed} {single}");
    }
}
