//! Grouped products on CUDA: one launch for all experts, which reads on the device how many rows each has.

mod general;
mod sm90;

use core::ops::Range;

use super::{GroupedRows, expert_dims};
use crate::ops::quantized::cuda::few_rows;
use crate::ops::routing::Dispatch;
use crate::params::quantized::cuda::{ChosenExperts, QuantizedArray};
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
    w: Array,
    y: &'a Array,
    /// Columns of y.
    n: usize,
    /// Columns of x, which are summed over.
    k: usize,
    alpha: f32,
    add: bool,
    dispatch: &'a Dispatch,
    /// The experts whose matrices `w` has. The rows of others are neither read nor written.
    experts: Range<usize>,
}

impl<'a> Product<'a> {
    /// Describes a product of all experts that is written to `y`.
    fn new(form: Form, x: GroupedRows<'_>, w: &Array, y: &'a Array, dispatch: &'a Dispatch) -> Self {
        let (x, w) = (Rows::of(x), w.aligned());
        let (n, k, experts) = (y.cols(), x.array.cols(), 0..dispatch.experts());
        Self { form, x, w, y, n, k, alpha: 1.0, add: false, dispatch, experts }
    }

    /// The address of the first rows of its experts.
    fn offsets(&self) -> u64 {
        self.dispatch.cuda().offsets() + (size_of::<i32>() * self.experts.start) as u64
    }

    fn launch(self) {
        if self.dispatch.rows() == 0 {
            return;
        }
        let dtypes = [self.x.array.dtype(), self.y.dtype()];
        assert_eq!(dtypes, [self.w.dtype(); 2], "dtypes of a grouped product");
        if sm90::takes(&self.w, self.dispatch) && self.y.is_aligned() && self.n.is_multiple_of(8) {
            sm90::product(self);
        } else {
            general::product(self);
        }
    }
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

/// Bytes of the matrices that are decoded at a time.
const SCRATCH: usize = 256 << 20;

pub(super) fn quantized_nt(x: GroupedRows<'_>, w: &QuantizedArray, dispatch: &Dispatch) -> Array {
    let [n, _] = expert_dims(w.dims(), dispatch);
    let y = Array::empty(w.cuda(), [dispatch.rows(), n], x.tensor().cuda().dtype(), MemoryUse::Activations);
    quantized(Form::Nt, &y, false, x, w, dispatch);
    y
}

pub(super) fn quantized_nn(dy: GroupedRows<'_>, w: &QuantizedArray, dx: Option<Array>, dispatch: &Dispatch) -> Array {
    let add = dx.is_some();
    let dtype = dy.tensor().cuda().dtype();
    let new = || Array::empty(w.cuda(), [dispatch.rows(), w.dims()[1]], dtype, MemoryUse::Activations);
    let dx = dx.map_or_else(new, owned);
    quantized(Form::Nn, &dx, add, dy, w, dispatch);
    dx
}

/// Computes a product with decoded matrices, some experts at a time in the same scratch memory: the stream orders a decoder
/// after the product before it.
fn quantized(form: Form, y: &Array, add: bool, x: GroupedRows<'_>, w: &QuantizedArray, dispatch: &Dispatch) {
    let ([n, k], experts, dtype) = (expert_dims(w.dims(), dispatch), dispatch.experts(), y.dtype());
    if form == Form::Nt && !add {
        let rows = Rows::of(x);
        if few_rows::takes_experts(&rows.array, w, n, dispatch) {
            return few_rows::experts(y, &rows.array, rows.of_tokens, w, dispatch);
        }
    }
    // Narrow products divide the rows of all experts among thread blocks.
    let at_once = if y.cols() <= 64 { experts } else { experts_at_once(w, [n, k], experts, dtype) };
    let scratch = Array::empty(w.cuda(), [at_once * n, k], dtype, MemoryUse::DecodedWeights);
    for first in (0..experts).step_by(at_once) {
        let group = first..experts.min(first + at_once);
        let decoded = scratch.row_range(0, group.len() * n);
        w.decode_chosen(first * n, &decoded, chosen(form, first, n, dispatch));
        Product { add, experts: group, ..Product::new(form, x, &decoded, y, dispatch) }.launch();
    }
}

/// Returns the choice of a few tokens, where the experts without rows need not be decoded: x_e · W_eᵀ reads none of their rows, which
/// the other product sums over beside zeros.
fn chosen(form: Form, first: usize, rows: usize, dispatch: &Dispatch) -> Option<ChosenExperts> {
    let is_sparse = form == Form::Nt && (1..=dispatch.experts()).contains(&dispatch.rows());
    let device = dispatch.cuda();
    let [offsets, sorted, chosen] = [device.offsets(), device.sorted(), device.chosen()];
    is_sparse.then_some(ChosenExperts { offsets, sorted, chosen, selections: dispatch.rows(), first, rows })
}

/// Returns how many experts are decoded at a time: as many as fit in [`SCRATCH`], or the next smaller number at which the
/// codes can be divided; all if there is none.
fn experts_at_once(w: &QuantizedArray, [n, k]: [usize; 2], experts: usize, dtype: DType) -> usize {
    let fitting = (SCRATCH / (n * k * dtype.bytes())).clamp(1, experts);
    let mut sizes = (experts.div_ceil(fitting)..=experts).map(|groups| experts.div_ceil(groups));
    sizes.find(|&size| size == experts || w.splits_at(size * n)).unwrap_or(experts)
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
    Product::new(form, x, w, &y, dispatch).launch();
    y
}

fn add(form: Form, y: &Array, alpha: f32, x: GroupedRows<'_>, w: &Array, dispatch: &Dispatch) {
    Product { alpha, add: true, ..Product::new(form, x, w, y, dispatch) }.launch();
}

/// `y` itself where nothing else refers to it, and a copy where something does.
fn owned(y: Array) -> Array {
    if y.is_unique() { y } else { elementwise::copy(&y) }
}
