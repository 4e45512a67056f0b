//! Products of at most [`MOST`] rows with a weight (`few_rows.cu`), and of twice as many with a weight of few rows
//! (`narrow.cu`).

use crate::runtime::op::{blocks, check_dims, int};
use crate::runtime::{Array, DType, Form, MemoryUse, args, entry};

/// Rows that the kernel takes. cuBLASLt is as fast from 16 on.
const MOST: usize = 8;

/// Rows of W that a block of threads computes.
const TILE: usize = 16;

/// Columns of the result from which blocks have four warps and not eight: those of a vocabulary.
const WIDE: usize = 32_768;

/// Rows of x, and rows and columns of W, of a product with a weight of few rows.
const NARROW_MOST: usize = 16;
const NARROW_ROWS: usize = 256;
const NARROW_COLUMNS: usize = 512;

/// Returns true if a kernel computes this product, with a result of the operands' dtype; `alone` without a bias or a sum.
pub(super) fn takes(x: &Array, w: &Array, form: Form, alone: bool) -> bool {
    form == Form::Nt
        && ((1..=MOST).contains(&x.rows()) || alone && is_narrow(x, w))
        && x.dtype() != DType::F32
        && x.cols().is_multiple_of(8)
        && x.is_aligned()
        && w.is_aligned()
}

/// Returns true if `narrow.cu` computes the product of x and W. Such a weight is an adapter's A, of which a
/// block of `few_rows.cu` would read 16 rows alone.
fn is_narrow(x: &Array, w: &Array) -> bool {
    x.cuda().props().major >= 9
        && (1..=NARROW_MOST).contains(&x.rows())
        && w.rows() <= NARROW_ROWS
        && w.cols() >= NARROW_COLUMNS
}

/// `y = x · wᵀ` for a weight of few rows.
fn narrow(y: &Array, x: &Array, w: &Array, frozen: bool) {
    let ([m, k], n) = (x.dims(), w.rows());
    let groups = if m <= 8 { "1" } else { "2" };
    let defines = [("T", x.dtype().name()), ("GROUPS", groups), ("WARPS", "8")];
    x.cuda().kernel(entry!("narrow.cu", "narrow"), &defines).early().launch(
        [blocks(n.div_ceil(TILE)), 8, 1],
        [256, 1, 1],
        0,
        args![
            x.ptr(),
            w.ptr(),
            y.ptr(),
            int(m),
            int(n),
            int(k),
            int(x.ld()),
            int(w.ld()),
            int(y.ld()),
            i32::from(frozen)
        ],
    );
}

/// `y = x · wᵀ + bias + onto`; y may be `onto`.
pub(super) fn linear(y: &Array, x: &Array, w: &Array, bias: Option<&Array>, onto: Option<&Array>) {
    let ([m, k], n, dtype) = (x.dims(), w.rows(), x.dtype());
    check_dims("the result", y, [m, n]);
    assert!([w, y].into_iter().chain(bias).chain(onto).all(|array| array.dtype() == dtype), "dtypes of the product");
    // Weights that stay what they are can be read before the kernel before this one has ended.
    let frozen = matches!(w.usage(), MemoryUse::Weights | MemoryUse::FusedWeights);
    if bias.is_none() && onto.is_none() && is_narrow(x, w) {
        return narrow(y, x, w, frozen);
    }
    let (warps, threads) = if n >= WIDE { ("4", 128) } else { ("8", 256) };
    let kernel =
        x.cuda().kernel(entry!("few_rows.cu", "few_rows"), &[("T", dtype.name()), ("WARPS", warps), ("GROUPS", "1")]);
    let [bias, onto_ptr] = [bias, onto].map(|array| array.map_or(0, Array::ptr));
    kernel.early().launch(
        [blocks(n.div_ceil(TILE)), 1, 1],
        [threads, 1, 1],
        0,
        args![
            x.ptr(),
            w.ptr(),
            bias,
            onto_ptr,
            y.ptr(),
            int(m),
            int(n),
            int(k),
            int(x.ld()),
            int(w.ld()),
            int(onto.map_or(0, Array::ld)),
            int(y.ld()),
            i32::from(frozen)
        ],
    );
}
