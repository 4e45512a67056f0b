//! The activation of experts on CUDA.

use crate::ops::routing::Dispatch;
use crate::runtime::op::{blocks, check_dims, int, kernel, like, piece_grid, target};
use crate::runtime::{Array, DType, MemoryUse, args, entry};

pub(super) fn forward(gate_up: &Array, weights: &Array, dispatch: &Dispatch) -> Array {
    let (gate_up, weights) = (gate_up.aligned(), weights.contiguous());
    let act = like(&gate_up.columns(0, gate_up.cols() / 2));
    kernel(act.cuda(), entry!("expert_act.cu", "expert_act_fwd"), act.dtype()).launch(
        piece_grid(&act),
        [256, 1, 1],
        0,
        args![
            gate_up.ptr(),
            weights.ptr(),
            dispatch.cuda().sorted(),
            act.ptr(),
            int(act.rows()),
            int(act.cols()),
            int(gate_up.ld()),
            int(act.ld())
        ],
    );
    act
}

/// `(dgate_up, act, dweights)`, the first two in the memory of gate_up and dact where they may be.
pub(super) fn backward(dact: Array, gate_up: Array, weights: &Array, dispatch: &Dispatch) -> (Array, Array, Array) {
    check_dims("dact", &dact, [gate_up.rows(), gate_up.cols() / 2]);
    let (dgate_up, act) = (target(&gate_up), target(&dact));
    let (gate_up, dact, weights) = (gate_up.aligned(), dact.aligned(), weights.contiguous());
    let dweights = Array::dense(act.cuda(), weights.dims(), DType::F32, MemoryUse::Activations);
    kernel(act.cuda(), entry!("expert_act.cu", "expert_act_bwd"), act.dtype()).launch(
        [blocks(act.rows().div_ceil(8)), 1, 1],
        [256, 1, 1],
        0,
        args![
            dact.ptr(),
            gate_up.ptr(),
            weights.ptr(),
            dispatch.cuda().sorted(),
            dgate_up.ptr(),
            act.ptr(),
            dweights.ptr(),
            int(act.rows()),
            int(act.cols()),
            int(dact.ld()),
            int(gate_up.ld()),
            int(dgate_up.ld()),
            int(act.ld())
        ],
    );
    (dgate_up, act, dweights)
}
