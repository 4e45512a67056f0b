//! Memory of RMSNorm over slices.

use burn::tensor::DType;

use super::cpu;
use crate::tensor::MetaTensor;

pub(super) fn forward(x: &MetaTensor, dtype: DType) -> (MetaTensor, MetaTensor) {
    let [rows, hidden] = x.dims();
    let _x = x.contiguous();
    let _gain = x.device().scratch(cpu::gain_scratch(hidden));
    let rstd = x.f32_sized([1, rows]);
    (x.like().cast(dtype), rstd)
}

pub(super) fn recompute(x: &MetaTensor, rstd: &MetaTensor, dtype: DType) -> MetaTensor {
    let _views = [x, rstd].map(MetaTensor::contiguous);
    let _gain = x.device().scratch(cpu::gain_scratch(x.dims()[1]));
    x.like().cast(dtype)
}

pub(super) fn backward(dy: &MetaTensor, x: &MetaTensor, rstd: &MetaTensor, residual: Option<MetaTensor>) -> MetaTensor {
    let _views = [dy, x, rstd].map(MetaTensor::contiguous);
    let _gain = x.device().scratch(cpu::gain_scratch(x.dims()[1]));
    residual.map_or_else(|| x.like(), MetaTensor::owned)
}

pub(super) fn weight_grad(dy: &MetaTensor, x: &MetaTensor, rstd: &MetaTensor) -> MetaTensor {
    let _views = [dy, x, rstd].map(MetaTensor::contiguous);
    let _partial = x.device().scratch(cpu::weight_grad_scratch(x.dims()));
    x.f32_sized([1, x.dims()[1]])
}
