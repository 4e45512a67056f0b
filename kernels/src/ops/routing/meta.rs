//! Memory of routing over slices.

use burn::tensor::DType;

use super::Dispatch;
use super::dispatch::DispatchPlace;
use crate::Tensor;
use crate::tensor::MetaTensor;

pub(super) fn forward(logits: &MetaTensor, top_k: usize) -> (Tensor<2>, Dispatch) {
    let [tokens, experts] = logits.dims();
    let weights = logits.f32_sized([tokens, top_k]);
    let place = DispatchPlace::meta(logits.device(), tokens * top_k, experts);
    (weights.into(), Dispatch::new(tokens, experts, top_k, place))
}

pub(super) fn backward(weights: &MetaTensor, dispatch: &Dispatch, dtype: DType) -> MetaTensor {
    let _chosen = weights.device().scratch(size_of::<u32>() * dispatch.rows());
    weights.f32_sized([dispatch.tokens(), dispatch.experts()]).cast(dtype)
}

pub(super) fn sum_slots(y: &MetaTensor, dispatch: &Dispatch, onto: Option<&MetaTensor>) -> MetaTensor {
    let _views = [Some(y), onto].map(|view| view.map(MetaTensor::contiguous));
    y.sized([dispatch.tokens(), y.dims()[1]])
}

pub(super) fn spread(values: &MetaTensor, dispatch: &Dispatch, dtype: DType) -> MetaTensor {
    let _chosen = values.device().scratch(size_of::<u32>() * 2 * dispatch.rows());
    values.f32_sized([dispatch.tokens(), dispatch.experts()]).cast(dtype)
}

pub(super) fn pick(all: &MetaTensor, dispatch: &Dispatch) -> MetaTensor {
    let _chosen = all.device().scratch(size_of::<u32>() * 2 * dispatch.rows());
    all.f32_sized([dispatch.tokens(), dispatch.top_k()])
}
