//! Products of at most [`MOST`] rows with a weight; see `few_rows.cu`.

use crate::runtime::op::{blocks, check_dims, int};
use crate::runtime::{Array, DType, Form, MemoryUse, args, entry};

/// Rows that the kernel takes. cuBLASLt is as fast from 16 on.
const MOST: usize = 8;

/// Rows of W that a block of threads computes.
const TILE: usize = 16;

/// Columns of the result from which blocks have four warps and not eight: those of a vocabulary.
const WIDE: usize = 32_768;

/// Returns true if the kernel computes this product, with a result of the operands' dtype.
pub(super) fn takes(x: &Array, w: &Array, form: Form) -> bool {
    form == Form::Nt
        && (1..=MOST).contains(&x.rows())
        && x.dtype() != DType::F32
        && x.cols().is_multiple_of(8)
        && x.is_aligned()
        && w.is_aligned()
}

/// `y = x · wᵀ + bias + onto`; y may be `onto`.
pub(super) fn linear(y: &Array, x: &Array, w: &Array, bias: Option<&Array>, onto: Option<&Array>) {
    let ([m, k], n, dtype) = (x.dims(), w.rows(), x.dtype());
    check_dims("the result", y, [m, n]);
    assert!([w, y].into_iter().chain(bias).chain(onto).all(|array| array.dtype() == dtype), "dtypes of the product");
    // Weights that stay what they are can be read before the kernel before this one has ended.
    let frozen = matches!(w.usage(), MemoryUse::Weights | MemoryUse::FusedWeights);
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
