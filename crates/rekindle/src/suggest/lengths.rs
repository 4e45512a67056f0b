//! The maximum length of rows.

/// A maximum length of rows, and its effect on them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Fitted {
    /// The 99th percentile of lengths in tokens.
    pub(super) most: usize,
    pub(super) max_seq_length: usize,
    /// The number of longer rows.
    pub(super) longer: usize,
}

/// Chooses the longest row, or the 99th percentile if the longest row is more than twice as long, because the longest
/// batch determines the memory. The result is rounded up to a multiple of 64, within `window`.
pub(super) fn fitted(mut lengths: Vec<usize>, held_out: Vec<usize>, window: usize) -> Fitted {
    lengths.sort_unstable();
    let most = lengths[(lengths.len() * 99).div_ceil(100) - 1];
    let longest = lengths.iter().chain(&held_out).copied().max().unwrap_or(most);
    let wanted = if longest <= 2 * most { longest } else { most };
    let max_seq_length = wanted.next_multiple_of(64).min(window);
    let longer = lengths.iter().chain(&held_out).filter(|&&length| length > max_seq_length).count();
    Fitted { most, max_seq_length, longer }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_cut_unless_few_rows_are_far_longer() {
        let rows = |longest| (1..=200).map(|n| if n == 200 { longest } else { 100 + n % 7 }).collect();
        assert_eq!(fitted(rows(190), vec![], 4096), Fitted { most: 106, max_seq_length: 192, longer: 0 });
        assert_eq!(fitted(rows(900), vec![300, 20], 4096), Fitted { most: 106, max_seq_length: 128, longer: 2 });
        assert_eq!(fitted(rows(190), vec![], 160), Fitted { most: 106, max_seq_length: 160, longer: 1 });
        assert_eq!(fitted(vec![5], vec![], 4096), Fitted { most: 5, max_seq_length: 64, longer: 0 });
    }
}
