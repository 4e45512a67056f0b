//! Grouped products: every row is multiplied with the matrix of its expert.
//!
//! With x_e the rows of expert e and W_e its matrix, named as [`matmul`](super::matmul)'s by which operand is transposed:
//!
//! - [`nt`]: y_e = x_e · W_eᵀ, a linear layer of every expert;
//! - [`nn`]: dx_e = dy_e · W_e, its gradient to the input;
//! - [`Grads::add_grouped_tn`](crate::Grads::add_grouped_tn): dW_e += alpha · dy_eᵀ · x_e.
//!
//! The matrices of all experts are one, `[experts · n, k]`, those of an expert one after another. An expert without rows
//! is not read, and its gradient stays what it was.
//!
//! # Shapes
//! rows = tokens · top_k in the order of a [`Dispatch`]; x, dx `[rows, k]`, y, dy `[rows, n]`. An operand that is the
//! same for all rows of a token may be given by token ([`GroupedRows::Tokens`]).
//!
//! # Dtypes
//! Operands share one float dtype; sums in f32.
//!
//! # Determinism
//! On the CPU a row of the result does not depend on which other rows there are, except that the gradient of a lone token
//! is summed in another order.

pub(crate) mod cpu;
mod cuda;
mod grads;
mod linear;
mod meta;
mod portable;
mod quantized;

use super::routing::Dispatch;
use crate::{Backend, Tensor};

/// The rows of an operand of a grouped product.
#[derive(Clone, Copy, Debug)]
pub enum GroupedRows<'a> {
    /// One for each selection, `[tokens · top_k, width]`, in the order of the dispatch.
    Sorted(&'a Tensor<2>),
    /// One for each token, `[tokens, width]`: a row of the dispatch reads that of its token.
    Tokens(&'a Tensor<2>),
}

impl<'a> GroupedRows<'a> {
    /// The tensor with the rows.
    pub fn tensor(self) -> &'a Tensor<2> {
        match self {
            Self::Sorted(rows) | Self::Tokens(rows) => rows,
        }
    }

    /// Another operand whose rows are those of the same selections or tokens.
    #[must_use]
    pub fn with(self, rows: &Tensor<2>) -> GroupedRows<'_> {
        match self {
            Self::Sorted(_) => GroupedRows::Sorted(rows),
            Self::Tokens(_) => GroupedRows::Tokens(rows),
        }
    }

    /// Columns of the operand.
    pub fn width(self) -> usize {
        self.tensor().dims()[1]
    }

    /// # Panics
    /// If there are not as many rows as the dispatch says.
    fn check(self, dispatch: &Dispatch) {
        match self {
            Self::Sorted(rows) => assert_eq!(rows.dims()[0], dispatch.rows(), "rows of a grouped product"),
            Self::Tokens(rows) => assert_eq!(rows.dims()[0], dispatch.tokens(), "tokens of a grouped product"),
        }
    }
}

/// Rows and columns of one expert's matrix: `[n, k]` of `[experts · n, k]`.
///
/// # Panics
/// If the rows are no multiple of the experts.
pub(crate) fn expert_dims([rows, k]: [usize; 2], dispatch: &Dispatch) -> [usize; 2] {
    let experts = dispatch.experts();
    assert!(rows.is_multiple_of(experts), "{rows} rows of the matrices of {experts} experts");
    [rows / experts, k]
}

/// y_e = x_e · W_eᵀ: `[rows, k] × [experts · n, k] → [rows, n]`.
pub fn nt(x: GroupedRows<'_>, w: &Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [n, k] = expert_dims(w.dims(), dispatch);
    check(x, k, dispatch);
    match Backend::of(w) {
        Backend::Cpu => cpu::nt(x, w.burn(), dispatch).into(),
        Backend::Portable => portable::nt(x, w.burn(), dispatch).into(),
        Backend::Cuda => cuda::nt(x, w.cuda(), dispatch).into(),
        Backend::Meta => meta::product(x, n, dispatch, |rows| meta::nt(rows, [n, k])).into(),
    }
}

/// `y` with `alpha · x_e · W_eᵀ` added to its columns from `first` on.
pub fn nt_add(
    y: Tensor<2>,
    first: usize,
    alpha: f32,
    x: GroupedRows<'_>,
    w: &Tensor<2>,
    dispatch: &Dispatch,
) -> Tensor<2> {
    let [n, k] = expert_dims(w.dims(), dispatch);
    check(x, k, dispatch);
    assert!(first + n <= y.dims()[1], "columns {first}..{} of {}", first + n, y.dims()[1]);
    match Backend::of(w) {
        Backend::Cpu => cpu::nt_add(y.into_burn(), first, alpha, x, w.burn(), dispatch).into(),
        Backend::Portable => portable::nt_add(y.into_burn(), first, alpha, x, w.burn(), dispatch).into(),
        Backend::Cuda => cuda::nt_add(y.into_cuda(), first, alpha, x, w.cuda(), dispatch).into(),
        Backend::Meta => meta::add(y.into_meta(), x, dispatch, |rows| meta::nt(rows, [n, k])).into(),
    }
}

/// dx_e = dy_e · W_e: `[rows, n] × [experts · n, k] → [rows, k]`.
pub fn nn(dy: GroupedRows<'_>, w: &Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [n, k] = expert_dims(w.dims(), dispatch);
    check(dy, n, dispatch);
    match Backend::of(w) {
        Backend::Cpu => cpu::nn(dy, w.burn(), dispatch).into(),
        Backend::Portable => portable::nn(dy, w.burn(), dispatch).into(),
        Backend::Cuda => cuda::nn(dy, w.cuda(), dispatch).into(),
        Backend::Meta => meta::product(dy, k, dispatch, |rows| meta::nn(rows, [n, k])).into(),
    }
}

/// `dx` with `alpha · dy_e · W_e` added.
pub fn nn_add(dx: Tensor<2>, alpha: f32, dy: GroupedRows<'_>, w: &Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [n, k] = expert_dims(w.dims(), dispatch);
    check(dy, n, dispatch);
    match Backend::of(w) {
        Backend::Cpu => cpu::nn_add(dx.into_burn(), alpha, dy, w.burn(), dispatch).into(),
        Backend::Portable => (dx.into_burn() + portable::nn(dy, w.burn(), dispatch) * alpha).into(),
        Backend::Cuda => cuda::nn_add(dx.into_cuda(), alpha, dy, w.cuda(), dispatch).into(),
        Backend::Meta => meta::add(dx.into_meta(), dy, dispatch, |rows| meta::nn(rows, [n, k])).into(),
    }
}

fn check(rows: GroupedRows<'_>, width: usize, dispatch: &Dispatch) {
    rows.check(dispatch);
    assert_eq!(rows.width(), width, "width of the rows of a grouped product");
}

#[cfg(test)]
mod tests;
