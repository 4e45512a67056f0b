//! f32 values into bf16 by stochastic rounding; into codes it is [`QuantizedArray::store`](crate::params::quantized::cuda::QuantizedArray::store).

use crate::params::stochastic::RoundingRng;
use crate::runtime::op::{blocks, check_dims, kernel};
use crate::runtime::{Array, DType, args, entry};

/// Writes `values`, f32, over those of `y`, bf16 of the same shape; nothing lies between the rows of either.
pub(crate) fn bf16(values: &Array, y: &Array, rng: RoundingRng) {
    check_dims("the values", values, y.dims());
    assert!(values.is_contiguous() && y.is_contiguous() && values.dtype() == DType::F32 && y.dtype() == DType::Bf16);
    let n = values.rows() * values.cols();
    kernel(y.cuda(), entry!("stochastic.cu", "store_bf16"), DType::F32).launch(
        [blocks(n.div_ceil(1024)), 1, 1],
        [256, 1, 1],
        0,
        args![values.ptr(), y.ptr(), n as i64, rng.key.for_rounding(), rng.param, rng.key.step],
    );
}
