//! Sums of probabilities in Burn's operations; the formulas stand in [`super`].

use burn::tensor::activation::softmax;
use burn::tensor::{DType, Tensor as BurnTensor, TensorData};

use crate::{Tensor, to_f32};

pub(super) fn forward(logits: &BurnTensor<2>) -> Vec<f64> {
    let sums = softmax(logits.clone().cast(DType::F32), 1).sum_dim(0);
    to_f32(Tensor::from(sums)).into_iter().map(f64::from).collect()
}

pub(super) fn backward(logits: &BurnTensor<2>, coefficients: &[f32]) -> BurnTensor<2> {
    let p = softmax(logits.clone().cast(DType::F32), 1);
    let c = TensorData::new(coefficients.to_vec(), [1, coefficients.len()]);
    let c = BurnTensor::<2>::from_data(c, (&logits.device(), DType::F32));
    let mean = (p.clone() * c.clone()).sum_dim(1); // [tokens, 1]
    (p * (c - mean)).cast(logits.dtype())
}
