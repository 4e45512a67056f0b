//! The sums of a router's probabilities over the tokens, P_e = Σ_t p_te with p_t = softmax(l_t): what the auxiliary loss
//! of a mixture of experts reads of its logits.
//!
//! # Shapes
//! l `[tokens, experts]`, P `[experts]`.
//!
//! # Dtypes
//! l and its gradient in the compute dtype; probabilities in f32, their sums in f64 on the CPU and in f32 elsewhere.
//!
//! # Gradients
//! For L = Σ_e c_e·P_e: dl_te = p_te·(c_e − Σ_j c_j·p_tj). Saved: l, from which p is recomputed.
//!
//! The sums are returned to the host, which has to know them before the backward of the first layer. On CUDA the logits
//! are copied to the host and computed there.
//!
//! Part of transformers' `load_balancing_loss_func`; `tests/goldens/families/*/router` hold it.

mod cpu;
mod cuda;
mod meta;
mod portable;

use crate::{Backend, Tensor};

/// Returns P. Waits for the device.
pub fn forward(logits: &Tensor<2>) -> Vec<f64> {
    match Backend::of(logits) {
        Backend::Cpu => cpu::forward(logits.burn()),
        Backend::Portable => portable::forward(logits.burn()),
        Backend::Cuda => cuda::forward(logits),
        Backend::Meta => meta::forward(logits.meta()),
    }
}

/// Returns the gradient of Σ_e c_e·P_e to the logits, for `coefficients` c.
///
/// # Panics
/// If there is not one coefficient for each expert.
pub fn backward(logits: &Tensor<2>, coefficients: &[f32]) -> Tensor<2> {
    assert_eq!(coefficients.len(), logits.dims()[1], "a coefficient for each expert");
    match Backend::of(logits) {
        Backend::Cpu => cpu::backward(logits.burn(), coefficients).into(),
        Backend::Portable => portable::backward(logits.burn(), coefficients).into(),
        Backend::Cuda => cuda::backward(logits, coefficients),
        Backend::Meta => meta::backward(logits.meta()).into(),
    }
}
