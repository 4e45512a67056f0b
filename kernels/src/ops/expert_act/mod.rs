//! The gated activation of experts with the router's weight in it.
//!
//! - [`ExpertActivation::Silu`]: act = w ∘ silu(gate) ∘ up, gate and up side by side.
//! - [`ExpertActivation::ClampedSwiglu`]: act = w ∘ g·σ(alpha·g) ∘ (u + 1), with g = min(gate + b, limit) and u = up + b
//!   clamped to [−limit, limit]. Gate and up alternate: columns 2j and 2j + 1 make column j of act. The bias b is that of
//!   the row's expert.
//!
//! The product after it is linear, so that a token's result is the plain sum of its experts' rows
//! ([`sum_slots`](super::routing::sum_slots)), and the gradient to w needs none of their results:
//! dw = Σ_j dact_j · act_j / w.
//!
//! For SiLU dgate = dact ∘ w ∘ up ∘ σ(gate) · (1 + gate · (1 − σ(gate))) and dup = dact ∘ w ∘ silu(gate). For the clamped
//! form, with s = σ(alpha·g), dgate = dact ∘ w ∘ (u + 1) ∘ s · (1 + alpha·g·(1 − s)) and dup = dact ∘ w ∘ g·s, and 0 where
//! the clamp changed the value.
//!
//! # Shapes
//! gate and up `[rows, 2 · intermediate]`, rows = tokens · top_k in the order of a [`Dispatch`]; act
//! `[rows, intermediate]`; w `[tokens, top_k]`; b `[experts, 2 · intermediate]`.
//!
//! # Dtypes
//! w and its gradient in f32; the products in f32, rounded once.
//!
//! # Gradients
//! To gate, up and w. That to b is the sum of an expert's rows of the gradient to gate and up
//! ([`Grads::add_expert_rows`](crate::Grads::add_expert_rows)). Saved: gate and up; the backward recomputes act.
//!
//! Equal to the experts of transformers' `qwen3_moe` and `gpt_oss`.

mod cpu;
mod cuda;
mod meta;
mod portable;

use super::routing::Dispatch;
use crate::tensor::two_devices;
use crate::{Backend, Tensor};

/// The activation of experts.
#[derive(Clone, Copy, Debug)]
pub enum ExpertActivation<'a> {
    /// silu(gate) ∘ up.
    Silu,
    /// gpt-oss: biases, clamps, a sigmoid with a slope, and gate and up that alternate.
    ClampedSwiglu(ClampedSwiglu<'a>),
}

/// The numbers of [`ExpertActivation::ClampedSwiglu`].
#[derive(Clone, Copy, Debug)]
pub struct ClampedSwiglu<'a> {
    /// The slope in the sigmoid.
    pub alpha: f32,
    /// The bound of gate from above, and of up from both sides.
    pub limit: f32,
    /// Added to gate and up, `[experts, 2 · intermediate]`, in their dtype.
    pub bias: &'a Tensor<2>,
}

/// Returns act, `[rows, intermediate]`.
pub fn forward(
    gate_up: &Tensor<2>,
    weights: &Tensor<2>,
    dispatch: &Dispatch,
    activation: ExpertActivation<'_>,
) -> Tensor<2> {
    check(gate_up, weights, dispatch, activation);
    match Backend::of(gate_up) {
        Backend::Cpu => cpu::forward(gate_up.burn(), weights.burn(), dispatch.host(), activation).into(),
        Backend::Portable => portable::forward(gate_up.burn(), weights.burn(), dispatch.host(), activation).into(),
        Backend::Cuda => cuda::forward(gate_up.cuda(), weights.cuda(), dispatch, activation).into(),
        Backend::Meta => meta::forward(gate_up.meta()).into(),
    }
}

/// The results of [`backward`].
#[derive(Debug)]
pub struct ExpertActGrads {
    /// The gradients to gate and up, in their order.
    pub gate_up: Tensor<2>,
    /// act, as [`forward`] returned it.
    pub act: Tensor<2>,
    /// The gradient to w, `[tokens, top_k]`, f32.
    pub weights: Tensor<2>,
}

/// Returns the gradients, and act again; written over `gate_up` and `dact` if nothing else refers to them.
pub fn backward(
    dact: Tensor<2>,
    gate_up: Tensor<2>,
    weights: &Tensor<2>,
    dispatch: &Dispatch,
    activation: ExpertActivation<'_>,
) -> ExpertActGrads {
    check(&gate_up, weights, dispatch, activation);
    let (gate_up, act, weights): (Tensor<2>, Tensor<2>, Tensor<2>) = match (gate_up, dact) {
        (Tensor::Burn(gate_up), Tensor::Burn(dact)) => {
            let (weights, host) = (weights.burn(), dispatch.host());
            let (dgate_up, act, dw) = match Backend::of_burn(&gate_up) {
                Backend::Cpu => cpu::backward(dact, gate_up, weights, host, activation),
                _ => portable::backward(dact, gate_up, weights, host, activation),
            };
            (dgate_up.into(), act.into(), dw.into())
        }
        (Tensor::Cuda(gate_up), Tensor::Cuda(dact)) => {
            let (dgate_up, act, dw) = cuda::backward(dact, gate_up, weights.cuda(), dispatch, activation);
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

fn check(gate_up: &Tensor<2>, weights: &Tensor<2>, dispatch: &Dispatch, activation: ExpertActivation<'_>) {
    assert_eq!(gate_up.dims()[0], dispatch.rows(), "rows of gate and up");
    assert_eq!(weights.dims(), [dispatch.tokens(), dispatch.top_k()], "the router's weights");
    if let ExpertActivation::ClampedSwiglu(ClampedSwiglu { bias, .. }) = activation {
        assert_eq!(bias.dims(), [dispatch.experts(), gate_up.dims()[1]], "the bias of gate and up");
    }
}
