//! The activation of experts on CUDA.

use super::{ClampedSwiglu, ExpertActivation};
use crate::ops::routing::Dispatch;
use crate::runtime::op::{blocks, check_dims, int, kernel, like, piece_grid, target};
use crate::runtime::{Array, DType, MemoryUse, args, entry};

pub(super) fn forward(
    gate_up: &Array,
    weights: &Array,
    dispatch: &Dispatch,
    activation: ExpertActivation<'_>,
) -> Array {
    let (gate_up, weights) = (gate_up.aligned(), weights.contiguous());
    let act = like(&gate_up.columns(0, gate_up.cols() / 2));
    let (rows, width) = (int(act.rows()), int(act.cols()));
    let (x, w, sorted, y) = (gate_up.ptr(), weights.ptr(), dispatch.cuda().sorted(), act.ptr());
    let [ldg, lda] = [&gate_up, &act].map(|x| int(x.ld()));
    match activation {
        ExpertActivation::Silu => kernel(act.cuda(), entry!("expert_act.cu", "expert_act_fwd"), act.dtype()).launch(
            piece_grid(&act),
            [256, 1, 1],
            0,
            args![x, w, sorted, y, rows, width, ldg, lda],
        ),
        ExpertActivation::ClampedSwiglu(ClampedSwiglu { alpha, limit, bias }) => {
            let bias = bias.cuda().aligned();
            let (b, offsets, experts) = (bias.ptr(), dispatch.cuda().offsets(), int(dispatch.experts()));
            kernel(act.cuda(), entry!("expert_act.cu", "expert_clamped_fwd"), act.dtype()).launch(
                piece_grid(&act),
                [256, 1, 1],
                0,
                args![x, b, w, sorted, offsets, y, rows, width, experts, alpha, limit, ldg, int(bias.ld()), lda],
            );
        }
    }
    act
}

/// `(dgate_up, act, dweights)`, the first two in the memory of gate_up and dact where they may be.
pub(super) fn backward(
    dact: Array,
    gate_up: Array,
    weights: &Array,
    dispatch: &Dispatch,
    activation: ExpertActivation<'_>,
) -> (Array, Array, Array) {
    check_dims("dact", &dact, [gate_up.rows(), gate_up.cols() / 2]);
    let (dgate_up, act) = (target(&gate_up), target(&dact));
    let (gate_up, dact, weights) = (gate_up.aligned(), dact.aligned(), weights.contiguous());
    let dweights = Array::dense(act.cuda(), weights.dims(), DType::F32, MemoryUse::Activations);
    let (rows, width) = (int(act.rows()), int(act.cols()));
    let (d, x, w, sorted) = (dact.ptr(), gate_up.ptr(), weights.ptr(), dispatch.cuda().sorted());
    let (dx, y, dw) = (dgate_up.ptr(), act.ptr(), dweights.ptr());
    let [ldda, ldg, lddg, lda] = [&dact, &gate_up, &dgate_up, &act].map(|x| int(x.ld()));
    let grid = [blocks(act.rows().div_ceil(8)), 1, 1];
    match activation {
        ExpertActivation::Silu => kernel(act.cuda(), entry!("expert_act.cu", "expert_act_bwd"), act.dtype()).launch(
            grid,
            [256, 1, 1],
            0,
            args![d, x, w, sorted, dx, y, dw, rows, width, ldda, ldg, lddg, lda],
        ),
        ExpertActivation::ClampedSwiglu(ClampedSwiglu { alpha, limit, bias }) => {
            let bias = bias.cuda().aligned();
            let (b, ldb) = (bias.ptr(), int(bias.ld()));
            let (offsets, experts) = (dispatch.cuda().offsets(), int(dispatch.experts()));
            kernel(act.cuda(), entry!("expert_act.cu", "expert_clamped_bwd"), act.dtype()).launch(
                grid,
                [256, 1, 1],
                0,
                args![
                    d, x, b, w, sorted, offsets, dx, y, dw, rows, width, experts, alpha, limit, ldda, ldg, ldb, lddg,
                    lda
                ],
            );
        }
    }
    (dgate_up, act, dweights)
}
