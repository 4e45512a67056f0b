//! The router of a mixture of experts: it chooses each token's experts and computes their weights.
//!
//! With logits l and p = softmax(l) over all E experts, in f32:
//!
//! - [`RoutingForm::SoftmaxTopK`]: the K largest p; weights w = p of those, with `normalize` divided by their sum.
//! - [`RoutingForm::TopKSoftmax`]: the K largest l; w = softmax over those.
//! - [`RoutingForm::Sigmoid`]: the K largest l; w = σ(l). With one expert this is the gate of a shared expert.
//!
//! Slots are in falling order of the logits; of equal ones the expert with the lower index comes first.
//!
//! # Shapes
//! l `[tokens, experts]`, w `[tokens, top_k]`.
//!
//! # Dtypes
//! Logits and their gradient in the compute dtype; everything else in f32. The weights are not rounded to 16 bits.
//!
//! # Gradients
//! To the logits, through the weights; the choice has none. Normalized weights are a softmax over the chosen logits:
//! dl_c = w_c·(dw_c − Σ w·dw) for those, 0 for all others. Without normalization
//! dl_j = p_j·(dw_j − Σ_c p_c·dw_c), with dw_j = 0 for experts that were not chosen. Of sigmoids dl_c = w_c·(1 − w_c)·dw_c.
//! Saved: the weights and the choice and, only for a softmax without normalization, the logits, from which p is recomputed.
//!
//! Equal to the routers of transformers' `qwen3_moe`, `qwen2_moe`, `mixtral` (the first form) and `granitemoe`,
//! `gpt_oss` (the second).

mod cpu;
pub(crate) mod cuda;
mod dispatch;
mod grads;
mod meta;
mod portable;

pub use dispatch::{Dispatch, HostDispatch};

use burn::tensor::DType;

use crate::tensor::cuda_dtype;
use crate::{Backend, Tensor};

/// The formula of the chosen experts' weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RoutingForm {
    /// Softmax over all experts, of which the largest are chosen.
    SoftmaxTopK {
        /// True if the weights are divided by their sum.
        normalize: bool,
    },
    /// The experts with the largest logits are chosen, with a softmax over those.
    TopKSoftmax,
    /// The experts with the largest logits are chosen, each with the sigmoid of its own.
    Sigmoid,
}

impl RoutingForm {
    /// Returns true if logits of experts that were not chosen have a gradient.
    pub(crate) fn reaches_all(self) -> bool {
        self == Self::SoftmaxTopK { normalize: false }
    }
}

/// The experts of every token and their weights, with what the backward needs.
#[derive(Clone, Debug)]
pub struct Routing {
    /// w, `[tokens, top_k]`, f32.
    pub weights: Tensor<2>,
    /// The chosen experts, in the order in which they are computed.
    pub dispatch: Dispatch,
    /// l, `[tokens, experts]`, where the backward needs it.
    logits: Option<Tensor<2>>,
    form: RoutingForm,
    dtype: DType,
}

/// Chooses `top_k` experts for every token.
///
/// # Panics
/// If `top_k` is 0 or larger than the number of experts.
pub fn forward(logits: Tensor<2>, top_k: usize, form: RoutingForm) -> Routing {
    let [_, experts] = logits.dims();
    assert!((1..=experts).contains(&top_k), "{top_k} of {experts} experts");
    let (weights, dispatch) = match Backend::of(&logits) {
        Backend::Cpu => cpu::forward(logits.burn(), top_k, form),
        Backend::Portable => portable::forward(logits.burn(), top_k, form),
        Backend::Cuda => cuda::forward(logits.cuda(), top_k, form),
        Backend::Meta => meta::forward(logits.meta(), top_k),
    };
    let dtype = logits.dtype();
    Routing { weights, dispatch, logits: form.reaches_all().then_some(logits), form, dtype }
}

/// Returns the gradient to the logits, `[tokens, experts]`, for that to the weights, `[tokens, top_k]`.
pub fn backward(routing: &Routing, dweights: &Tensor<2>) -> Tensor<2> {
    let Routing { weights, dispatch, logits, form, dtype } = routing;
    assert_eq!(dweights.dims(), weights.dims(), "gradient to the router's weights");
    match (Backend::of(weights), *dtype) {
        (Backend::Cpu, DType::F32) => {
            let logits = logits.as_ref().map(Tensor::burn);
            cpu::backward(logits, weights.burn(), dispatch, *form, dweights.burn()).into()
        }
        (Backend::Cpu | Backend::Portable, dtype) => {
            let logits = logits.as_ref().map(Tensor::burn);
            portable::backward(logits, weights.burn(), dispatch, *form, dweights.burn()).cast(dtype).into()
        }
        (Backend::Cuda, dtype) => {
            let logits = logits.as_ref().map(Tensor::cuda);
            cuda::backward(logits, weights.cuda(), dispatch, *form, dweights.cuda(), cuda_dtype(dtype)).into()
        }
        (Backend::Meta, dtype) => meta::backward(weights.meta(), dispatch, dtype).into(),
    }
}

/// The sum of each token's rows, `[tokens, n]`: onto_t + Σ_slot y of its selection in that slot, for rows y
/// `[tokens · top_k, n]`. The sum is in f32 and in the order of the slots.
///
/// Its gradient to the rows is the gradient to their token, which grouped operations read as
/// [`GroupedRows::Tokens`](super::grouped::GroupedRows::Tokens).
pub fn sum_slots(y: &Tensor<2>, dispatch: &Dispatch, onto: Option<&Tensor<2>>) -> Tensor<2> {
    match Backend::of(y) {
        Backend::Cpu => cpu::sum_slots(y.burn(), dispatch, onto.map(Tensor::burn)).into(),
        Backend::Portable => portable::sum_slots(y.burn(), dispatch, onto.map(Tensor::burn)).into(),
        Backend::Cuda => cuda::sum_slots(y.cuda(), dispatch, onto.map(Tensor::cuda)).into(),
        Backend::Meta => meta::sum_slots(y.meta(), dispatch, onto.map(Tensor::meta)).into(),
    }
}

/// The weights of all experts, `[tokens, experts]` in `dtype`: `values` `[tokens, top_k]` at the chosen experts, 0 at the
/// others. With it, what experts add to every one of their rows is a product.
pub fn spread(values: &Tensor<2>, dispatch: &Dispatch, dtype: DType) -> Tensor<2> {
    assert_eq!(values.dims(), [dispatch.tokens(), dispatch.top_k()], "values of the chosen experts");
    match Backend::of(values) {
        Backend::Cpu | Backend::Portable => portable::spread(values.burn(), dispatch).cast(dtype).into(),
        Backend::Cuda => cuda::spread(values.cuda(), dispatch, cuda_dtype(dtype)).into(),
        Backend::Meta => meta::spread(values.meta(), dispatch, dtype).into(),
    }
}

/// The values of the chosen experts, `[tokens, top_k]` in f32, of those of all, `[tokens, experts]`: the adjoint of
/// [`spread`].
pub fn pick(all: &Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    assert_eq!(all.dims(), [dispatch.tokens(), dispatch.experts()], "values of all experts");
    match Backend::of(all) {
        Backend::Cpu | Backend::Portable => portable::pick(all.burn(), dispatch).into(),
        Backend::Cuda => cuda::pick(all.cuda(), dispatch).into(),
        Backend::Meta => meta::pick(all.meta(), dispatch).into(),
    }
}
