//! Rows without their mean in Burn's operations.

use burn::tensor::{DType, Tensor as BurnTensor};

pub(super) fn forward(x: &BurnTensor<2>) -> BurnTensor<2> {
    let dtype = x.dtype();
    let wide = if dtype == DType::F64 { x.clone() } else { x.clone().cast(DType::F32) };
    (wide.clone() - wide.mean_dim(1)).cast(dtype)
}
