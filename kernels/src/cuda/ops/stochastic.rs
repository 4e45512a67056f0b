//! f32 values into bf16 by stochastic rounding; into codes it is [`PackedArray::store`](super::packed::PackedArray::store).

use super::{blocks, kernel};
use crate::cuda::{Array, DType, args};
use crate::stochastic::Draw;

pub(super) const FILE: &str = "stochastic.cu";

/// Writes `values`, f32, over those of `y`, bf16 of the same shape; nothing lies between the rows of either.
pub(crate) fn bf16(values: &Array, y: &Array, draw: Draw) {
    super::check_dims("the values", values, y.dims());
    assert!(values.is_contiguous() && y.is_contiguous() && values.dtype() == DType::F32 && y.dtype() == DType::Bf16);
    let n = values.rows() * values.cols();
    kernel(y.cuda(), FILE, "store_bf16", DType::F32).launch(
        [blocks(n.div_ceil(1024)), 1, 1],
        [256, 1, 1],
        0,
        args![values.ptr(), y.ptr(), n as i64, draw.key(), draw.site, draw.step],
    );
}
