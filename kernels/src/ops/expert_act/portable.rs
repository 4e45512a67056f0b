//! The activation of experts in Burn's operations; the formulas stand in [`super`].

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

use super::{ClampedSwiglu, ExpertActivation};
use crate::ops::routing::HostDispatch;
use crate::tensor::indices;

pub(super) fn forward(
    gate_up: &Tensor<2>,
    weights: &Tensor<2>,
    dispatch: &HostDispatch,
    activation: ExpertActivation<'_>,
) -> Tensor<2> {
    let dtype = gate_up.dtype();
    let act = Parts::of(gate_up, dispatch, activation).act();
    (act * by_row(weights, dispatch)).cast(dtype)
}

/// The gradients to gate and up, act, and the gradient to w.
pub(super) fn backward(
    dact: Tensor<2>,
    gate_up: Tensor<2>,
    weights: &Tensor<2>,
    dispatch: &HostDispatch,
    activation: ExpertActivation<'_>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let dtype = gate_up.dtype();
    let parts = Parts::of(&gate_up, dispatch, activation);
    let (dact, w) = (dact.cast(DType::F32), by_row(weights, dispatch));
    let act = parts.act();
    let dw = (dact.clone() * act.clone()).sum_dim(1); // [rows, 1]
    let rows = dispatch.rows.iter().map(|&row| row as usize);
    let dw = dw.clone().select(0, indices(rows, &dw)).reshape(weights.dims());
    let dgate_up = parts.backward(dact * w.clone());
    (dgate_up.cast(dtype), (act * w).cast(dtype), dw)
}

/// The factors of an activation, each `[rows, intermediate]` in f32.
struct Parts {
    gate: Tensor<2>,
    /// σ of the gate, which its slope multiplies.
    sig: Tensor<2>,
    /// The factor of gate·sig.
    up: Tensor<2>,
    slope: f32,
    /// The gates and ups that the clamp left as they were, for the form that has one.
    kept: Option<[Tensor<2>; 2]>,
}

impl Parts {
    fn of(gate_up: &Tensor<2>, dispatch: &HostDispatch, activation: ExpertActivation<'_>) -> Self {
        let [rows, both] = gate_up.dims();
        let gate_up = gate_up.clone().cast(DType::F32);
        match activation {
            ExpertActivation::Silu => {
                let [gate, up] = [0, both / 2].map(|first| gate_up.clone().narrow(1, first, both / 2));
                Self { sig: sigmoid(gate.clone()), gate, up, slope: 1.0, kept: None }
            }
            ExpertActivation::ClampedSwiglu(ClampedSwiglu { alpha, limit, bias }) => {
                let experts = (0..rows).map(|row| dispatch.expert(row));
                let bias = bias.burn().clone().cast(DType::F32);
                let pairs = (gate_up + bias.clone().select(0, indices(experts, &bias))).reshape([rows, both / 2, 2]);
                let [gate, up] = [0, 1].map(|at| pairs.clone().narrow(2, at, 1).reshape([rows, both / 2]));
                let mask = |is: Tensor<2, burn::tensor::Bool>| is.float().cast(DType::F32);
                let kept = [
                    mask(gate.clone().lower_equal_elem(limit)),
                    mask(up.clone().lower_equal_elem(limit)) * mask(up.clone().greater_equal_elem(-limit)),
                ];
                let (gate, up) = (gate.clamp_max(limit), up.clamp(-limit, limit) + 1.0);
                Self { sig: sigmoid(gate.clone() * alpha), gate, up, slope: alpha, kept: Some(kept) }
            }
        }
    }

    fn act(&self) -> Tensor<2> {
        self.gate.clone() * self.sig.clone() * self.up.clone()
    }

    /// The gradients to gate and up, in their order.
    fn backward(self, through: Tensor<2>) -> Tensor<2> {
        let Self { gate, sig, up, slope, kept } = self;
        let dup = through.clone() * (gate.clone() * sig.clone());
        let dgate = through * up * (sig.clone() * (gate * slope * (sig.neg() + 1.0) + 1.0));
        match kept {
            None => Tensor::cat(vec![dgate, dup], 1),
            Some([of_gate, of_up]) => {
                let [rows, width] = dgate.dims();
                let pairs = [dgate * of_gate, dup * of_up].map(|d| d.reshape([rows, width, 1]));
                Tensor::cat(pairs.to_vec(), 2).reshape([rows, 2 * width])
            }
        }
    }
}

/// The weight of each row, `[rows, 1]`.
fn by_row(weights: &Tensor<2>, dispatch: &HostDispatch) -> Tensor<2> {
    let column = weights.clone().reshape([dispatch.sorted.len(), 1]);
    let sorted = dispatch.sorted.iter().map(|&selection| selection as usize);
    column.clone().select(0, indices(sorted, &column))
}
