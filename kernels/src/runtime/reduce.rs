//! Sums over rows, the last stage of the gradients of biases and norms.

use super::op::{blocks, check_dims, int, kernel, lanes};
use super::{Array, DType, MemoryUse, args, entry};

/// Rows that one block sums.
const CHUNK: usize = 64;

/// The sum of every column, f32 `[1, cols]`.
pub(crate) fn column_sums(x: &Array) -> Array {
    let sums = Array::zeros(x.cuda(), [1, x.cols()], DType::F32, MemoryUse::Activations);
    add_column_sums(x, &sums);
    sums
}

/// Adds the sum of every column to `out`, f32 `[1, cols]`.
pub(crate) fn add_column_sums(x: &Array, out: &Array) {
    let x = x.aligned();
    let partial = partials(&x, CHUNK);
    kernel(x.cuda(), entry!("reduce.cu", "column_sums"), x.dtype()).launch(
        column_grid(&x, CHUNK),
        [32, 8, 1],
        0,
        args![x.ptr(), partial.ptr(), int(x.rows()), int(x.cols()), int(x.ld()), int(CHUNK)],
    );
    sum_partials(&partial, out);
}

/// Room for the sums of every `chunk` rows of x.
pub(crate) fn partials(x: &Array, chunk: usize) -> Array {
    Array::dense(x.cuda(), [x.rows().div_ceil(chunk), x.cols()], DType::F32, MemoryUse::Scratch)
}

/// The grid of kernels that make them, blocks of 32 × 8.
pub(crate) fn column_grid(x: &Array, chunk: usize) -> [u32; 3] {
    [blocks(x.cols().div_ceil(32 * lanes(x.dtype()))), blocks(x.rows().div_ceil(chunk)), 1]
}

/// Adds the rows of `partial` to `out` `[1, cols]`, both f32.
pub(crate) fn sum_partials(partial: &Array, out: &Array) {
    check_dims("the sums", out, [1, partial.cols()]);
    assert_eq!([partial.dtype(), out.dtype()], [DType::F32; 2], "dtype of sums");
    if partial.rows() == 0 {
        return;
    }
    kernel(out.cuda(), entry!("reduce.cu", "sum_partials"), DType::F32).launch(
        [blocks(partial.cols().div_ceil(32)), 1, 1],
        [32, 8, 1],
        0,
        args![partial.ptr(), out.ptr(), int(partial.rows()), int(partial.cols())],
    );
}
