//! Grouped products on mma.sync, and on plain f32 arithmetic: any card, any width.

use super::{Form, Product, Rows};
use crate::ops::routing::Dispatch;
use crate::runtime::op::{blocks, int};
use crate::runtime::{Array, DType, Kernel, args, entry};

/// Rows and columns of a tile.
const TILE: usize = 128;

pub(super) fn product(product: Product<'_>) {
    let offsets = product.offsets();
    let Product { form, x, w, y, n, k, alpha, add, dispatch, experts } = product;
    let experts = experts.len();
    // Every expert may end within a tile.
    let tiles = [blocks(n.div_ceil(TILE)), blocks(dispatch.rows() / TILE + experts.min(dispatch.rows())), 1];
    kernel(form, &w).launch(
        tiles,
        [256, 1, 1],
        shared(w.dtype()),
        args![
            x.array.ptr(),
            w.ptr(),
            y.ptr(),
            offsets,
            x.selections(dispatch),
            0u64,
            int(experts),
            int(n),
            int(k),
            int(dispatch.top_k()),
            int(x.array.ld()),
            int(w.ld()),
            int(y.ld()),
            alpha,
            i32::from(add)
        ],
    );
}

pub(super) fn add_tn(grad: &Array, alpha: f32, [dy, x]: [&Rows; 2], [n, k]: [usize; 2], dispatch: &Dispatch) {
    let experts = dispatch.experts();
    kernel(Form::Tn, &dy.array).launch(
        [blocks(k.div_ceil(TILE)), blocks(n.div_ceil(TILE)), blocks(experts)],
        [256, 1, 1],
        shared(dy.array.dtype()),
        args![
            dy.array.ptr(),
            x.array.ptr(),
            grad.ptr(),
            dispatch.cuda().offsets(),
            dy.selections(dispatch),
            x.selections(dispatch),
            int(experts),
            int(n),
            int(k),
            int(dispatch.top_k()),
            int(dy.array.ld()),
            int(x.array.ld()),
            int(k),
            alpha,
            1i32
        ],
    );
}

fn kernel(form: Form, operand: &Array) -> Kernel {
    let dtype = operand.dtype();
    let defines = [("T", dtype.name()), ("FORM", form.name())];
    operand.cuda().kernel(entry!("grouped.cu", "grouped"), &defines)
}

/// Two stages of two tiles 32 deep in f32, three in 16 bits, and the expert and row that a block finds.
fn shared(dtype: DType) -> u32 {
    let stages = if dtype == DType::F32 { 2 } else { 3 };
    blocks(stages * 2 * TILE * 32 * dtype.bytes() + 16)
}
