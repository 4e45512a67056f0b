//! Grouped products through the `gemm` crate, expert by expert.
//!
//! With many more experts than threads each is one thread's; otherwise the experts come one after another and each
//! product is split over the threads. The sums are the same either way.

use core::ops::Range;

use burn::tensor::Tensor as BurnTensor;
use rayon::prelude::*;

use super::{GroupedRows, expert_dims};
use crate::host::{View, from_vec, into_vec};
use crate::ops::matmul::cpu::{Mat, into_strided, into_strided_serial};
use crate::ops::routing::{Dispatch, HostDispatch};
use crate::params::quantized::QuantizedData;
use crate::params::quantized::cpu::decode_rows;

/// Elements of a quantized matrix that are decoded at a time: 2 MiB of `f32`.
const DECODED: usize = 512 * 1024;

/// A product `out ← beta · out + alpha · a · b`, on one thread or on all.
type Gemm = fn(&mut [f32], usize, (usize, usize, usize), f32, f32, Mat<'_>, Mat<'_>);

pub(super) fn nt(x: GroupedRows<'_>, w: &BurnTensor<2>, dispatch: &Dispatch) -> BurnTensor<2> {
    let [n, k] = expert_dims(w.dims(), dispatch);
    let w = View::of(w);
    let w = w.as_slice();
    let mut y = vec![0.0; dispatch.rows() * n];
    products(&mut y, n, x, dispatch, |gemm, expert, rows, x, y| {
        gemm(y, n, (rows, n, k), 0.0, 1.0, x, matrix(w, expert, [n, k]).t());
    });
    from_vec(y, [dispatch.rows(), n])
}

pub(super) fn nt_add(
    y: BurnTensor<2>,
    first: usize,
    alpha: f32,
    x: GroupedRows<'_>,
    w: &BurnTensor<2>,
    dispatch: &Dispatch,
) -> BurnTensor<2> {
    let [n, k] = expert_dims(w.dims(), dispatch);
    let shape @ [_, width] = y.dims();
    let w = View::of(w);
    let w = w.as_slice();
    let mut y = into_vec(y);
    products(&mut y, width, x, dispatch, |gemm, expert, rows, x, y| {
        gemm(&mut y[first..], width, (rows, n, k), 1.0, alpha, x, matrix(w, expert, [n, k]).t());
    });
    from_vec(y, shape)
}

pub(super) fn nn(dy: GroupedRows<'_>, w: &BurnTensor<2>, dispatch: &Dispatch) -> BurnTensor<2> {
    let [_, k] = w.dims();
    let dx = from_vec(vec![0.0; dispatch.rows() * k], [dispatch.rows(), k]);
    nn_onto(dx, 0.0, 1.0, dy, w, dispatch)
}

pub(super) fn nn_add(
    dx: BurnTensor<2>,
    alpha: f32,
    dy: GroupedRows<'_>,
    w: &BurnTensor<2>,
    dispatch: &Dispatch,
) -> BurnTensor<2> {
    nn_onto(dx, 1.0, alpha, dy, w, dispatch)
}

fn nn_onto(
    dx: BurnTensor<2>,
    beta: f32,
    alpha: f32,
    dy: GroupedRows<'_>,
    w: &BurnTensor<2>,
    dispatch: &Dispatch,
) -> BurnTensor<2> {
    let [n, k] = expert_dims(w.dims(), dispatch);
    let shape = dx.dims();
    let w = View::of(w);
    let w = w.as_slice();
    let mut dx = into_vec(dx);
    products(&mut dx, k, dy, dispatch, |gemm, expert, rows, dy, dx| {
        gemm(dx, k, (rows, k, n), beta, alpha, dy, matrix(w, expert, [n, k]));
    });
    from_vec(dx, shape)
}

/// The product of `x` with decoded matrices.
pub(super) fn quantized_nt(x: GroupedRows<'_>, codes: &QuantizedData, dispatch: &Dispatch) -> BurnTensor<2> {
    let [n, k] = expert_dims(codes.dims, dispatch);
    let mut y = vec![0.0; dispatch.rows() * n];
    one_by_one(&mut y, n, x, dispatch, |expert, rows, x, y| {
        decoded(codes, expert, [n, k], |part, w| {
            let sizes = (rows, part.len(), k);
            into_strided(&mut y[part.start..], n, sizes, 0.0, 1.0, x, Mat::rows(w, k).t());
        });
    });
    from_vec(y, [dispatch.rows(), n])
}

/// The product of `dy` with decoded matrices, added to `dx` if there is one.
pub(super) fn quantized_nn(
    dy: GroupedRows<'_>,
    codes: &QuantizedData,
    dx: Option<BurnTensor<2>>,
    dispatch: &Dispatch,
) -> BurnTensor<2> {
    let [n, k] = expert_dims(codes.dims, dispatch);
    let mut dx = dx.map_or_else(|| vec![0.0; dispatch.rows() * k], into_vec);
    one_by_one(&mut dx, k, dy, dispatch, |expert, rows, dy, dx| {
        decoded(codes, expert, [n, k], |part, w| {
            let column = part.start * dy.col_stride.unsigned_abs();
            let part_of_dy = Mat { data: &dy.data[column..], ..dy };
            into_strided(dx, k, (rows, k, part.len()), 1.0, 1.0, part_of_dy, Mat::rows(w, k));
        });
    });
    from_vec(dx, [dispatch.rows(), k])
}

/// Adds the gradients of all experts' matrices to `grad`, `[experts · n, k]`.
pub(super) fn add_tn(grad: &mut [f32], alpha: f32, dy: GroupedRows<'_>, x: GroupedRows<'_>, dispatch: &Dispatch) {
    let [n, k] = [dy.width(), x.width()];
    let (dy, x) = (Operand::of(dy, dispatch), Operand::of(x, dispatch));
    let host = dispatch.host();
    let add = |gemm: Gemm, expert: usize, grad: &mut [f32]| {
        let range = host.range(expert);
        let rows = range.len();
        if rows > 0 {
            dy.with_rows(range.clone(), rows, |dy| {
                x.with_rows(range, rows, |x| gemm(grad, k, (n, k, rows), 1.0, alpha, dy.t(), x));
            });
        }
    };
    if each_on_one_thread(host) {
        let parts = grad.par_chunks_mut(n * k).enumerate();
        parts.for_each(|(expert, grad)| add(into_strided_serial, expert, grad));
    } else {
        grad.chunks_mut(n * k).enumerate().for_each(|(expert, grad)| add(into_strided, expert, grad));
    }
}

/// The matrix of one expert.
fn matrix(w: &[f32], expert: usize, [n, k]: [usize; 2]) -> Mat<'_> {
    Mat::rows(&w[expert * n * k..][..n * k], k)
}

/// Returns whether there are so many experts with rows that each is computed by one thread.
fn each_on_one_thread(dispatch: &HostDispatch) -> bool {
    let active = dispatch.offsets.windows(2).filter(|ends| ends[0] < ends[1]).count();
    is_many(active)
}

/// [`each_on_one_thread`] for a number of experts with rows.
pub(super) fn is_many(active: usize) -> bool {
    active >= 4 * rayon::current_num_threads()
}

/// Rows of a quantized matrix that are decoded at a time.
pub(super) fn decoded_rows([n, k]: [usize; 2]) -> usize {
    (DECODED / k.max(1)).clamp(1, n.max(1))
}

/// Calls `f(rows, values)` for all rows of an expert's matrix, some at a time.
fn decoded(codes: &QuantizedData, expert: usize, dims @ [n, k]: [usize; 2], mut f: impl FnMut(Range<usize>, &[f32])) {
    let step = decoded_rows(dims);
    let mut scratch = vec![0.0; step * k];
    for first in (0..n).step_by(step) {
        let part = first..n.min(first + step);
        let values = &mut scratch[..part.len() * k];
        decode_rows(codes, expert * n + part.start..expert * n + part.end, values);
        f(part, values);
    }
}

/// Calls `multiply(gemm, expert, rows, x, out)` for every expert with rows; `out` are its rows, `width` wide.
fn products(
    out: &mut [f32],
    width: usize,
    x: GroupedRows<'_>,
    dispatch: &Dispatch,
    multiply: impl Fn(Gemm, usize, usize, Mat<'_>, &mut [f32]) + Sync,
) {
    if !each_on_one_thread(dispatch.host()) {
        return one_by_one(out, width, x, dispatch, |expert, rows, x, out| {
            multiply(into_strided, expert, rows, x, out)
        });
    }
    let x = Operand::of(x, dispatch);
    let work: Vec<_> = by_expert(out, width, dispatch.host()).collect();
    work.into_par_iter().for_each(|(expert, range, out)| {
        x.multiply(range, width, out, |rows, x, out| multiply(into_strided_serial, expert, rows, x, out));
    });
}

/// Calls `multiply(expert, rows, x, out)` for one expert with rows after another.
fn one_by_one(
    out: &mut [f32],
    width: usize,
    x: GroupedRows<'_>,
    dispatch: &Dispatch,
    multiply: impl Fn(usize, usize, Mat<'_>, &mut [f32]),
) {
    let x = Operand::of(x, dispatch);
    for (expert, range, out) in by_expert(out, width, dispatch.host()) {
        x.multiply(range, width, out, |rows, x, out| multiply(expert, rows, x, out));
    }
}

/// Every expert with rows, and its rows of `out`.
fn by_expert<'a>(
    mut out: &'a mut [f32],
    width: usize,
    dispatch: &'a HostDispatch,
) -> impl Iterator<Item = (usize, Range<usize>, &'a mut [f32])> {
    let experts = (0..dispatch.offsets.len() - 1).map(|expert| (expert, dispatch.range(expert)));
    experts.filter(|(_, range)| !range.is_empty()).map(move |(expert, range)| {
        let (own, rest) = core::mem::take(&mut out).split_at_mut(range.len() * width);
        out = rest;
        (expert, range, own)
    })
}

/// An operand whose rows are found through the dispatch.
struct Operand<'a> {
    view: View,
    width: usize,
    /// The dispatch, where rows are those of tokens.
    tokens: Option<&'a Dispatch>,
    /// True if there is one token, whose rows have none to agree with.
    is_alone: bool,
}

impl<'a> Operand<'a> {
    fn of(rows: GroupedRows<'_>, dispatch: &'a Dispatch) -> Self {
        let tokens = matches!(rows, GroupedRows::Tokens(_)).then_some(dispatch);
        let view = View::strided(rows.tensor().burn());
        Self { view, width: rows.width(), tokens, is_alone: dispatch.tokens() == 1 }
    }

    /// Calls `f` with the rows of an expert; the last one again until there are `count`.
    fn with_rows(&self, range: Range<usize>, count: usize, f: impl FnOnce(Mat<'_>)) {
        let (data, row_stride, col_stride) = self.view.matrix();
        let stride = row_stride.unsigned_abs();
        if self.tokens.is_none() && count == range.len() {
            return f(Mat { data: &data[range.start * stride..], row_stride, col_stride });
        }
        let mut gathered = Vec::with_capacity(count * self.width);
        for row in range.clone().chain(core::iter::repeat(range.end - 1)).take(count) {
            let row = self.tokens.map_or(row, |dispatch| dispatch.host().sorted[row] as usize / dispatch.top_k());
            let row = &data[row * stride..];
            match col_stride {
                1 => gathered.extend_from_slice(&row[..self.width]),
                _ => gathered.extend((0..self.width).map(|column| row[column * col_stride.unsigned_abs()])),
            }
        }
        f(Mat::rows(&gathered, self.width));
    }

    /// Calls `multiply(rows, x, out)` with an expert's rows. A single row would be a matrix–vector product, which is
    /// summed in another order, so it is computed twice: its sums are then those of a row among others.
    fn multiply(
        &self,
        range: Range<usize>,
        width: usize,
        out: &mut [f32],
        multiply: impl FnOnce(usize, Mat<'_>, &mut [f32]),
    ) {
        if range.len() > 1 || self.is_alone {
            let rows = range.len();
            return self.with_rows(range, rows, |x| multiply(rows, x, out));
        }
        let mut twice = [&*out, &*out].concat();
        self.with_rows(range, 2, |x| multiply(2, x, &mut twice));
        out.copy_from_slice(&twice[..width]);
    }
}
