//! Products with the weights of experts, whether they are frozen, quantized or trained.

use super::{GroupedRows, nn, nn_add, nt};
use crate::ops::routing::Dispatch;
use crate::{Params, Tensor, Weight};

impl Weight {
    /// A linear layer of every expert, for a weight `[experts · out, in]`: `x_e · W_eᵀ`, `[rows, in] → [rows, out]`.
    pub fn grouped_nt(&self, params: &Params, x: GroupedRows<'_>, dispatch: &Dispatch) -> Tensor<2> {
        if let Self::Sharded(weight) = self {
            return weight.gather().grouped_nt(params, x, dispatch);
        }
        match self.quantized(params) {
            Some(quantized) => quantized.grouped_nt(x, dispatch),
            None => nt(x, &self.matrix(params), dispatch),
        }
    }

    /// Its gradient to the input: `dy_e · W_e`, `[rows, out] → [rows, in]`, added to `dx` if there is one.
    pub fn grouped_nn(
        &self,
        params: &Params,
        dy: GroupedRows<'_>,
        dx: Option<Tensor<2>>,
        dispatch: &Dispatch,
    ) -> Tensor<2> {
        if let Self::Sharded(weight) = self {
            return weight.gather().grouped_nn(params, dy, dx, dispatch);
        }
        match (self.quantized(params), dx) {
            (Some(quantized), dx) => quantized.grouped_nn(dy, dx, dispatch),
            (None, None) => nn(dy, &self.matrix(params), dispatch),
            (None, Some(dx)) => nn_add(dx, 1.0, dy, &self.matrix(params), dispatch),
        }
    }
}
