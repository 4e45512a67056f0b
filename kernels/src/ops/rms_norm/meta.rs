//! Memory of RMSNorm over slices.

use super::cpu;
use crate::tensor::MetaTensor;

pub(super) fn forward(x: &MetaTensor, weight: &MetaTensor) -> (MetaTensor, MetaTensor) {
    let _views = [x, weight].map(MetaTensor::contiguous);
    let rstd = x.f32_sized([1, x.dims()[0]]);
    (x.like(), rstd)
}

pub(super) fn recompute(x: &MetaTensor, weight: &MetaTensor, rstd: &MetaTensor) -> MetaTensor {
    let _views = [x, weight, rstd].map(MetaTensor::contiguous);
    x.like()
}

pub(super) fn backward(
    dy: &MetaTensor,
    x: &MetaTensor,
    weight: &MetaTensor,
    rstd: &MetaTensor,
    residual: Option<MetaTensor>,
) -> MetaTensor {
    let _views = [dy, x, weight, rstd].map(MetaTensor::contiguous);
    residual.map_or_else(|| x.like(), MetaTensor::owned)
}

pub(super) fn weight_grad(dy: &MetaTensor, x: &MetaTensor, rstd: &MetaTensor) -> MetaTensor {
    let _views = [dy, x, rstd].map(MetaTensor::contiguous);
    let _partial = x.device().scratch(cpu::weight_grad_scratch(x.dims()));
    x.f32_sized([1, x.dims()[1]])
}
