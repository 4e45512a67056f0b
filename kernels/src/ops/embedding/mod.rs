//! Token embeddings: row `ids[t]` of the table `[vocab, hidden]` for each token t.

mod cuda;
mod meta;

use burn::tensor::{DType, IndexingUpdateOp, Tensor as BurnTensor};

use crate::runtime::{Ints, MemoryUse};
use crate::tensor::indices;
use crate::{Grads, ParamRef, Tensor};

/// `[tokens, hidden]`: the rows of `table` that `ids` name.
///
/// The caller has checked that every id is below the table's height.
pub fn forward(table: &Tensor<2>, ids: &[u32]) -> Tensor<2> {
    match table {
        Tensor::Burn(table) => table.clone().select(0, indices(ids.iter().map(|&id| id as usize), table)).into(),
        Tensor::Cuda(table) => cuda::forward(table, &Ints::from_slice(table.cuda(), ids, MemoryUse::Inputs)).into(),
        Tensor::Meta(table) => meta::forward(table, ids.len()).into(),
    }
}

/// Adds the gradient to the table, in `f32`: rows of `dy` summed by id, in order.
pub fn backward(dy: Tensor<2>, ids: &[u32], grads: &mut Grads, table: ParamRef) {
    match dy {
        Tensor::Cuda(dy) => cuda::accumulate(&grads.array(table), &dy, ids),
        Tensor::Burn(dy) => {
            let [vocab, hidden] = table.dims();
            let zeros = BurnTensor::<2>::zeros([vocab, hidden], (&dy.device(), DType::F32));
            let at = indices(ids.iter().map(|&id| id as usize), &dy);
            let grad = zeros.select_assign(0, at, dy.cast(DType::F32), IndexingUpdateOp::Add);
            grads.add(table, grad.into());
        }
        Tensor::Meta(dy) => grads.add(table, meta::table_grad(&dy, table.dims()).into()),
    }
}
