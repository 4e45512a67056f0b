//! The gated activation of experts with the router's weight in it: act = w ∘ silu(gate) ∘ up.
//!
//! The product after it is linear, so that a token's result is the plain sum of its experts' rows
//! ([`sum_slots`](super::routing::sum_slots)), and the gradient to w needs none of their results:
//! dw = Σ_j dact_j · silu(gate_j) · up_j.
//!
//! dgate = dact ∘ w ∘ up ∘ σ(gate) · (1 + gate · (1 − σ(gate))); dup = dact ∘ w ∘ silu(gate).
//!
//! # Shapes
//! gate and up side by side, `[rows, 2 · intermediate]`, rows = tokens · top_k in the order of a [`Dispatch`]; act
//! `[rows, intermediate]`; w `[tokens, top_k]`.
//!
//! # Dtypes
//! w and its gradient in f32; the products in f32, rounded once.
//!
//! # Gradients
//! To gate, up and w. Saved: gate and up; the backward recomputes act.

mod cpu;
mod cuda;
mod meta;
mod portable;

use super::routing::Dispatch;
use crate::tensor::two_devices;
use crate::{Backend, Tensor};

/// Returns act, `[rows, intermediate]`.
pub fn forward(gate_up: &Tensor<2>, weights: &Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    check(gate_up, weights, dispatch);
    match Backend::of(gate_up) {
        Backend::Cpu => cpu::forward(gate_up.burn(), weights.burn(), dispatch.host()).into(),
        Backend::Portable => portable::forward(gate_up.burn(), weights.burn(), dispatch.host()).into(),
        Backend::Cuda => cuda::forward(gate_up.cuda(), weights.cuda(), dispatch).into(),
        Backend::Meta => meta::forward(gate_up.meta()).into(),
    }
}

/// The results of [`backward`].
#[derive(Debug)]
pub struct ExpertActGrads {
    /// The gradients to gate and up, side by side.
    pub gate_up: Tensor<2>,
    /// act, as [`forward`] returned it.
    pub act: Tensor<2>,
    /// The gradient to w, `[tokens, top_k]`, f32.
    pub weights: Tensor<2>,
}

/// Returns the gradients, and act again; written over `gate_up` and `dact` if nothing else refers to them.
pub fn backward(dact: Tensor<2>, gate_up: Tensor<2>, weights: &Tensor<2>, dispatch: &Dispatch) -> ExpertActGrads {
    check(&gate_up, weights, dispatch);
    let (gate_up, act, weights): (Tensor<2>, Tensor<2>, Tensor<2>) = match (gate_up, dact) {
        (Tensor::Burn(gate_up), Tensor::Burn(dact)) => {
            let (weights, host) = (weights.burn(), dispatch.host());
            let (dgate_up, act, dw) = match Backend::of_burn(&gate_up) {
                Backend::Cpu => cpu::backward(dact, gate_up, weights, host),
                _ => portable::backward(dact, gate_up, weights, host),
            };
            (dgate_up.into(), act.into(), dw.into())
        }
        (Tensor::Cuda(gate_up), Tensor::Cuda(dact)) => {
            let (dgate_up, act, dw) = cuda::backward(dact, gate_up, weights.cuda(), dispatch);
            (dgate_up.into(), act.into(), dw.into())
        }
        (Tensor::Meta(gate_up), Tensor::Meta(dact)) => {
            let dw = weights.meta().like();
            (gate_up.owned().into(), dact.owned().into(), dw.into())
        }
        _ => two_devices(),
    };
    ExpertActGrads { gate_up, act, weights }
}

fn check(gate_up: &Tensor<2>, weights: &Tensor<2>, dispatch: &Dispatch) {
    assert_eq!(gate_up.dims()[0], dispatch.rows(), "rows of gate and up");
    assert_eq!(weights.dims(), [dispatch.tokens(), dispatch.top_k()], "the router's weights");
}
