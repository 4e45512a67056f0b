//! Sums, factors, casts and copies.

use super::op::{blocks, check_dims, int, kernel, piece_grid, target};
use super::{Array, DType, MemoryUse, args, entry};

/// `a + b`.
pub(crate) fn add(a: Array, b: &Array) -> Array {
    check_dims("b", b, a.dims());
    let (y, a, b) = (target(&a), a.aligned(), b.aligned());
    kernel(a.cuda(), entry!("reduce.cu", "add"), a.dtype()).launch(
        piece_grid(&a),
        [256, 1, 1],
        0,
        args![a.ptr(), b.ptr(), y.ptr(), int(a.rows()), int(a.cols()), int(a.ld()), int(b.ld()), int(y.ld())],
    );
    y
}

/// `a + b` for a of f32 and b of another dtype, in f32.
pub(crate) fn add_narrow(a: Array, b: &Array) -> Array {
    check_dims("b", b, a.dims());
    let (y, a, b) = (target(&a), a.aligned(), b.aligned());
    kernel(b.cuda(), entry!("elementwise.cu", "add_f32"), b.dtype()).launch(
        octet_grid(&b),
        [256, 1, 1],
        0,
        args![b.ptr(), a.ptr(), y.ptr(), int(b.rows()), int(b.cols()), int(b.ld()), int(a.ld()), int(y.ld())],
    );
    y
}

/// `out += x` for f32 vectors, whoever else sees `out`.
pub(crate) fn accumulate(out: &Array, x: &Array) {
    check_dims("x", x, [1, out.cols()]);
    super::reduce::sum_partials(x, out);
}

/// `y + bias` `[1, cols]` in every row.
pub(crate) fn add_bias(y: Array, bias: &Array) -> Array {
    check_dims("the bias", bias, [1, y.cols()]);
    let y = if y.is_unique() && y.is_aligned() { y } else { copy(&y) };
    let bias = bias.aligned();
    kernel(y.cuda(), entry!("reduce.cu", "add_row_bias"), y.dtype()).launch(
        piece_grid(&y),
        [256, 1, 1],
        0,
        args![y.ptr(), bias.ptr(), int(y.rows()), int(y.cols()), int(y.ld())],
    );
    y
}

/// `factor · a`.
pub(crate) fn scale(a: Array, factor: f32) -> Array {
    let (y, a) = (target(&a), a.aligned());
    kernel(a.cuda(), entry!("elementwise.cu", "scale"), a.dtype()).launch(
        octet_grid(&a),
        [256, 1, 1],
        0,
        args![a.ptr(), y.ptr(), int(a.rows()), int(a.cols()), int(a.ld()), int(y.ld()), factor],
    );
    y
}

/// `a ∘ b`, in the memory of a where it may be.
pub(crate) fn mul(a: Array, b: &Array) -> Array {
    check_dims("b", b, a.dims());
    let (y, a, b) = (target(&a), a.aligned(), b.aligned());
    kernel(a.cuda(), entry!("elementwise.cu", "mul"), a.dtype()).launch(
        octet_grid(&a),
        [256, 1, 1],
        0,
        args![a.ptr(), b.ptr(), y.ptr(), int(a.rows()), int(a.cols()), int(a.ld()), int(b.ld()), int(y.ld())],
    );
    y
}

/// Every row of x times `factors` `[1, columns]`, element by element, in the memory of x where it may be.
pub(crate) fn scale_columns(x: Array, factors: &Array) -> Array {
    check_dims("the factors", factors, [1, x.cols()]);
    let (y, x) = (target(&x), x.aligned());
    kernel(x.cuda(), entry!("elementwise.cu", "scale_columns"), x.dtype()).launch(
        octet_grid(&x),
        [256, 1, 1],
        0,
        args![x.ptr(), factors.ptr(), y.ptr(), int(x.rows()), int(x.cols()), int(x.ld()), int(y.ld())],
    );
    y
}

/// The values rounded to a dtype; the same memory where they have it already, and otherwise memory under a usage.
pub(crate) fn cast(x: &Array, dtype: DType, usage: MemoryUse) -> Array {
    if x.dtype() == dtype {
        return x.clone();
    }
    let y = Array::empty(x.cuda(), x.dims(), dtype, usage);
    copy_into(x, &y);
    y
}

/// [`cast`] for activations, with `pad_cols` spare columns behind each row of a new matrix.
pub(crate) fn cast_padded(x: &Array, dtype: DType, pad_cols: usize) -> Array {
    if x.dtype() == dtype {
        return x.clone();
    }
    let y = Array::padded(x.cuda(), x.dims(), pad_cols, dtype, MemoryUse::Activations);
    copy_into(x, &y);
    y
}

/// The values in memory of their own.
pub(crate) fn copy(x: &Array) -> Array {
    copy_for(x, MemoryUse::Activations)
}

/// [`copy`] with another usage.
pub(crate) fn copy_for(x: &Array, usage: MemoryUse) -> Array {
    let y = Array::empty(x.cuda(), x.dims(), x.dtype(), usage);
    copy_into(x, &y);
    y
}

/// Writes the values over those of `y`, rounded to its dtype.
pub(crate) fn copy_into(x: &Array, y: &Array) {
    // Kernels take sizes of 31 bits, and the flat buffer of all weights of a model may be longer.
    const LONGEST: usize = 1 << 30;
    check_dims("the copy", y, x.dims());
    if x.rows() == 1 && x.cols() > LONGEST {
        for first in (0..x.cols()).step_by(LONGEST) {
            let dims = [1, LONGEST.min(x.cols() - first)];
            copy_into(&x.part(first, dims), &y.part(first, dims));
        }
        return;
    }
    if x.dtype() == y.dtype() && x.is_aligned() && y.is_aligned() {
        kernel(x.cuda(), entry!("reduce.cu", "copy_2d"), x.dtype()).launch(
            piece_grid(x),
            [256, 1, 1],
            0,
            args![x.ptr(), y.ptr(), int(x.rows()), int(x.cols()), int(x.ld()), int(y.ld())],
        );
        return;
    }
    let entry = match y.dtype() {
        DType::Bf16 => entry!("elementwise.cu", "cast_bf16"),
        DType::F16 => entry!("elementwise.cu", "cast_f16"),
        DType::F32 => entry!("elementwise.cu", "cast_f32"),
    };
    kernel(x.cuda(), entry, x.dtype()).launch(
        octet_grid(x),
        [256, 1, 1],
        0,
        args![x.ptr(), y.ptr(), int(x.rows()), int(x.cols()), int(x.ld()), int(y.ld())],
    );
}

/// Row `places[i]` of `y` becomes row i of `x`, for every place; `places` is an address of u32 on the device.
pub(crate) fn scatter_rows(x: &Array, places: u64, y: &Array) {
    assert_eq!(x.cols(), y.cols(), "columns of scattered rows");
    kernel(x.cuda(), entry!("elementwise.cu", "scatter_rows"), x.dtype()).launch(
        octet_grid(x),
        [256, 1, 1],
        0,
        args![x.ptr(), places, y.ptr(), int(x.rows()), int(x.cols()), int(x.ld()), int(y.ld())],
    );
}

/// Rows `places[i]` of `x`, of which there are `rows`; `places` is an address of u32 on the device.
pub(crate) fn gather_rows(x: &Array, places: u64, rows: usize) -> Array {
    let x = x.aligned();
    let y = Array::empty(x.cuda(), [rows, x.cols()], x.dtype(), MemoryUse::Activations);
    // Rows of a matrix are to be had as rows of an embedding table are.
    kernel(x.cuda(), entry!("embedding.cu", "embedding_fwd"), x.dtype()).early().launch(
        piece_grid(&y),
        [256, 1, 1],
        0,
        args![x.ptr(), places, y.ptr(), int(rows), int(x.cols()), int(x.ld()), int(y.ld())],
    );
    y
}

/// The grid of kernels whose threads take eight values of a row each, 256 threads a block.
fn octet_grid(x: &Array) -> [u32; 3] {
    [blocks((x.rows() * x.cols().div_ceil(8)).div_ceil(256)), 1, 1]
}
