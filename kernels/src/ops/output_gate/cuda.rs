//! Launches of `output_gate.cu`.

use crate::runtime::limits::HEAD_DIM_MULTIPLE;
use crate::runtime::op::{check_dims, int, kernel, like, padded, piece_grid};
use crate::runtime::{Array, MemoryUse, args, entry};

pub(super) fn queries(qg: &Array, head_dim: usize) -> Array {
    let heads = heads(qg, head_dim);
    let qg = qg.aligned();
    let q = Array::empty(qg.cuda(), [qg.rows(), heads * head_dim], qg.dtype(), MemoryUse::Activations);
    kernel(qg.cuda(), entry!("output_gate.cu", "output_gate_queries"), qg.dtype()).launch(
        piece_grid(&q),
        [256, 1, 1],
        0,
        args![qg.ptr(), q.ptr(), int(q.rows()), int(heads), int(head_dim), int(qg.ld()), int(q.ld())],
    );
    q
}

pub(super) fn gated(o: &Array, qg: &Array, head_dim: usize, pad_cols: usize) -> Array {
    let heads = heads(qg, head_dim);
    check_dims("o", o, [qg.rows(), heads * head_dim]);
    let (o, qg, y) = (o.aligned(), qg.aligned(), padded(o, pad_cols));
    kernel(o.cuda(), entry!("output_gate.cu", "output_gate_fwd"), o.dtype()).launch(
        piece_grid(&o),
        [256, 1, 1],
        0,
        args![
            o.ptr(),
            qg.ptr(),
            y.ptr(),
            int(o.rows()),
            int(heads),
            int(head_dim),
            int(o.ld()),
            int(qg.ld()),
            int(y.ld())
        ],
    );
    y
}

pub(super) fn join(dq: &Array, dy: &Array, o: &Array, qg: &Array, head_dim: usize) -> Array {
    let heads = heads(qg, head_dim);
    for (name, x) in [("dq", dq), ("dy", dy), ("o", o)] {
        check_dims(name, x, [qg.rows(), heads * head_dim]);
    }
    let (dq, dy, o, qg, dqg) = (dq.aligned(), dy.aligned(), o.aligned(), qg.aligned(), like(qg));
    kernel(o.cuda(), entry!("output_gate.cu", "output_gate_join"), o.dtype()).launch(
        piece_grid(&o),
        [256, 1, 1],
        0,
        args![
            dq.ptr(),
            dy.ptr(),
            o.ptr(),
            qg.ptr(),
            dqg.ptr(),
            int(o.rows()),
            int(heads),
            int(head_dim),
            int(dq.ld()),
            int(dy.ld()),
            int(o.ld()),
            int(qg.ld()),
            int(dqg.ld())
        ],
    );
    dqg
}

fn heads(qg: &Array, head_dim: usize) -> usize {
    assert!(
        head_dim.is_multiple_of(HEAD_DIM_MULTIPLE),
        "heads of {head_dim} channels; the kernel takes multiples of 8"
    );
    qg.cols() / (2 * head_dim)
}
