//! Root-mean-square normalization of rows, with the residual add before it.

use crate::runtime::limits::MAX_NORM_WIDTH;
use crate::runtime::op::{blocks, check_dims, int, kernel, like, padded, target};
use crate::runtime::{Array, DType, MemoryUse, args, entry, reduce};

/// Rows that one block sums for the weight's gradient.
const CHUNK: usize = 64;

/// `(y, rstd)`: y of `T` with `pad_cols` spare columns behind each row, rstd f32 `[1, rows]`.
pub(crate) fn forward(x: &Array, weight: &Array, eps: f32, pad_cols: usize) -> (Array, Array) {
    let (_, y, rstd) = run(x, None, weight, eps, pad_cols);
    (y, rstd)
}

/// `(sum, y, rstd)` with sum = x + delta, in delta's memory where it may be.
pub(crate) fn add_forward(x: &Array, delta: Array, weight: &Array, eps: f32, pad_cols: usize) -> (Array, Array, Array) {
    check_dims("delta", &delta, x.dims());
    let sum = target(&delta);
    let (sum, y, rstd) = run(x, Some((delta.aligned(), sum)), weight, eps, pad_cols);
    (sum.expect("a sum was asked for"), y, rstd)
}

/// y again, from what [`forward`] saved.
pub(crate) fn recompute(x: &Array, weight: &Array, rstd: &Array) -> Array {
    check(x, weight);
    let (x, weight, y) = (x.aligned(), weight.aligned(), like(x));
    kernel(x.cuda(), entry!("rms_norm.cu", "rms_norm_recompute"), x.dtype()).launch(
        [blocks(x.rows()), 1, 1],
        block(&x),
        0,
        args![x.ptr(), weight.ptr(), rstd.ptr(), y.ptr(), int(x.rows()), int(x.cols()), int(x.ld()), int(y.ld())],
    );
    y
}

/// The gradient to x, plus `residual`, in whose memory it lies where it may; a new matrix has `pad_cols` spare
/// columns behind each row.
pub(crate) fn backward(
    dy: &Array,
    x: &Array,
    weight: &Array,
    rstd: &Array,
    residual: Option<Array>,
    pad_cols: usize,
) -> Array {
    check(x, weight);
    check_dims("dy", dy, x.dims());
    let free = residual.as_ref().filter(|residual| residual.is_unique() && residual.is_aligned());
    let dx = free.map_or_else(|| padded(x, pad_cols), Array::clone);
    let (dy, x, weight, residual) = (dy.aligned(), x.aligned(), weight.aligned(), residual.map(|r| r.aligned()));
    let (residual, residual_ld) = residual.as_ref().map_or((0, 0), |r| (r.ptr(), r.ld()));
    kernel(x.cuda(), entry!("rms_norm.cu", "rms_norm_bwd"), x.dtype()).launch(
        [blocks(x.rows()), 1, 1],
        block(&x),
        0,
        args![
            dy.ptr(),
            x.ptr(),
            weight.ptr(),
            rstd.ptr(),
            residual,
            dx.ptr(),
            int(x.rows()),
            int(x.cols()),
            int(dy.ld()),
            int(x.ld()),
            int(residual_ld),
            int(dx.ld())
        ],
    );
    dx
}

/// The gradient to the weight, f32 `[1, width]`.
pub(crate) fn weight_grad(dy: &Array, x: &Array, rstd: &Array) -> Array {
    let grad = Array::zeros(x.cuda(), [1, x.cols()], DType::F32, MemoryUse::Activations);
    add_weight_grad(dy, x, rstd, &grad);
    grad
}

/// Adds the gradient to the weight to `out`, f32 `[1, width]`.
pub(crate) fn add_weight_grad(dy: &Array, x: &Array, rstd: &Array, out: &Array) {
    check_dims("dy", dy, x.dims());
    let (dy, x) = (dy.aligned(), x.aligned());
    let partial = reduce::partials(&x, CHUNK);
    kernel(x.cuda(), entry!("rms_norm.cu", "rms_norm_dw"), x.dtype()).launch(
        reduce::column_grid(&x, CHUNK),
        [32, 8, 1],
        0,
        args![
            dy.ptr(),
            x.ptr(),
            rstd.ptr(),
            partial.ptr(),
            int(x.rows()),
            int(x.cols()),
            int(dy.ld()),
            int(x.ld()),
            int(CHUNK)
        ],
    );
    reduce::sum_partials(&partial, out);
}

/// `delta` comes with the place of the sum.
fn run(
    x: &Array,
    delta: Option<(Array, Array)>,
    weight: &Array,
    eps: f32,
    pad_cols: usize,
) -> (Option<Array>, Array, Array) {
    check(x, weight);
    let (x, weight, y) = (x.aligned(), weight.aligned(), padded(x, pad_cols));
    let rstd = Array::empty(x.cuda(), [1, x.rows()], DType::F32, MemoryUse::Activations);
    let [delta_at, sum_at] = delta.as_ref().map_or([0; 2], |(delta, sum)| [delta.ptr(), sum.ptr()]);
    let [delta_ld, sum_ld] = delta.as_ref().map_or([0; 2], |(delta, sum)| [int(delta.ld()), int(sum.ld())]);
    kernel(x.cuda(), entry!("rms_norm.cu", "rms_norm_fwd"), x.dtype()).launch(
        [blocks(x.rows()), 1, 1],
        block(&x),
        0,
        args![
            x.ptr(),
            delta_at,
            sum_at,
            weight.ptr(),
            y.ptr(),
            rstd.ptr(),
            int(x.rows()),
            int(x.cols()),
            int(x.ld()),
            delta_ld,
            sum_ld,
            int(y.ld()),
            eps
        ],
    );
    (delta.map(|(_, sum)| sum), y, rstd)
}

fn block(x: &Array) -> [u32; 3] {
    [blocks(x.cols().div_ceil(16).next_multiple_of(32)), 1, 1]
}

fn check(x: &Array, weight: &Array) {
    check_dims("the norm's weight", weight, [1, x.cols()]);
    assert_eq!(weight.dtype(), x.dtype(), "dtype of the norm's weight");
    assert!(
        (1..=MAX_NORM_WIDTH).contains(&x.cols()),
        "rows of {} values; the kernel takes 1 to {MAX_NORM_WIDTH}",
        x.cols()
    );
}
