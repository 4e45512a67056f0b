//! Products a · bᵀ of a few rows, as in decoding: bound by reading b once.
//!
//! The `gemm` crate would copy b into another order first, or, for a single row, sum in another order. Here a tile of b is
//! turned in the first-level cache and multiplied with every row. Sums are in the crate's order for many rows: over k from
//! 0 on by fused multiply-adds, one part of at most 512 terms after another. A row therefore has the same bits whatever
//! rows are beside it, which `a_row_does_not_depend_on_how_many_there_are` holds.
//!
//! One thread of a Xeon with AVX-512, 4,096 × 1,024 weights: 1.7 ms for 1 row, 1.9 ms for 4, 2.2 ms for 8 and 3.1 ms for
//! 16. The crate takes 4.7 to 9.8 ms with two threads.
#![allow(unsafe_code)]

use rayon::prelude::*;

use super::cpu::{Mat, assert_bounds};
use crate::host::{Shared, simd};

/// The most rows that are few.
const ROWS: usize = 32;

/// Columns of the result that are computed together.
const LANES: usize = 16;

/// Terms of a tile.
const STEP: usize = 16;

/// The most terms of a part of a sum.
const DEPTH: usize = 512;

/// Below this many multiply–adds a thread costs more than it saves.
const SERIAL: usize = 64 * 64 * 64;

/// Columns that one thread takes at a time.
const PART: usize = 8 * LANES;

/// Returns whether [`product`] computes this product: a few rows or a single column, and both operands run along k.
pub(super) fn takes((m, n, k): (usize, usize, usize), a: Mat<'_>, b: Mat<'_>) -> bool {
    counts(m, n) && m > 0 && n > 0 && k > 0 && a.col_stride == 1 && b.row_stride == 1
}

/// Returns whether this many rows and columns are few. The crate would sum a single column in another order too.
pub(super) fn counts(m: usize, n: usize) -> bool {
    (m <= ROWS || n == 1) && has_fma()
}

/// Returns whether the `gemm` crate uses fused multiply-adds on this processor.
fn has_fma() -> bool {
    #[cfg(target_arch = "x86_64")]
    let has = std::arch::is_x86_feature_detected!("fma") && std::arch::is_x86_feature_detected!("avx2");
    #[cfg(not(target_arch = "x86_64"))]
    let has = cfg!(target_arch = "aarch64");
    has
}

/// `out ← beta · out + alpha · a · b`, on the threads of the pool or on this one; `beta` is 0 or 1.
pub(super) fn product(
    out: &mut [f32],
    out_stride: usize,
    (m, n, k): (usize, usize, usize),
    [beta, alpha]: [f32; 2],
    a: Mat<'_>,
    b: Mat<'_>,
    serial: bool,
) {
    assert_bounds(out, out_stride, (m, n, k), a, b);
    let out = Shared::new(out);
    let part = |first: usize| {
        simd(
            #[inline(always)]
            || {
                for column in (first..n.min(first + PART)).step_by(LANES) {
                    let weights = &b.data[column * b.col_stride as usize..];
                    let lanes = LANES.min(n - column);
                    for top in (0..m).step_by(ROWS) {
                        let a = Mat { data: &a.data[top * a.row_stride as usize..], ..a };
                        let rows = ROWS.min(m - top);
                        sums((rows, lanes, k), a, weights, b.col_stride as usize, |row, terms, is_first| {
                            let at = (top + row) * out_stride + column;
                            // SAFETY: these columns of `out` belong to this part, and the bounds were asserted above.
                            let out = unsafe { core::slice::from_raw_parts_mut(out.at(at), lanes) };
                            for (out, &sum) in out.iter_mut().zip(terms) {
                                *out = if is_first && beta == 0.0 { alpha * sum } else { alpha.mul_add(sum, *out) };
                            }
                        });
                    }
                }
            },
        );
    };
    let parts = n.div_ceil(PART);
    if serial || parts == 1 || m * n * k <= SERIAL {
        (0..parts).for_each(|i| part(i * PART));
    } else {
        (0..parts).into_par_iter().for_each(|i| part(i * PART));
    }
}

/// Computes some columns of the result, and gives `write` the sums of each row over each part of k.
#[inline(always)]
fn sums(
    (m, lanes, k): (usize, usize, usize),
    a: Mat<'_>,
    weights: &[f32],
    stride: usize,
    mut write: impl FnMut(usize, &[f32; LANES], bool),
) {
    let depth = k.div_ceil(k.div_ceil(DEPTH));
    let mut tile = [[0f32; LANES]; STEP];
    for first in (0..k).step_by(depth) {
        let last = k.min(first + depth);
        let mut sums = [[0f32; LANES]; ROWS];
        for at in (first..last).step_by(STEP) {
            let steps = STEP.min(last - at);
            turn(&mut tile, &weights[at..], stride, lanes, steps);
            let terms = |row: usize| &a.data[row * a.row_stride as usize + at..][..steps];
            let mut fours = sums[..m].chunks_exact_mut(4);
            let mut row = 0;
            for four in &mut fours {
                // Four sums at once hide the latency of the additions.
                let [mut s0, mut s1, mut s2, mut s3] = [four[0], four[1], four[2], four[3]];
                let (x0, x1, x2, x3) = (terms(row), terms(row + 1), terms(row + 2), terms(row + 3));
                for ((((w, &x0), &x1), &x2), &x3) in tile.iter().zip(x0).zip(x1).zip(x2).zip(x3) {
                    add(&mut s0, w, x0);
                    add(&mut s1, w, x1);
                    add(&mut s2, w, x2);
                    add(&mut s3, w, x3);
                }
                four.copy_from_slice(&[s0, s1, s2, s3]);
                row += 4;
            }
            for sum in fours.into_remainder() {
                let mut s = *sum;
                for (w, &x) in tile.iter().zip(terms(row)) {
                    add(&mut s, w, x);
                }
                *sum = s;
                row += 1;
            }
        }
        for (row, sum) in sums[..m].iter().enumerate() {
            write(row, sum, first == 0);
        }
    }
}

/// Puts `steps` terms of each of `lanes` weights into a tile, term by term.
#[inline(always)]
fn turn(tile: &mut [[f32; LANES]; STEP], weights: &[f32], stride: usize, lanes: usize, steps: usize) {
    if (lanes, steps) == (LANES, STEP) {
        for lane in 0..LANES {
            let row: &[f32; STEP] = weights[lane * stride..].first_chunk().expect("a whole tile");
            for (terms, &weight) in tile.iter_mut().zip(row) {
                terms[lane] = weight;
            }
        }
        return;
    }
    for lane in 0..lanes {
        for (terms, &weight) in tile.iter_mut().zip(&weights[lane * stride..][..steps]) {
            terms[lane] = weight;
        }
    }
}

/// `sum + w · x`.
#[inline(always)]
fn add(sum: &mut [f32; LANES], w: &[f32; LANES], x: f32) {
    for lane in 0..LANES {
        sum[lane] = w[lane].mul_add(x, sum[lane]);
    }
}
