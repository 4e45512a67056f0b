//! Products through the `gemm` crate, split over threads by rows or columns of the result.
#![allow(unsafe_code)]

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{Form, few_rows};
use crate::host::{Shared, View, from_vec, into_vec};

/// A matrix in a slice.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row_stride: isize,
    pub(crate) col_stride: isize,
}

impl<'a> Mat<'a> {
    /// Row-major with `row_stride` elements from row to row.
    pub(crate) fn rows(data: &'a [f32], row_stride: usize) -> Self {
        Self { data, row_stride: row_stride as isize, col_stride: 1 }
    }

    /// The same matrix read transposed.
    pub(crate) fn t(self) -> Self {
        Self { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    fn assert_holds(&self, rows: usize, cols: usize) {
        assert!(self.row_stride >= 0 && self.col_stride >= 0, "strides run forward");
        if rows > 0 && cols > 0 {
            let last = (rows - 1) * self.row_stride as usize + (cols - 1) * self.col_stride as usize;
            assert!(last < self.data.len(), "operand of {rows} × {cols} leaves its slice of {}", self.data.len());
        }
    }
}

/// `a · b` in the given form, as a new tensor.
pub(crate) fn product(a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    let (m, n, _) = form.sizes(a.dims(), b.dims());
    let mut out = vec![0.0; m * n];
    into_slice(&mut out, 0.0, 1.0, a, b, form);
    from_vec(out, [m, n])
}

/// `y + alpha · a · b`, in `y`'s own memory when nothing else holds it.
pub(crate) fn product_add(y: Tensor<2>, alpha: f32, a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    let shape = y.dims();
    let mut out = into_vec(y);
    into_slice(&mut out, 1.0, alpha, a, b, form);
    from_vec(out, shape)
}

/// `out ← beta · out + alpha · a · b`, `out` row-major; `beta` is 0 or 1.
pub(crate) fn into_slice(out: &mut [f32], beta: f32, alpha: f32, a: &Tensor<2>, b: &Tensor<2>, form: Form) {
    let (m, n, k) = form.sizes(a.dims(), b.dims());
    assert_eq!(out.len(), m * n, "result of {m} × {n}");
    let (va, vb) = (View::strided(a), View::strided(b));
    let mat = |v: (&[f32], isize, isize)| (v.1, v.2);
    let ((ars, acs), (brs, bcs)) = (mat(va.matrix()), mat(vb.matrix()));
    let a = Mat { data: va.matrix().0, row_stride: ars, col_stride: acs };
    let b = Mat { data: vb.matrix().0, row_stride: brs, col_stride: bcs };
    let a = if form == Form::Tn { a.t() } else { a };
    let b = if form == Form::Nt { b.t() } else { b };
    into_strided(out, n, (m, n, k), beta, alpha, a, b);
}

/// `out ← beta · out + alpha · a · b` with `out_stride` elements from row to row of `out`; `beta` is 0 or 1.
pub(crate) fn into_strided(
    out: &mut [f32],
    out_stride: usize,
    sizes: (usize, usize, usize),
    beta: f32,
    alpha: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    if few_rows::takes(sizes, a, b) {
        return few_rows::product(out, out_stride, sizes, [beta, alpha], a, b, false);
    }
    in_stable_order(sizes, a, b, |b| parallel(out, out_stride, sizes, beta, alpha, a, b));
}

/// Computes [`into_strided`] on one thread, with sums in the same order.
pub(crate) fn into_strided_serial(
    out: &mut [f32],
    out_stride: usize,
    sizes: (usize, usize, usize),
    beta: f32,
    alpha: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    if few_rows::takes(sizes, a, b) {
        return few_rows::product(out, out_stride, sizes, [beta, alpha], a, b, true);
    }
    in_stable_order(sizes, a, b, |b| gemm(out, out_stride, sizes, beta, alpha, a, b));
}

/// Calls `multiply` with b or, if [`sums_by_lanes`], with a copy of b that runs along n.
fn in_stable_order(sizes: (usize, usize, usize), a: Mat<'_>, b: Mat<'_>, multiply: impl FnOnce(Mat<'_>)) {
    if !sums_by_lanes(sizes, a, b) {
        return multiply(b);
    }
    let (_, n, k) = sizes;
    let copy: Vec<f32> = (0..k * n).map(|i| b.data[i / n + i % n * b.col_stride as usize]).collect();
    multiply(Mat::rows(&copy, n));
}

/// Returns true if the `gemm` crate would sum this product in another order than larger ones: few results of operands that
/// both run along k are dot products over SIMD lanes. A token's result would then depend on the number of tokens in the
/// product; with a b that runs along n it does not.
fn sums_by_lanes(sizes: (usize, usize, usize), a: Mat<'_>, b: Mat<'_>) -> bool {
    a.col_stride == 1 && b.row_stride == 1 && has_few_results(sizes)
}

/// Returns whether a part of the product has so few results that the `gemm` crate may compute dot products.
fn has_few_results(sizes: (usize, usize, usize)) -> bool {
    let (m, n, _) = sizes;
    let smallest = match split(sizes) {
        None => m * n,
        Some(Split { by_rows, length, part }) => {
            let tail = length - (length.div_ceil(part) - 1) * part;
            tail * if by_rows { n } else { m }
        }
    };
    m > 1 && n > 1 && smallest <= 256
}

/// The split of a product over threads: `length` rows or columns of the result, `part` for each.
struct Split {
    by_rows: bool,
    length: usize,
    part: usize,
}

/// `None` where one thread is enough.
fn split((m, n, k): (usize, usize, usize)) -> Option<Split> {
    /// Below this many multiply–adds a thread costs more than it saves.
    const SERIAL: usize = 64 * 64 * 64;
    /// The unit of a split: a multiple of every microkernel's tile.
    const TILE: usize = 48;
    let threads = rayon::current_num_threads();
    let by_rows = m >= n;
    let length = if by_rows { m } else { n };
    let mut part = length.div_ceil(threads).next_multiple_of(TILE);
    // A single row or column left over would be a matrix–vector product, which is summed in another order.
    while length % part == 1 && length > 1 {
        part += TILE;
    }
    (threads > 1 && m * n * k > SERIAL).then_some(Split { by_rows, length, part })
}

/// Bytes of scratch memory that [`into_slice`] takes for operands without gaps.
pub(crate) fn scratch((m, n, k): (usize, usize, usize), form: Form) -> usize {
    if form == Form::Nt && few_rows::counts(m, n) {
        return 0;
    }
    let turned = form == Form::Nt && has_few_results((m, n, k));
    let parts = |m, n| packed((m, n, k), form != Form::Tn, form != Form::Nt || turned);
    let packed = match split((m, n, k)) {
        None => parts(m, n),
        Some(Split { by_rows, length, part }) => {
            let count = length.div_ceil(part).min(rayon::current_num_threads());
            count * if by_rows { parts(part.min(m), n) } else { parts(m, part.min(n)) }
        }
    };
    size_of::<f32>() * (packed + if turned { k * n } else { 0 })
}

/// Bytes of scratch memory that [`into_strided_serial`] takes at most, for operands without gaps.
pub(crate) fn scratch_serial((m, n, k): (usize, usize, usize), form: Form) -> usize {
    if form == Form::Nt && few_rows::counts(m, n) {
        return 0;
    }
    let turned = form == Form::Nt && has_few_results((m, n, k));
    let packed = packed((m, n, k), form != Form::Tn, form != Form::Nt || turned);
    size_of::<f32>() * (packed + if turned { k * n } else { 0 })
}

/// Elements that one call of the `gemm` crate copies into its own order, by its rules: of a, whether it runs along k;
/// of b, whether it runs along n.
pub(crate) fn packed((m, n, k): (usize, usize, usize), a_along_k: bool, b_along_n: bool) -> usize {
    /// Terms of the sums that are packed at a time.
    const DEPTH: usize = 512;
    // Lanes of a register, and columns of a microkernel.
    let (lanes, tile) = if has_avx512() { (16, 64) } else { (8, 16) };
    let depth = k.div_ceil(k.div_ceil(DEPTH).max(1));
    let a = if n > if a_along_k { 128 * tile } else { 2 * tile } { m } else { 0 };
    let b = if n <= 16 * tile && (!b_along_n || !n.is_multiple_of(lanes)) { n.next_multiple_of(tile) } else { 0 };
    if m.min(n) <= 1 { 0 } else { depth * (a + b) }
}

/// Returns whether the `gemm` crate computes with AVX-512.
fn has_avx512() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("avx512f");
    #[cfg(not(target_arch = "x86_64"))]
    let has = false;
    has
}

/// Computes [`gemm`], split over the threads of the pool.
pub(crate) fn parallel(
    out: &mut [f32],
    out_stride: usize,
    (m, n, k): (usize, usize, usize),
    beta: f32,
    alpha: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    let Some(Split { by_rows, length, part }) = split((m, n, k)) else {
        return gemm(out, out_stride, (m, n, k), beta, alpha, a, b);
    };
    assert_bounds(out, out_stride, (m, n, k), a, b);
    let target = Shared::new(out);
    (0..length.div_ceil(part)).into_par_iter().for_each(|i| {
        let (start, size) = (i * part, part.min(length - i * part));
        let skip = |mat: Mat<'_>, by: isize| mat.data.as_ptr().wrapping_offset(start as isize * by);
        let (pa, pb, offset, m, n) = if by_rows {
            (skip(a, a.row_stride), b.data.as_ptr(), start * out_stride, size, n)
        } else {
            (a.data.as_ptr(), skip(b, b.col_stride), start, m, size)
        };
        // SAFETY: parts are disjoint rows or columns of `out`; the bounds of the whole product were asserted above.
        unsafe { raw(target.at(offset), out_stride, (m, n, k), beta, alpha, (pa, a), (pb, b)) }
    });
}

/// `out ← beta · out + alpha · a · b` on one thread; `out` has `out_stride` elements from row to row.
pub(crate) fn gemm(
    out: &mut [f32],
    out_stride: usize,
    (m, n, k): (usize, usize, usize),
    beta: f32,
    alpha: f32,
    a: Mat<'_>,
    b: Mat<'_>,
) {
    assert_bounds(out, out_stride, (m, n, k), a, b);
    // SAFETY: the assertions above.
    unsafe {
        raw(out.as_mut_ptr(), out_stride, (m, n, k), beta, alpha, (a.data.as_ptr(), a), (b.data.as_ptr(), b));
    }
}

pub(super) fn assert_bounds(out: &[f32], out_stride: usize, (m, n, k): (usize, usize, usize), a: Mat<'_>, b: Mat<'_>) {
    Mat::rows(out, out_stride).assert_holds(m, n);
    a.assert_holds(m, k);
    b.assert_holds(k, n);
}

/// # Safety
/// The three matrices of the given sizes and strides lie within their allocations, and `out` is not shared.
unsafe fn raw(
    out: *mut f32,
    out_stride: usize,
    (m, n, k): (usize, usize, usize),
    beta: f32,
    alpha: f32,
    (pa, a): (*const f32, Mat<'_>),
    (pb, b): (*const f32, Mat<'_>),
) {
    // SAFETY: the caller's promise. The crate calls the factor of the old value alpha, of the product beta.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out,
            1,
            out_stride as isize,
            beta != 0.0,
            pa,
            a.col_stride,
            a.row_stride,
            pb,
            b.col_stride,
            b.row_stride,
            beta,
            alpha,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use crate::{Device, from_f32, matmul, to_f32};
    use burn::tensor::DType;

    /// Packing and micro-batches rely on it: a row of the result is the same whatever rows are beside it.
    #[test]
    fn a_row_does_not_depend_on_how_many_there_are() {
        let matrix = |rows: usize, cols: usize| {
            let values = (0..rows * cols).map(|i| ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5).collect();
            from_f32(values, [rows, cols], &Device::cpu(), DType::F32)
        };
        for (out, input) in [(1, 40), (4, 40), (28, 40), (96, 40), (40, 52), (48, 1024), (300, 64)] {
            let (x, w) = (matrix(210, input), matrix(out, input));
            let whole = to_f32(matmul::nt(&x, &w));
            // 49 and 97 rows leave a thread with a single one.
            for rows in [1, 2, 7, 19, 48, 49, 97] {
                let part = to_f32(matmul::nt(&x.rows(50, rows), &w));
                assert_eq!(part, whole[50 * out..][..rows * out], "{rows} rows of {input}, {out} wide");
            }
        }
    }
}
