//! The output gate in Burn ops; the formulas stand in [`super`].

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

/// The queries (0) or the logits (1).
pub(super) fn part(qg: &Tensor<2>, head_dim: usize, which: usize) -> Tensor<2> {
    let [tokens, width] = qg.dims();
    let pairs = qg.clone().reshape([tokens * width / (2 * head_dim), 2 * head_dim]);
    pairs.narrow(1, which * head_dim, head_dim).reshape([tokens, width / 2])
}

pub(super) fn gated(o: &Tensor<2>, qg: &Tensor<2>, head_dim: usize) -> Tensor<2> {
    let gate = sigmoid(part(qg, head_dim, 1).cast(DType::F32));
    (o.clone().cast(DType::F32) * gate).cast(o.dtype())
}

pub(super) fn join([dq, dy, o, qg]: [&Tensor<2>; 4], head_dim: usize) -> Tensor<2> {
    let [tokens, width] = qg.dims();
    let gate = sigmoid(part(qg, head_dim, 1).cast(DType::F32));
    let wide = |t: &Tensor<2>| t.clone().cast(DType::F32);
    let slope = gate.clone() * (gate.neg() + 1.0);
    let dg = (wide(dy) * wide(o) * slope).cast(qg.dtype());
    let by_head = |t: Tensor<2>| t.reshape([tokens * width / (2 * head_dim), head_dim]);
    Tensor::cat(vec![by_head(dq.clone()), by_head(dg)], 1).reshape([tokens, width])
}
