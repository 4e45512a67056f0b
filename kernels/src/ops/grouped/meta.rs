//! Memory of grouped products through the `gemm` crate, for experts that have equally many rows.

use super::GroupedRows;
use super::cpu::{decoded_rows, is_many};
use crate::host::most_at_once;
use crate::ops::matmul::{self, Form};
use crate::ops::routing::Dispatch;
use crate::tensor::{MetaMemory, MetaTensor};

/// Bytes of scratch memory of the product of some rows, on one thread or on all.
type Scratch = (usize, usize);

pub(super) fn nt(rows: usize, [n, k]: [usize; 2]) -> Scratch {
    scratch((rows, n, k), Form::Nt)
}

pub(super) fn nn(rows: usize, [n, k]: [usize; 2]) -> Scratch {
    scratch((rows, k, n), Form::Nn)
}

fn scratch(sizes: (usize, usize, usize), form: Form) -> Scratch {
    (matmul::cpu::scratch_serial(sizes, form), matmul::cpu::scratch(sizes, form))
}

/// Returns the scratch memory of [`nt`] with decoded rows, one expert after another.
pub(super) fn quantized_nt(rows: usize, dims @ [_, k]: [usize; 2]) -> Scratch {
    let part = decoded_rows(dims);
    let bytes = size_of::<f32>() * part * k + matmul::cpu::scratch((rows, part, k), Form::Nt);
    (bytes, bytes)
}

/// Returns the scratch memory of [`nn`] with decoded rows.
pub(super) fn quantized_nn(rows: usize, dims @ [_, k]: [usize; 2]) -> Scratch {
    let part = decoded_rows(dims);
    let bytes = size_of::<f32>() * part * k + matmul::cpu::scratch((rows, k, part), Form::Nn);
    (bytes, bytes)
}

/// A product of `width` columns.
pub(super) fn product(
    x: GroupedRows<'_>,
    width: usize,
    dispatch: &Dispatch,
    scratch: impl Fn(usize) -> Scratch,
) -> MetaTensor {
    let y = x.tensor().meta().sized([dispatch.rows(), width]);
    let _scratch = held(&[x], dispatch, scratch);
    y
}

/// A product added to `y`.
pub(super) fn add(
    y: MetaTensor,
    x: GroupedRows<'_>,
    dispatch: &Dispatch,
    scratch: impl Fn(usize) -> Scratch,
) -> MetaTensor {
    let y = y.owned();
    let _scratch = held(&[x], dispatch, scratch);
    y
}

/// A product into gradients.
pub(super) fn add_tn(dy: GroupedRows<'_>, x: GroupedRows<'_>, dispatch: &Dispatch) {
    let (n, k) = (dy.width(), x.width());
    drop(held(&[dy, x], dispatch, |rows| scratch((n, k, rows), Form::Tn)));
}

/// The scratch memory while it is held: that of the products, and gathered rows of tokens.
fn held(operands: &[GroupedRows<'_>], dispatch: &Dispatch, scratch: impl Fn(usize) -> Scratch) -> MetaMemory {
    let gathered: usize =
        operands.iter().filter(|rows| matches!(rows, GroupedRows::Tokens(_))).map(|x| x.width()).sum();
    let rows: Vec<usize> = dispatch.even_rows().into_iter().filter(|&rows| rows > 0).collect();
    let of = |rows: usize, on_one: bool| {
        let (serial, parallel) = scratch(rows);
        size_of::<f32>() * rows * gathered + if on_one { serial } else { parallel }
    };
    let bytes = if is_many(rows.len()) {
        most_at_once(rows.iter().map(|&rows| of(rows, true)).collect())
    } else {
        rows.iter().map(|&rows| of(rows, false)).max().unwrap_or(0)
    };
    operands[0].tensor().meta().device().scratch(bytes)
}
