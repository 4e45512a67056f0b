//! Grouped products in Burn's operations, expert by expert.

use burn::tensor::Tensor;

use super::{GroupedRows, expert_dims};
use crate::ops::matmul::Form;
use crate::ops::matmul::portable::product;
use crate::ops::routing::Dispatch;
use crate::tensor::indices;

pub(super) fn nt(x: GroupedRows<'_>, w: &Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [n, _] = expert_dims(w.dims(), dispatch);
    nt_of(x, n, |expert| matrix(w, expert, n), dispatch)
}

pub(super) fn nt_add(
    y: Tensor<2>,
    first: usize,
    alpha: f32,
    x: GroupedRows<'_>,
    w: &Tensor<2>,
    dispatch: &Dispatch,
) -> Tensor<2> {
    let ([n, _], [rows, _]) = (expert_dims(w.dims(), dispatch), y.dims());
    let columns = first..first + n;
    let sum = y.clone().narrow(1, first, n) + nt(x, w, dispatch) * alpha;
    y.slice_assign([0..rows, columns], sum)
}

pub(super) fn nn(dy: GroupedRows<'_>, w: &Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    let [n, k] = expert_dims(w.dims(), dispatch);
    nn_of(dy, k, |expert| matrix(w, expert, n), dispatch)
}

/// x_e · W_eᵀ for the matrices that `of` makes.
pub(super) fn nt_of(x: GroupedRows<'_>, n: usize, of: impl Fn(usize) -> Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    by_expert(x, n, dispatch, |expert, x| product(&x, &of(expert), Form::Nt))
}

/// dy_e · W_e for the matrices that `of` makes.
pub(super) fn nn_of(dy: GroupedRows<'_>, k: usize, of: impl Fn(usize) -> Tensor<2>, dispatch: &Dispatch) -> Tensor<2> {
    by_expert(dy, k, dispatch, |expert, dy| product(&dy, &of(expert), Form::Nn))
}

/// dy_eᵀ · x_e of all experts, `[experts · n, k]`.
pub(super) fn tn(dy: GroupedRows<'_>, x: GroupedRows<'_>, dispatch: &Dispatch) -> Tensor<2> {
    let (n, k) = (dy.width(), x.width());
    let like = x.tensor().burn();
    let grad = |expert: usize| match (rows(dy, expert, dispatch), rows(x, expert, dispatch)) {
        (Some(dy), Some(x)) => product(&dy, &x, Form::Tn),
        _ => Tensor::zeros([n, k], (&like.device(), like.dtype())),
    };
    Tensor::cat((0..dispatch.experts()).map(grad).collect(), 0)
}

fn matrix(w: &Tensor<2>, expert: usize, n: usize) -> Tensor<2> {
    w.clone().narrow(0, expert * n, n)
}

/// The results of `f` for the rows of every expert that has some, one below another.
fn by_expert(
    x: GroupedRows<'_>,
    width: usize,
    dispatch: &Dispatch,
    f: impl Fn(usize, Tensor<2>) -> Tensor<2>,
) -> Tensor<2> {
    let like = x.tensor().burn();
    let of = |expert: usize| rows(x, expert, dispatch).map(|x| f(expert, x));
    let parts: Vec<Tensor<2>> = (0..dispatch.experts()).filter_map(of).collect();
    if parts.is_empty() {
        return Tensor::zeros([0, width], (&like.device(), like.dtype()));
    }
    Tensor::cat(parts, 0)
}

/// The rows of an expert, if it has any.
fn rows(x: GroupedRows<'_>, expert: usize, dispatch: &Dispatch) -> Option<Tensor<2>> {
    let host = dispatch.host();
    let range = host.range(expert);
    let x = match x {
        _ if range.is_empty() => return None,
        GroupedRows::Sorted(x) => x.burn().clone().narrow(0, range.start, range.len()),
        GroupedRows::Tokens(x) => {
            let tokens = host.sorted[range].iter().map(|&selection| selection as usize / dispatch.top_k());
            x.burn().clone().select(0, indices(tokens, x.burn()))
        }
    };
    Some(x)
}
