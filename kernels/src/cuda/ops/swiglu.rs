//! SwiGLU: act = silu(gate) ∘ up.

use super::{check_dims, int, kernel, like, piece_grid, target};
use crate::cuda::{Array, args};

/// act.
pub(crate) fn forward(gate: &Array, up: &Array) -> Array {
    check_dims("up", up, gate.dims());
    let (gate, up, act) = (gate.aligned(), up.aligned(), like(gate));
    kernel(gate.cuda(), "swiglu.cu", "swiglu_fwd", gate.dtype()).launch(
        piece_grid(&gate),
        [256, 1, 1],
        0,
        args![
            gate.ptr(),
            up.ptr(),
            act.ptr(),
            int(gate.rows()),
            int(gate.cols()),
            int(gate.ld()),
            int(up.ld()),
            int(act.ld())
        ],
    );
    act
}

/// `(dgate, dup)`, in the memory of gate and up where they may be.
pub(crate) fn backward(dact: &Array, gate: Array, up: Array) -> (Array, Array) {
    run(dact, gate, up, None)
}

fn run(dact: &Array, gate: Array, up: Array, act: Option<&Array>) -> (Array, Array) {
    check_dims("up", &up, gate.dims());
    check_dims("dact", dact, gate.dims());
    // Gate and up may be columns of one matrix, and then reach their memory together.
    let free = Array::are_unique(&[&gate, &up]) && gate.is_aligned() && up.is_aligned();
    let (dgate, dup) = if free { (gate.clone(), up.clone()) } else { (target(&gate), target(&up)) };
    let (dact, gate, up) = (dact.aligned(), gate.aligned(), up.aligned());
    let (act, act_ld) = act.map_or((0, 0), |act| (act.ptr(), act.ld()));
    kernel(gate.cuda(), "swiglu.cu", "swiglu_bwd", gate.dtype()).launch(
        piece_grid(&gate),
        [256, 1, 1],
        0,
        args![
            dact.ptr(),
            gate.ptr(),
            up.ptr(),
            dgate.ptr(),
            dup.ptr(),
            act,
            int(gate.rows()),
            int(gate.cols()),
            int(dact.ld()),
            int(gate.ld()),
            int(up.ld()),
            int(dgate.ld()),
            int(dup.ld()),
            int(act_ld)
        ],
    );
    (dgate, dup)
}
