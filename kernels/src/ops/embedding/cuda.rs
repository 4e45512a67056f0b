//! Token embeddings.

use crate::runtime::op::{blocks, int, kernel, lanes};
use crate::runtime::{Array, DType, Ints, MemoryUse, args, elementwise, entry};

/// The rows of `table` that `ids` name, `[tokens, hidden]`. Every id is below the table's rows.
pub(crate) fn forward(table: &Array, ids: &Ints) -> Array {
    elementwise::gather_rows(table, ids.ptr(), ids.len())
}

/// Adds the gradient to the table to `out`, f32 `[vocab, hidden]`.
pub(crate) fn accumulate(out: &Array, dy: &Array, ids: &[u32]) {
    let [tokens, hidden] = dy.dims();
    assert_eq!(ids.len(), tokens, "ids of {tokens} tokens");
    assert_eq!((out.cols(), out.dtype()), (hidden, DType::F32), "width and dtype of the table's gradient");
    assert!(ids.iter().all(|&id| (id as usize) < out.rows()), "ids below {}", out.rows());
    let Groups { order, starts, ids } = Groups::of(ids);
    let groups = ids.len();
    let lists = Ints::from_slice(dy.cuda(), &[order, starts, ids].concat(), MemoryUse::Inputs);
    let (starts, ids) = (lists.ptr_at(tokens), lists.ptr_at(tokens + groups + 1));
    let dy = dy.aligned();
    kernel(dy.cuda(), entry!("embedding.cu", "embedding_bwd"), dy.dtype()).launch(
        [blocks(groups), blocks(hidden.div_ceil(32 * lanes(dy.dtype()))), 1],
        [32, 8, 1],
        0,
        args![dy.ptr(), lists.ptr(), starts, ids, out.ptr(), int(hidden), int(dy.ld()), int(out.ld())],
    );
}

/// The tokens of a batch by id, so that one block has a row of the gradient for itself.
struct Groups {
    /// Tokens by (id, place).
    order: Vec<u32>,
    /// The start of each group in `order`, and the end.
    starts: Vec<u32>,
    /// The id of each group.
    ids: Vec<u32>,
}

impl Groups {
    fn of(ids: &[u32]) -> Self {
        let mut order: Vec<u32> = (0..).take(ids.len()).collect();
        // Stable: the tokens of an id stay in their order.
        order.sort_by_key(|&token| ids[token as usize]);
        let (mut starts, mut names) = (Vec::new(), Vec::new());
        for (&token, place) in order.iter().zip(0..) {
            let id = ids[token as usize];
            if names.last() != Some(&id) {
                starts.push(place);
                names.push(id);
            }
        }
        starts.push(order.len() as u32);
        Self { order, starts, ids: names }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_grouped_by_id() {
        let Groups { order, starts, ids } = Groups::of(&[7, 2, 7, 9, 2, 7]);
        assert_eq!(order, [1, 4, 0, 2, 5, 3]);
        assert_eq!(starts, [0, 2, 5, 6]);
        assert_eq!(ids, [2, 7, 9]);
        let Groups { order, starts, ids } = Groups::of(&[]);
        assert_eq!((order, starts, ids), (vec![], vec![0], vec![]));
    }
}
