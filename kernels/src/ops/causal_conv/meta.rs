//! Memory of the causal convolution over slices.

use super::{Sequences, cpu};
use crate::tensor::MetaTensor;

pub(super) fn forward(x: &MetaTensor, weight: &MetaTensor) -> MetaTensor {
    let _views = [x, weight].map(MetaTensor::contiguous);
    let _taps = weight.like();
    let _starts = x.device().scratch(size_of::<usize>() * x.dims()[0]);
    x.like()
}

pub(super) fn backward(
    dy: &MetaTensor,
    x: &MetaTensor,
    weight: &MetaTensor,
    sequences: &Sequences,
    weight_grad: bool,
) -> (MetaTensor, Option<MetaTensor>) {
    assert!(sequences.documents().all(|(start, length)| start + length <= x.dims()[0]), "documents within x");
    let _views = [dy, x, weight].map(MetaTensor::contiguous);
    let dx = x.like();
    let _scratch = x.device().scratch(cpu::backward_scratch(x.dims(), weight.dims()[1], weight_grad));
    (dx, weight_grad.then(|| weight.like()))
}
