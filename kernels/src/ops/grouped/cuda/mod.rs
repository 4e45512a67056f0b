//! Grouped products on CUDA: one launch for all experts, which reads on the device how many rows each has.

mod general;
mod sm90;

use super::{GroupedRows, expert_dims};
use crate::ops::routing::Dispatch;
use crate::params::quantized::cuda::QuantizedArray;
use crate::runtime::op::check_dims;
use crate::runtime::{Array, DType, MemoryUse, elementwise};

/// The form of a product, as the kernels number it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// x_e · W_eᵀ.
    Nt,
    /// x_e · W_e.
    Nn,
    /// dy_eᵀ · x_e.
    Tn,
}

impl Form {
    /// The value of `FORM` in the kernels.
    fn name(self) -> &'static str {
        match self {
            Self::Nt => "0",
            Self::Nn => "1",
            Self::Tn => "2",
        }
    }
}

/// A product of rows with the experts' matrices, to be written to `y` `[rows, n]` or added to it.
struct Product<'a> {
    form: Form,
    x: Rows,
    w: &'a Array,
    y: &'a Array,
    /// Columns of y.
    n: usize,
    /// Columns of x, which are summed over.
    k: usize,
    alpha: f32,
    add: bool,
    dispatch: &'a Dispatch,
}

/// The rows of an operand in memory that the kernels take.
#[derive(Clone, Debug)]
struct Rows {
    array: Array,
    /// False: one row for each selection. True: one for each token, to be gathered.
    of_tokens: bool,
}

impl Rows {
    fn of(rows: GroupedRows<'_>) -> Self {
        Self { array: rows.tensor().cuda().aligned(), of_tokens: matches!(rows, GroupedRows::Tokens(_)) }
    }

    /// The address of the selections through which the rows are read, or 0.
    fn selections(&self, dispatch: &Dispatch) -> u64 {
        if self.of_tokens { dispatch.cuda().sorted() } else { 0 }
    }
}

pub(super) fn nt(x: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) -> Array {
    let [n, _] = expert_dims(w.dims(), dispatch);
    product(Form::Nt, x, w, n, dispatch)
}

pub(super) fn nt_add(y: Array, first: usize, alpha: f32, x: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) -> Array {
    let [n, _] = expert_dims(w.dims(), dispatch);
    let y = owned(y);
    add(Form::Nt, &y.columns(first, n), alpha, x, w, dispatch);
    y
}

pub(super) fn nn(dy: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) -> Array {
    product(Form::Nn, dy, w, w.cols(), dispatch)
}

pub(super) fn nn_add(dx: Array, alpha: f32, dy: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) -> Array {
    let dx = owned(dx);
    add(Form::Nn, &dx, alpha, dy, w, dispatch);
    dx
}

pub(super) fn quantized_nt(x: GroupedRows<'_>, w: &QuantizedArray, dispatch: &Dispatch) -> Array {
    nt(x, &w.decode(x.tensor().cuda().dtype(), None), dispatch)
}

pub(super) fn quantized_nn(dy: GroupedRows<'_>, w: &QuantizedArray, dx: Option<Array>, dispatch: &Dispatch) -> Array {
    let w = w.decode(dy.tensor().cuda().dtype(), None);
    match dx {
        Some(dx) => nn_add(dx, 1.0, dy, &w, dispatch),
        None => nn(dy, &w, dispatch),
    }
}

/// `grad += alpha · dy_eᵀ · x_e` for `grad` f32 `[experts · n, k]`, whoever else sees it.
pub(super) fn add_tn(grad: &Array, alpha: f32, dy: GroupedRows<'_>, x: GroupedRows<'_>, dispatch: &Dispatch) {
    let dims @ [n, k] = expert_dims(grad.dims(), dispatch);
    assert!(grad.is_contiguous() && grad.dtype() == DType::F32, "gradients are dense f32");
    let (dy, x) = (Rows::of(dy), Rows::of(x));
    check_dims("dy", &dy.array, [dy.array.rows(), n]);
    check_dims("x", &x.array, [x.array.rows(), k]);
    if dispatch.rows() == 0 {
        return;
    }
    if sm90::takes(&dy.array, dispatch) {
        sm90::add_tn(grad, alpha, [&dy, &x], dims, dispatch);
    } else {
        general::add_tn(grad, alpha, [&dy, &x], dims, dispatch);
    }
}

fn product(form: Form, x: GroupedRows<'_>, w: &Array, n: usize, dispatch: &Dispatch) -> Array {
    let y = Array::empty(w.cuda(), [dispatch.rows(), n], w.dtype(), MemoryUse::Activations);
    launch(form, &y, 1.0, false, x, w, dispatch);
    y
}

fn add(form: Form, y: &Array, alpha: f32, x: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) {
    launch(form, y, alpha, true, x, w, dispatch);
}

fn launch(form: Form, y: &Array, alpha: f32, add: bool, x: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) {
    let (x, w) = (Rows::of(x), w.aligned());
    let (n, k) = (y.cols(), x.array.cols());
    if dispatch.rows() == 0 {
        return;
    }
    assert_eq!([x.array.dtype(), y.dtype()], [w.dtype(); 2], "dtypes of a grouped product");
    let product = Product { form, x, w: &w, y, n, k, alpha, add, dispatch };
    if sm90::takes(&w, dispatch) && y.is_aligned() && n.is_multiple_of(8) {
        sm90::product(product);
    } else {
        general::product(product);
    }
}

/// `y` itself where nothing else refers to it, and a copy where something does.
fn owned(y: Array) -> Array {
    if y.is_unique() { y } else { elementwise::copy(&y) }
}
