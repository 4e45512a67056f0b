//! SwiGLU: act = silu(gate) ∘ up.

use crate::runtime::op::{check_dims, int, kernel, padded, piece_grid, target};
use crate::runtime::{Array, args, entry};

/// act, with `pad_cols` spare columns behind each row.
pub(crate) fn forward(gate: &Array, up: &Array, pad_cols: usize) -> Array {
    check_dims("up", up, gate.dims());
    let (gate, up, act) = (gate.aligned(), up.aligned(), padded(gate, pad_cols));
    kernel(gate.cuda(), entry!("swiglu.cu", "swiglu_fwd"), gate.dtype()).launch(
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

/// `(dgate, dup, act)`, in the memory of gate, up and dact where they may be.
pub(crate) fn backward(dact: Array, gate: Array, up: Array) -> (Array, Array, Array) {
    check_dims("up", &up, gate.dims());
    check_dims("dact", &dact, gate.dims());
    // Gate and up may be columns of one matrix, and then reach their memory together.
    let free = Array::are_unique(&[&gate, &up]) && gate.is_aligned() && up.is_aligned();
    let (dgate, dup) = if free { (gate.clone(), up.clone()) } else { (target(&gate), target(&up)) };
    let act = target(&dact);
    let (dact, gate, up) = (dact.aligned(), gate.aligned(), up.aligned());
    kernel(gate.cuda(), entry!("swiglu.cu", "swiglu_bwd"), gate.dtype()).launch(
        piece_grid(&gate),
        [256, 1, 1],
        0,
        args![
            dact.ptr(),
            gate.ptr(),
            up.ptr(),
            dgate.ptr(),
            dup.ptr(),
            act.ptr(),
            int(gate.rows()),
            int(gate.cols()),
            int(dact.ld()),
            int(gate.ld()),
            int(up.ld()),
            int(dgate.ld()),
            int(dup.ld()),
            int(act.ld())
        ],
    );
    (dgate, dup, act)
}
