//! The activation of experts on CUDA, which this version does not compute.

use crate::ops::routing::Dispatch;
use crate::ops::routing::cuda::missing;
use crate::runtime::Array;
use crate::runtime::op::like;

pub(super) fn forward(gate_up: &Array, _: &Array, _: &Dispatch) -> Array {
    gate_up.cuda().fail(missing("the activation of experts"));
    like(&gate_up.columns(0, gate_up.cols() / 2))
}

pub(super) fn backward(dact: Array, gate_up: Array, weights: &Array, _: &Dispatch) -> (Array, Array, Array) {
    gate_up.cuda().fail(missing("the backward of the activation of experts"));
    (gate_up, dact, like(weights))
}
