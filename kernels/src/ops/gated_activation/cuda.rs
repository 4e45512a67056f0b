//! Gated activations; the formulas stand in [`super`].

use super::Activation;
use crate::runtime::op::{check_dims, int, padded, piece_grid, target};
use crate::runtime::{Array, Entry, Kernel, args, entry};

/// act, with `pad_cols` spare columns behind each row.
pub(crate) fn forward(activation: Activation, gate: &Array, up: &Array, pad_cols: usize) -> Array {
    check_dims("up", up, gate.dims());
    let (gate, up, act) = (gate.aligned(), up.aligned(), padded(gate, pad_cols));
    let [alpha, limit] = parameters(activation);
    kernel(&gate, entry!("gated_activation.cu", "gated_activation_fwd"), activation).early().launch(
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
            int(act.ld()),
            alpha,
            limit
        ],
    );
    act
}

/// `(dgate, dup, act)`, in the memory of gate, up and dact where they may be.
pub(crate) fn backward(activation: Activation, dact: Array, gate: Array, up: Array) -> (Array, Array, Array) {
    check_dims("up", &up, gate.dims());
    check_dims("dact", &dact, gate.dims());
    // Gate and up may be columns of one matrix, and then reach their memory together.
    let free = Array::are_unique(&[&gate, &up]) && gate.is_aligned() && up.is_aligned();
    let (dgate, dup) = if free { (gate.clone(), up.clone()) } else { (target(&gate), target(&up)) };
    let act = target(&dact);
    let (dact, gate, up) = (dact.aligned(), gate.aligned(), up.aligned());
    let [alpha, limit] = parameters(activation);
    kernel(&gate, entry!("gated_activation.cu", "gated_activation_bwd"), activation).launch(
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
            int(act.ld()),
            alpha,
            limit
        ],
    );
    (dgate, dup, act)
}

/// The kernel for gate's dtype and an activation.
fn kernel(gate: &Array, entry: Entry, activation: Activation) -> Kernel {
    let define = match activation {
        Activation::Silu => "SILU",
        Activation::GeluTanh => "GELU_TANH",
        Activation::ClampedSwiglu { .. } => "CLAMPED_SWIGLU",
    };
    gate.cuda().kernel(entry, &[("T", gate.dtype().name()), ("ACTIVATION", define)])
}

/// Alpha and limit, which only the clamped SwiGLU reads.
fn parameters(activation: Activation) -> [f32; 2] {
    match activation {
        Activation::Silu | Activation::GeluTanh => [0.0; 2],
        Activation::ClampedSwiglu { alpha, limit } => [alpha, limit],
    }
}
