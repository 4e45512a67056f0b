//! Memory of sums of probabilities over slices.

use crate::tensor::MetaTensor;

pub(super) fn forward(logits: &MetaTensor) -> Vec<f64> {
    let [tokens, experts] = logits.dims();
    let _probabilities = logits.f32_sized([tokens, experts]);
    vec![tokens as f64 / experts as f64; experts]
}

pub(super) fn backward(logits: &MetaTensor) -> MetaTensor {
    logits.f32_sized(logits.dims()).cast(logits.dtype())
}
