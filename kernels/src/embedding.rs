//! Token embeddings: row `ids[t]` of the table `[vocab, hidden]` for each token t.

use burn::tensor::{DType, Tensor};

use crate::tensors::indices;

/// `[tokens, hidden]`: the rows of `table` that `ids` name.
///
/// The caller has checked that every id is below the table's height.
pub fn forward(table: &Tensor<2>, ids: &[u32]) -> Tensor<2> {
    table.clone().select(0, indices(ids.iter().map(|&id| id as usize), table))
}

/// The gradient to the table, `[vocab, hidden]` in `f32`: rows of `dy` summed by id, in order.
pub fn backward(dy: Tensor<2>, ids: &[u32], vocab: usize) -> Tensor<2> {
    let [_, hidden] = dy.dims();
    let device = dy.device();
    let zeros = Tensor::<2>::zeros([vocab, hidden], (&device, DType::F32));
    let at = indices(ids.iter().map(|&id| id as usize), &dy);
    zeros.select_assign(0, at, dy.cast(DType::F32), burn::tensor::IndexingUpdateOp::Add)
}
