//! Memory of embeddings in Burn's operations.

use burn::tensor::DType;

use crate::runtime::MemoryUse;
use crate::tensor::MetaTensor;

pub(super) fn forward(table: &MetaTensor, tokens: usize) -> MetaTensor {
    table.sized([tokens, table.dims()[1]])
}

/// The gradient to the whole table.
pub(super) fn table_grad(dy: &MetaTensor, table: [usize; 2]) -> MetaTensor {
    let _f32 = dy.clone().cast(DType::F32);
    // Burn's zeros are copied before they are first written.
    let _zeros = MetaTensor::new(dy.device(), table, DType::F32, MemoryUse::Scratch);
    MetaTensor::new(dy.device(), table, DType::F32, MemoryUse::Scratch)
}
