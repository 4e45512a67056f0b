//! Grouped products on CUDA, which this version does not compute.

use super::{GroupedRows, expert_dims};
use crate::ops::routing::Dispatch;
use crate::ops::routing::cuda::missing;
use crate::params::quantized::cuda::QuantizedArray;
use crate::runtime::{Array, MemoryUse};

pub(super) fn nt(x: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) -> Array {
    let [n, _] = expert_dims(w.dims(), dispatch);
    product(x, n, dispatch)
}

pub(super) fn nt_add(y: Array, _: usize, _: f32, _: GroupedRows<'_>, _: &Array, _: &Dispatch) -> Array {
    y.cuda().fail(missing("a grouped product"));
    y
}

pub(super) fn nn(dy: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) -> Array {
    product(dy, w.cols(), dispatch)
}

pub(super) fn nn_add(dx: Array, _: f32, _: GroupedRows<'_>, _: &Array, _: &Dispatch) -> Array {
    dx.cuda().fail(missing("a grouped product"));
    dx
}

pub(super) fn quantized_nt(x: GroupedRows<'_>, w: &QuantizedArray, dispatch: &Dispatch) -> Array {
    let [n, _] = expert_dims(w.dims(), dispatch);
    product(x, n, dispatch)
}

pub(super) fn quantized_nn(dy: GroupedRows<'_>, w: &QuantizedArray, dx: Option<Array>, dispatch: &Dispatch) -> Array {
    dx.unwrap_or_else(|| product(dy, w.dims()[1], dispatch))
}

pub(super) fn add_tn(grad: &Array, _: f32, _: GroupedRows<'_>, _: GroupedRows<'_>, _: &Dispatch) {
    grad.cuda().fail(missing("the gradient of a grouped product"));
}

fn product(x: GroupedRows<'_>, width: usize, dispatch: &Dispatch) -> Array {
    let x = x.tensor().cuda();
    x.cuda().fail(missing("a grouped product"));
    Array::empty(x.cuda(), [dispatch.rows(), width], x.dtype(), MemoryUse::Activations)
}
