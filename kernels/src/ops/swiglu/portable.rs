//! SwiGLU in Burn ops; the formulas stand in [`super`].

use burn::tensor::Tensor;
use burn::tensor::activation::sigmoid;

pub(crate) fn forward(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    gate.clone() * sigmoid(gate.clone()) * up.clone()
}

pub(crate) fn backward(dact: &Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let sig = sigmoid(gate.clone());
    let silu = gate.clone() * sig.clone();
    let slope = sig.clone() * (gate * (sig.neg() + 1.0) + 1.0);
    (dact.clone() * up * slope, dact.clone() * silu)
}
