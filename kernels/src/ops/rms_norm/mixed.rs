//! Launches of `rms_norm_mixed.cu`: norms between an f32 residual stream and activations of 16 bits.

use super::GainForm;
use super::cuda::{CHUNK, block, check_width, launch_backward, launch_weight_grad, rows_of_f32};
use crate::runtime::op::{blocks, check_dims, int, like};
use crate::runtime::{Array, Cuda, DType, Entry, Kernel, MemoryUse, args, entry, reduce};

/// The weight, at an address that the kernels take, if x is f32 and the weight is not.
pub(super) fn weight_of(x: &Array, weight: Option<&Array>) -> Option<Array> {
    let weight = weight.filter(|weight| weight.dtype() != x.dtype())?;
    assert_eq!(x.dtype(), DType::F32, "dtype of rows beside a weight of 16 bits");
    check_width(x);
    check_dims("the norm's weight", weight, [1, x.cols()]);
    Some(weight.aligned())
}

/// `(x + delta, y, rstd)` with the sum in f32 and y in the dtype of the weight.
pub(super) fn forward(
    x: &Array,
    delta: Option<&Array>,
    form: GainForm,
    weight: Array,
    eps: f32,
    pad_cols: usize,
) -> (Option<Array>, Array, Array) {
    let (x, delta, rstd) = (x.aligned(), delta.map(Array::aligned), rows_of_f32(x));
    let y = Array::padded(x.cuda(), x.dims(), pad_cols, weight.dtype(), MemoryUse::Activations);
    let sum = delta.as_ref().map(|_| like(&x));
    let [delta_at, sum_at] = [&delta, &sum].map(|array| array.as_ref().map_or(0, Array::ptr));
    let [delta_ld, sum_ld] = [&delta, &sum].map(|array| array.as_ref().map_or(0, |array| int(array.ld())));
    kernel(x.cuda(), entry!("rms_norm_mixed.cu", "rms_norm_mixed_fwd"), weight.dtype(), form).early().launch(
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
    (sum, y, rstd)
}

/// y again, from what [`forward`] saved.
pub(super) fn recompute(x: &Array, form: GainForm, weight: Array, rstd: &Array) -> Array {
    let x = x.aligned();
    let y = Array::empty(x.cuda(), x.dims(), weight.dtype(), MemoryUse::Activations);
    kernel(x.cuda(), entry!("rms_norm_mixed.cu", "rms_norm_mixed_recompute"), weight.dtype(), form).launch(
        [blocks(x.rows()), 1, 1],
        block(&x),
        0,
        args![x.ptr(), weight.ptr(), rstd.ptr(), y.ptr(), int(x.rows()), int(x.cols()), int(x.ld()), int(y.ld())],
    );
    y
}

/// The gradient to x, of its dtype, plus `residual`, in whose memory it lies where it may.
pub(super) fn backward(
    dy: &Array,
    x: &Array,
    form: GainForm,
    weight: Option<&Array>,
    rstd: &Array,
    residual: Option<Array>,
    pad_cols: usize,
) -> Array {
    check_width(x);
    check_dims("dy", dy, x.dims());
    let (narrow, entry) = match x.dtype() {
        DType::F32 => (dy.dtype(), entry!("rms_norm_mixed.cu", "rms_norm_mixed_bwd")),
        narrow => (narrow, entry!("rms_norm_mixed.cu", "rms_norm_post_bwd")),
    };
    if let Some(weight) = weight {
        check_dims("the norm's weight", weight, [1, x.cols()]);
        assert_eq!(weight.dtype(), narrow, "dtype of the norm's weight");
    }
    let kernel = kernel(x.cuda(), entry, narrow, form);
    launch_backward(&kernel, dy, x, weight.map(Array::aligned), rstd, residual, pad_cols)
}

/// Adds the gradient to the weight to `out`, f32 `[1, width]`.
pub(super) fn add_weight_grad(dy: &Array, x: &Array, rstd: &Array, out: &Array) {
    check_dims("dy", dy, x.dims());
    let (narrow, wide, entry) = match x.dtype() {
        DType::F32 => (dy.dtype(), x, entry!("rms_norm_mixed.cu", "rms_norm_mixed_dw")),
        narrow => (narrow, dy, entry!("rms_norm_mixed.cu", "rms_norm_post_dw")),
    };
    // The gradient does not depend on the form.
    let kernel = kernel(x.cuda(), entry, narrow, GainForm::Plain);
    launch_weight_grad(&kernel, reduce::column_grid(wide, CHUNK), dy, x, rstd, out);
}

/// The kernel for the dtype of 16 bits and a form of the gain.
fn kernel(cuda: &Cuda, entry: Entry, narrow: DType, form: GainForm) -> Kernel {
    cuda.kernel(entry, &[("T", narrow.name()), ("GAIN", form.define())])
}
