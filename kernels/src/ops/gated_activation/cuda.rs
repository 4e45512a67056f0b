//! Gated activations; the formulas stand in [`super`].

use super::Activation;
use crate::ops::fp8::cuda as fp8;
use crate::runtime::op::{blocks, check_dims, int, padded, piece_grid, target};
use crate::runtime::{Array, DType, Entry, Kernel, args, entry};

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

/// [`forward`] with the rows of act as codes beside them; without them where the kernel does not take the sizes.
pub(crate) fn forward_with_codes(activation: Activation, gate: &Array, up: &Array, pad_cols: usize) -> Array {
    if !takes(gate) {
        return forward(activation, gate, up, pad_cols);
    }
    check_dims("up", up, gate.dims());
    let (gate, up, act) = (gate.aligned(), up.aligned(), padded(gate, pad_cols));
    let codes = fp8::empty_rows(gate.cuda(), gate.dims());
    let [alpha, limit] = parameters(activation);
    kernel(&gate, entry!("gated_activation_fp8.cu", "gated_activation_fp8_fwd"), activation).launch(
        [blocks(gate.rows()), 1, 1],
        block(&gate),
        0,
        args![
            gate.ptr(),
            up.ptr(),
            act.ptr(),
            codes.codes.ptr(),
            codes.scales.ptr(),
            int(gate.cols()),
            int(gate.ld()),
            int(up.ld()),
            int(act.ld()),
            alpha,
            limit
        ],
    );
    act.with_codes(codes)
}

/// Columns that a thread of the kernel with codes has.
const COLUMNS: usize = 32;

/// Returns true for gates that the kernel with codes takes.
fn takes(gate: &Array) -> bool {
    let width = gate.cols();
    gate.dtype() != DType::F32 && width.is_multiple_of(16) && width <= 512 * COLUMNS
}

fn block(gate: &Array) -> [u32; 3] {
    [blocks(gate.cols().div_ceil(COLUMNS).next_multiple_of(32)), 1, 1]
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
