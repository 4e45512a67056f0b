//! Sums of probabilities for logits on CUDA, computed on the host.

use super::cpu;
use crate::host::from_vec;
use crate::{Tensor, from_f32, to_f32};

pub(super) fn forward(logits: &Tensor<2>) -> Vec<f64> {
    cpu::forward(&from_vec(to_f32(logits.clone()), logits.dims()))
}

pub(super) fn backward(logits: &Tensor<2>, coefficients: &[f32]) -> Tensor<2> {
    let host = cpu::backward(&from_vec(to_f32(logits.clone()), logits.dims()), coefficients);
    from_f32(to_f32(Tensor::from(host)), logits.dims(), &logits.device(), logits.dtype())
}
