//! The part of an adapter's factors in products of a few rows of x; see `add_factors.cu`.

use super::few_rows;
use crate::runtime::op::{blocks, check_dims, int};
use crate::runtime::{Array, DType, Form, Gemm, MemoryUse, args, entry};

/// The most rows that are few.
const MOST: usize = 64;

/// Columns of the result that a block of threads computes.
const COLUMNS: usize = 128;

/// Bias and sum of a product.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Addends<'a> {
    /// `[1, out]`.
    pub(crate) bias: Option<&'a Array>,
    /// `[m, out]`.
    pub(crate) onto: Option<&'a Array>,
}

/// Returns true if [`add`] takes a result of `out` columns for x.
pub(crate) fn takes(x: &Array, out: usize, addends: Addends<'_>) -> bool {
    let fits = |array: &Array| array.dtype() == x.dtype() && array.is_aligned();
    (1..=MOST).contains(&x.rows())
        && x.dtype() != DType::F32
        && out.is_multiple_of(8)
        && addends.bias.into_iter().chain(addends.onto).all(fits)
}

/// Returns `([x, x·Aᵀ]·[W, S]ᵀ + bias + onto, x·Aᵀ)` for `whole`, \[\[W, S\], \[A, 0\]\] with `out` rows of W; `None` for
/// operands that are not a few aligned rows.
///
/// A is multiplied with W, as rows below it; x·Aᵀ then lies behind the result, to which its product with Sᵀ is added. The
/// product with A by itself would be too small for the GPU.
pub(crate) fn product(whole: &Array, out: usize, x: &Array, addends: Addends<'_>) -> Option<(Array, Array)> {
    let ([m, k], rank) = (x.dims(), whole.rows() - out);
    if !(takes(x, out, addends) && k.is_multiple_of(8) && x.is_aligned() && whole.is_aligned()) {
        return None;
    }
    let both = Array::empty(x.cuda(), [m, out + rank], x.dtype(), MemoryUse::Activations);
    let below = whole.columns(0, k);
    if few_rows::takes(x, &below, Form::Nt, true) {
        few_rows::linear(&both, x, &below, None, None);
    } else {
        x.cuda().gemm(&Gemm::new(Form::Nt, [m, out + rank, k], x.operand(), below.operand(), both.operand()));
    }
    let (y, xa) = (both.columns(0, out), both.columns(out, rank));
    add(&y, &xa, &whole.row_range(0, out).columns(k, rank), addends);
    Some((y, xa))
}

/// `y ← y + xa·sᵀ + bias + onto`, for operands that [`takes`] returns true for; S may only change before the kernel before
/// this one.
pub(crate) fn add(y: &Array, xa: &Array, s: &Array, Addends { bias, onto }: Addends<'_>) {
    let ([m, rank], n) = (xa.dims(), s.rows());
    check_dims("the result", y, [m, n]);
    onto.into_iter().for_each(|onto| check_dims("the sum", onto, [m, n]));
    let groups = ["1", "2", "4", "8"][m.div_ceil(8).next_power_of_two().ilog2() as usize];
    let defines = [("T", y.dtype().name()), ("WARPS", "8"), ("GROUPS", groups)];
    y.cuda().kernel(entry!("add_factors.cu", "add_factors"), &defines).early().launch(
        [blocks(n.div_ceil(COLUMNS)), 1, 1],
        [256, 1, 1],
        0,
        args![
            xa.ptr(),
            s.ptr(),
            bias.map_or(0, Array::ptr),
            onto.map_or(0, Array::ptr),
            y.ptr(),
            int(m),
            int(n),
            int(rank),
            int(xa.ld()),
            int(s.ld()),
            int(onto.map_or(0, Array::ld)),
            int(y.ld())
        ],
    );
}
