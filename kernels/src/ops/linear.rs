//! Products with a layer's weight, whether it is frozen, packed or trained.

use crate::ops::matmul;
use crate::{Params, Tensor, Weight};

impl Weight {
    /// A linear layer's result: `x · Wᵀ + bias`, `[tokens, in] → [tokens, out]`.
    pub fn nt(&self, params: &Params, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
        if let Self::Sharded(weight) = self {
            return weight.gather().nt(params, x, bias);
        }
        match (self.quantized(params), bias) {
            (Some(packed), _) => packed.nt(x, bias),
            (_, None) => matmul::nt(x, &self.matrix(params)),
            (_, Some(bias)) => matmul::nt_bias(x, &self.matrix(params), bias),
        }
    }

    /// A linear layer's gradient to its input: `dy · W`, `[tokens, out] → [tokens, in]`, added to `dx` if there is one.
    pub fn nn(&self, params: &Params, dy: &Tensor<2>, dx: Option<Tensor<2>>) -> Tensor<2> {
        if let Self::Sharded(weight) = self {
            return weight.gather().nn(params, dy, dx);
        }
        match (self.quantized(params), dx) {
            (Some(packed), dx) => packed.nn(dy, dx),
            (_, None) => matmul::nn(dy, &self.matrix(params)),
            (_, Some(dx)) => matmul::nn_add(dx, 1.0, dy, &self.matrix(params)),
        }
    }
}
