//! Root-mean-square normalization of rows, with the residual addition before or after it.

use super::{GainForm, mixed};
use crate::runtime::limits::MAX_NORM_WIDTH;
use crate::runtime::op::{blocks, check_dims, int, like, padded, target};
use crate::runtime::{Array, DType, Entry, Kernel, MemoryUse, args, entry, reduce};

/// Rows that one block sums for the weight's gradient.
pub(super) const CHUNK: usize = 64;

/// `(y, rstd)`: y of `T` with `pad_cols` spare columns behind each row, rstd f32 `[1, rows]`.
pub(crate) fn forward(x: &Array, form: GainForm, weight: Option<&Array>, eps: f32, pad_cols: usize) -> (Array, Array) {
    if let Some(weight) = mixed::weight_of(x, weight) {
        let (_, y, rstd) = mixed::forward(x, None, form, weight, eps, pad_cols);
        return (y, rstd);
    }
    let (_, y, rstd) = run(x, None, form, weight, eps, pad_cols);
    (y, rstd)
}

/// `(sum, y, rstd)` with sum = x + delta, in delta's memory where it may be.
pub(crate) fn add_forward(
    x: &Array,
    delta: Array,
    form: GainForm,
    weight: Option<&Array>,
    eps: f32,
    pad_cols: usize,
) -> (Array, Array, Array) {
    check_dims("delta", &delta, x.dims());
    if let Some(weight) = mixed::weight_of(x, weight) {
        let (sum, y, rstd) = mixed::forward(x, Some(&delta), form, weight, eps, pad_cols);
        return (sum.expect("a sum was asked for"), y, rstd);
    }
    let sum = target(&delta);
    let (sum, y, rstd) = run(x, Some((delta.aligned(), sum)), form, weight, eps, pad_cols);
    (sum.expect("a sum was asked for"), y, rstd)
}

/// `(residual + y, rstd)`.
pub(crate) fn forward_add(
    x: &Array,
    form: GainForm,
    weight: Option<&Array>,
    eps: f32,
    residual: &Array,
) -> (Array, Array) {
    let (sum, rstd, _) = run_add(x, form, weight, eps, residual, None);
    (sum, rstd)
}

/// `(sum, rstd₁, y₂, rstd₂)`: [`forward_add`] with the first weight, then [`forward`] of the sum with the second; y₂ has
/// `pad_cols` spare columns behind each row.
pub(crate) fn forward_add_forward(
    x: &Array,
    form: GainForm,
    [first, second]: [Option<&Array>; 2],
    [eps1, eps2]: [f32; 2],
    residual: &Array,
    pad_cols: usize,
) -> (Array, Array, Array, Array) {
    let (sum, rstd1, then) = run_add(x, form, first, eps1, residual, Some((second, eps2, pad_cols)));
    let (y, rstd2) = then.expect("a second norm was asked for");
    (sum, rstd1, y, rstd2)
}

/// y again, from what [`forward`] saved.
pub(crate) fn recompute(x: &Array, form: GainForm, weight: Option<&Array>, rstd: &Array) -> Array {
    if let Some(weight) = mixed::weight_of(x, weight) {
        return mixed::recompute(x, form, weight, rstd);
    }
    let weight = checked(x, weight);
    let (x, y) = (x.aligned(), like(x));
    kernel(&x, entry!("rms_norm.cu", "rms_norm_recompute"), form).launch(
        [blocks(x.rows()), 1, 1],
        block(&x),
        0,
        args![
            x.ptr(),
            address(weight.as_ref()),
            rstd.ptr(),
            y.ptr(),
            int(x.rows()),
            int(x.cols()),
            int(x.ld()),
            int(y.ld())
        ],
    );
    y
}

/// The gradient to x, plus `residual`, in whose memory it lies where it may; a new matrix has `pad_cols` spare
/// columns behind each row.
pub(crate) fn backward(
    dy: &Array,
    x: &Array,
    form: GainForm,
    weight: Option<&Array>,
    rstd: &Array,
    residual: Option<Array>,
    pad_cols: usize,
) -> Array {
    if dy.dtype() != x.dtype() {
        return mixed::backward(dy, x, form, weight, rstd, residual, pad_cols);
    }
    let weight = checked(x, weight);
    check_dims("dy", dy, x.dims());
    launch_backward(&kernel(x, entry!("rms_norm.cu", "rms_norm_bwd"), form), dy, x, weight, rstd, residual, pad_cols)
}

/// Launches a kernel of the backward; `weight` was checked.
pub(super) fn launch_backward(
    kernel: &Kernel,
    dy: &Array,
    x: &Array,
    weight: Option<Array>,
    rstd: &Array,
    residual: Option<Array>,
    pad_cols: usize,
) -> Array {
    let free = residual.as_ref().filter(|residual| residual.is_unique() && residual.is_aligned());
    let dx = free.map_or_else(|| padded(x, pad_cols), Array::clone);
    let (dy, x, residual) = (dy.aligned(), x.aligned(), residual.map(|r| r.aligned()));
    let (residual, residual_ld) = residual.as_ref().map_or((0, 0), |r| (r.ptr(), r.ld()));
    kernel.launch(
        [blocks(x.rows()), 1, 1],
        block(&x),
        0,
        args![
            dy.ptr(),
            x.ptr(),
            address(weight.as_ref()),
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
    if dy.dtype() != x.dtype() {
        return mixed::add_weight_grad(dy, x, rstd, out);
    }
    check_dims("dy", dy, x.dims());
    // The gradient does not depend on the form.
    let kernel = kernel(x, entry!("rms_norm.cu", "rms_norm_dw"), GainForm::Plain);
    launch_weight_grad(&kernel, reduce::column_grid(x, CHUNK), dy, x, rstd, out);
}

/// Launches a kernel of the gradient to the weight on `grid`, and adds its sums to `out`.
pub(super) fn launch_weight_grad(kernel: &Kernel, grid: [u32; 3], dy: &Array, x: &Array, rstd: &Array, out: &Array) {
    let (dy, x) = (dy.aligned(), x.aligned());
    let partial = reduce::partials(&x, CHUNK);
    kernel.launch(
        grid,
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
    form: GainForm,
    weight: Option<&Array>,
    eps: f32,
    pad_cols: usize,
) -> (Option<Array>, Array, Array) {
    let weight = checked(x, weight);
    let (x, y) = (x.aligned(), padded(x, pad_cols));
    let rstd = rows_of_f32(&x);
    let [delta_at, sum_at] = delta.as_ref().map_or([0; 2], |(delta, sum)| [delta.ptr(), sum.ptr()]);
    let [delta_ld, sum_ld] = delta.as_ref().map_or([0; 2], |(delta, sum)| [int(delta.ld()), int(sum.ld())]);
    kernel(&x, entry!("rms_norm.cu", "rms_norm_fwd"), form).early().launch(
        [blocks(x.rows()), 1, 1],
        block(&x),
        0,
        args![
            x.ptr(),
            delta_at,
            sum_at,
            address(weight.as_ref()),
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

/// `(sum, rstd, (y₂, rstd₂))`; `then` is the weight, the eps and the spare columns of a second norm.
#[allow(clippy::type_complexity, reason = "two results and two optional ones")]
fn run_add(
    x: &Array,
    form: GainForm,
    weight: Option<&Array>,
    eps: f32,
    residual: &Array,
    then: Option<(Option<&Array>, f32, usize)>,
) -> (Array, Array, Option<(Array, Array)>) {
    check_dims("the residual", residual, x.dims());
    let weight = checked(x, weight);
    let (x, residual, sum, rstd) = (x.aligned(), residual.aligned(), like(x), rows_of_f32(x));
    let eps2 = then.map_or(0.0, |(_, eps, _)| eps);
    let then = then.map(|(weight, _, pad_cols)| (checked(&x, weight), padded(&x, pad_cols), rows_of_f32(&x)));
    let weight2 = then.as_ref().and_then(|(weight, ..)| weight.as_ref());
    let [y, rstd2] = then.as_ref().map_or([0; 2], |(_, y, rstd)| [y.ptr(), rstd.ptr()]);
    kernel(&x, entry!("rms_norm.cu", "rms_norm_add"), form).early().launch(
        [blocks(x.rows()), 1, 1],
        block(&x),
        0,
        args![
            x.ptr(),
            address(weight.as_ref()),
            residual.ptr(),
            sum.ptr(),
            rstd.ptr(),
            address(weight2),
            y,
            rstd2,
            int(x.rows()),
            int(x.cols()),
            int(x.ld()),
            int(residual.ld()),
            int(sum.ld()),
            int(then.as_ref().map_or(0, |(_, y, _)| y.ld())),
            eps,
            eps2
        ],
    );
    (sum, rstd, then.map(|(_, y, rstd)| (y, rstd)))
}

/// The kernel for x's dtype and a form of the gain.
fn kernel(x: &Array, entry: Entry, form: GainForm) -> Kernel {
    x.cuda().kernel(entry, &[("T", x.dtype().name()), ("GAIN", form.define())])
}

pub(super) fn block(x: &Array) -> [u32; 3] {
    [blocks(x.cols().div_ceil(16).next_multiple_of(32)), 1, 1]
}

/// An f32 for each row of x.
pub(super) fn rows_of_f32(x: &Array) -> Array {
    Array::empty(x.cuda(), [1, x.rows()], DType::F32, MemoryUse::Activations)
}

pub(super) fn address(weight: Option<&Array>) -> u64 {
    weight.map_or(0, Array::ptr)
}

/// The weight at an address that the kernels take.
fn checked(x: &Array, weight: Option<&Array>) -> Option<Array> {
    check_width(x);
    let weight = weight?;
    check_dims("the norm's weight", weight, [1, x.cols()]);
    assert_eq!(weight.dtype(), x.dtype(), "dtype of the norm's weight");
    Some(weight.aligned())
}

pub(super) fn check_width(x: &Array) {
    assert!(
        (1..=MAX_NORM_WIDTH).contains(&x.cols()),
        "rows of {} values; the kernel takes 1 to {MAX_NORM_WIDTH}",
        x.cols()
    );
}
