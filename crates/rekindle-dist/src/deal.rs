//! The distribution of rows over ranks.

/// Deals rows to `ranks` by their lengths; returns the rows of each rank in ascending order.
///
/// The longest row comes first, each goes to the rank with the fewest tokens so far, and the lowest rank wins a tie. The
/// result depends on nothing else, so every rank computes the same.
pub fn deal_by_length(lengths: &[usize], ranks: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&row| core::cmp::Reverse(lengths[row]));
    let mut dealt = vec![(0, Vec::new()); ranks];
    for row in order {
        if let Some((tokens, rows)) = dealt.iter_mut().min_by_key(|(tokens, _)| *tokens) {
            *tokens += lengths[row].max(1);
            rows.push(row);
        }
    }
    let sorted = |(_, mut rows): (usize, Vec<usize>)| {
        rows.sort_unstable();
        rows
    };
    dealt.into_iter().map(sorted).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_balanced_by_their_tokens() {
        assert_eq!(deal_by_length(&[10, 1, 5, 4], 2), [vec![0], vec![1, 2, 3]]);
        assert_eq!(deal_by_length(&[3, 3, 3], 2), [vec![0, 2], vec![1]]);
        assert_eq!(deal_by_length(&[7], 3), [vec![0], vec![], vec![]]);
        assert_eq!(deal_by_length(&[0, 0], 2), [[0], [1]], "empty rows are spread too");
        assert_eq!(deal_by_length(&[2, 9, 4], 1), [[0, 1, 2]]);
    }
}
