//! The activation of experts in Burn's operations; the formulas stand in [`super`].

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

use crate::ops::routing::HostDispatch;
use crate::tensor::indices;

pub(super) fn forward(gate_up: &Tensor<2>, weights: &Tensor<2>, dispatch: &HostDispatch) -> Tensor<2> {
    let dtype = gate_up.dtype();
    let [gate, up] = halves(gate_up);
    let act = gate.clone() * sigmoid(gate) * up;
    (act * by_row(weights, dispatch)).cast(dtype)
}

/// The gradients to gate and up, act, and the gradient to w.
pub(super) fn backward(
    dact: Tensor<2>,
    gate_up: Tensor<2>,
    weights: &Tensor<2>,
    dispatch: &HostDispatch,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let dtype = gate_up.dtype();
    let [gate, up] = halves(&gate_up);
    let (dact, w) = (dact.cast(DType::F32), by_row(weights, dispatch));
    let sig = sigmoid(gate.clone());
    let silu = gate.clone() * sig.clone();
    let act = silu.clone() * up.clone();
    let dw = (dact.clone() * act.clone()).sum_dim(1); // [rows, 1]
    let rows = dispatch.rows.iter().map(|&row| row as usize);
    let dw = dw.clone().select(0, indices(rows, &dw)).reshape(weights.dims());
    let through = dact * w.clone();
    let slope = sig.clone() * (gate * (sig.neg() + 1.0) + 1.0);
    let dgate_up = Tensor::cat(vec![through.clone() * up * slope, through * silu], 1);
    (dgate_up.cast(dtype), (act * w).cast(dtype), dw)
}

/// Gate and up in f32.
fn halves(gate_up: &Tensor<2>) -> [Tensor<2>; 2] {
    let [_, both] = gate_up.dims();
    [0, both / 2].map(|first| gate_up.clone().narrow(1, first, both / 2).cast(DType::F32))
}

/// The weight of each row, `[rows, 1]`.
fn by_row(weights: &Tensor<2>, dispatch: &HostDispatch) -> Tensor<2> {
    let column = weights.clone().reshape([dispatch.sorted.len(), 1]);
    let sorted = dispatch.sorted.iter().map(|&selection| selection as usize);
    column.clone().select(0, indices(sorted, &column))
}
