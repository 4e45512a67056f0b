//! Routing in Burn's operations; the formulas stand in [`super`]. The choice is made on the host.

use std::sync::Arc;

use burn::tensor::activation::{sigmoid, softmax};
use burn::tensor::{DType, IndexingUpdateOp, Int, Tensor as BurnTensor, TensorData};

use super::dispatch::DispatchPlace;
use super::{Dispatch, HostDispatch, RoutingForm, cpu};
use crate::tensor::indices;
use crate::{Tensor, to_f32};

pub(super) fn forward(logits: &BurnTensor<2>, top_k: usize, form: RoutingForm) -> (Tensor<2>, Dispatch) {
    let [tokens, experts] = logits.dims();
    let chosen = cpu::choose(&to_f32(Tensor::from(logits.clone())), experts, top_k);
    let at = matrix_of(&chosen, [tokens, top_k], logits);
    let logits = logits.clone().cast(DType::F32);
    let weights = match form {
        RoutingForm::SoftmaxTopK { normalize: false } => softmax(logits, 1).gather(1, at),
        RoutingForm::SoftmaxTopK { normalize: true } => {
            let p = softmax(logits, 1).gather(1, at);
            p.clone() / p.sum_dim(1)
        }
        RoutingForm::TopKSoftmax => softmax(logits.gather(1, at), 1),
        RoutingForm::Sigmoid => sigmoid(logits.gather(1, at)),
    };
    let host = HostDispatch::of(&chosen, experts);
    (weights.into(), Dispatch::new(tokens, experts, top_k, DispatchPlace::Host(Arc::new(host))))
}

/// The gradient to the logits in f32.
pub(super) fn backward(
    logits: Option<&BurnTensor<2>>,
    weights: &BurnTensor<2>,
    dispatch: &Dispatch,
    form: RoutingForm,
    dweights: &BurnTensor<2>,
) -> BurnTensor<2> {
    let at = matrix_of(&dispatch.host().chosen(), weights.dims(), weights);
    let through = weights.clone() * dweights.clone();
    let mean = through.clone().sum_dim(1);
    // At the chosen experts a softmax has w·(dw − mean); the others have 0 or p·(−mean).
    let (others, chosen) = match (form, logits) {
        (RoutingForm::SoftmaxTopK { normalize: false }, Some(logits)) => {
            (softmax(logits.clone().cast(DType::F32), 1) * mean.neg(), through)
        }
        (RoutingForm::Sigmoid, _) => (zeros(dispatch, weights), through.clone() - through * weights.clone()),
        _ => (zeros(dispatch, weights), through - weights.clone() * mean),
    };
    others.scatter(1, at, chosen, IndexingUpdateOp::Add)
}

fn zeros(dispatch: &Dispatch, like: &BurnTensor<2>) -> BurnTensor<2> {
    BurnTensor::zeros([dispatch.tokens(), dispatch.experts()], (&like.device(), DType::F32))
}

pub(super) fn sum_slots(y: &BurnTensor<2>, dispatch: &Dispatch, onto: Option<&BurnTensor<2>>) -> BurnTensor<2> {
    let ([_, width], dtype) = (y.dims(), y.dtype());
    let rows = dispatch.host().rows.iter().map(|&row| row as usize);
    let by_selection = y.clone().select(0, indices(rows, y)).cast(DType::F32); // [tokens · top_k, width]
    let sums = by_selection.reshape([dispatch.tokens(), dispatch.top_k(), width]).sum_dim(1);
    let sums = sums.reshape([dispatch.tokens(), width]);
    match onto {
        None => sums.cast(dtype),
        Some(onto) => (sums + onto.clone().cast(DType::F32)).cast(dtype),
    }
}

pub(super) fn spread(values: &BurnTensor<2>, dispatch: &Dispatch) -> BurnTensor<2> {
    let at = matrix_of(&dispatch.host().chosen(), values.dims(), values);
    zeros(dispatch, values).scatter(1, at, values.clone(), IndexingUpdateOp::Add)
}

pub(super) fn pick(all: &BurnTensor<2>, dispatch: &Dispatch) -> BurnTensor<2> {
    let at = matrix_of(&dispatch.host().chosen(), [dispatch.tokens(), dispatch.top_k()], all);
    all.clone().gather(1, at).cast(DType::F32)
}

/// Numbers of columns for `gather` and `scatter`, beside `like` and outside its autodiff graph.
fn matrix_of(values: &[u32], shape: [usize; 2], like: &BurnTensor<2>) -> BurnTensor<2, Int> {
    let values: Vec<i32> = values.iter().map(|&value| value.cast_signed()).collect();
    BurnTensor::from_data(TensorData::new(values, shape), (&like.device().inner(), DType::I32))
}
