//! Adds an adapter to its base weight.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use crate::LoraFactors;
use crate::dora::norm::norm;

/// Rows of a task: enough that a tile of A, read once, is reused from the L1 cache.
const ROWS: usize = 16;

/// Computes W += s·B·A in place or, with DoRA's magnitude m, W = m / ‖W + s·B·A‖ · (W + s·B·A), row by row.
///
/// # Shapes
/// W `[out, in]` row-major, A `[r, in]`, B `[out, r]`, m `[out]`; ‖·‖ is the norm of a row.
///
/// # Dtypes
/// All in `f32`; a row's norm is summed in `f64`. Each element is rounded once by the sum over r, once by its addition to
/// W and, with m, once more. The caller rounds to 16 bits if it needs to.
///
/// A row of norm zero stays zero. No memory is allocated.
///
/// Equal to PEFT's `merge` for one adapter, LoRA or DoRA (arXiv:2402.09353 §4).
///
/// # Panics
/// If a slice's length is not that of its shape.
pub fn merge(w: &mut [f32], [out, input]: [usize; 2], factors: &LoraFactors, scale: f64, magnitude: Option<&[f32]>) {
    assert_shape(factors, [out, input]);
    assert_eq!(w.len(), out * input, "W is [{out}, {input}]");
    assert!(magnitude.is_none_or(|m| m.len() == out), "the magnitude is [{out}]");
    if input == 0 {
        return;
    }
    w.par_chunks_mut(ROWS * input).enumerate().for_each(|(chunk, rows)| {
        let first = chunk * ROWS;
        add_product(rows, input, factors, first, scale);
        if let Some(magnitude) = magnitude {
            for (row, m) in rows.chunks_exact_mut(input).zip(&magnitude[first..]) {
                let length = norm(row);
                let factor = if length > 0.0 { (f64::from(*m) / length) as f32 } else { 0.0 };
                row.iter_mut().for_each(|w| *w *= factor);
            }
        }
    });
}

/// Panics unless A is `[r, in]` and B `[out, r]`.
pub(crate) fn assert_shape(factors: &LoraFactors, [out, input]: [usize; 2]) {
    let r = factors.r;
    assert_eq!(factors.a.len(), r * input, "A is [{r}, {input}]");
    assert_eq!(factors.b.len(), out * r, "B is [{out}, {r}]");
}

/// Adds rows `first..` of s·B·A to `rows`.
pub(crate) fn add_product(rows: &mut [f32], input: usize, factors: &LoraFactors, first: usize, scale: f64) {
    let b = &factors.b[first * factors.r..][..rows.len() / input * factors.r];
    Arch::new().dispatch(AddProduct { rows, input, a: &factors.a, b, r: factors.r, scale: scale as f32 });
}

struct AddProduct<'a> {
    rows: &'a mut [f32],
    input: usize,
    a: &'a [f32],
    b: &'a [f32],
    r: usize,
    scale: f32,
}

impl WithSimd for AddProduct<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        /// Vectors of a tile: as many sums in flight as hide the latency of a multiplication and addition.
        const TILE: usize = 8;
        let Self { rows, input, a, b, r, scale } = self;
        let scales = simd.splat_f32s(scale);
        let wide = S::F32_LANES * TILE;
        let tiled = input / wide * wide;
        for column in (0..tiled).step_by(wide) {
            for (row, b) in rows.chunks_exact_mut(input).zip(b.chunks_exact(r)) {
                let mut sums = [simd.splat_f32s(0.0); TILE];
                for (b, a) in b.iter().zip(a.chunks_exact(input)) {
                    let b = simd.splat_f32s(*b);
                    let (a, _) = S::as_simd_f32s(&a[column..column + wide]);
                    for (sum, a) in sums.iter_mut().zip(a) {
                        *sum = simd.mul_add_f32s(b, *a, *sum);
                    }
                }
                let (row, _) = S::as_mut_simd_f32s(&mut row[column..column + wide]);
                for (w, sum) in row.iter_mut().zip(sums) {
                    *w = simd.mul_add_f32s(scales, sum, *w);
                }
            }
        }
        for (row, b) in rows.chunks_exact_mut(input).zip(b.chunks_exact(r)) {
            for (column, w) in row.iter_mut().enumerate().skip(tiled) {
                let products = b.iter().zip(a[column..].iter().step_by(input)).map(|(b, a)| b * a);
                *w += scale * products.sum::<f32>();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dora::initial_magnitude;

    /// W + s·B·A in f64.
    fn truth(w: &[f32], [out, input]: [usize; 2], f: &LoraFactors, scale: f64) -> Vec<f64> {
        let product = |i: usize, j: usize| -> f64 {
            (0..f.r).map(|k| f64::from(f.b[i * f.r + k]) * f64::from(f.a[k * input + j])).sum()
        };
        (0..out * input).map(|at| f64::from(w[at]) + scale * product(at / input, at % input)).collect()
    }

    fn wave(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin()).collect()
    }

    #[test]
    fn two_by_two_by_hand() {
        let factors = LoraFactors { r: 1, a: vec![1.0, 2.0], b: vec![3.0, -1.0], magnitude: None };
        let mut w = [1.0, 0.0, 0.0, 1.0];
        merge(&mut w, [2, 2], &factors, 0.5, None);
        assert_eq!(w, [2.5, 3.0, -0.5, 0.0]);
        // Rows of length √15.25 and 0.5, set to 2 and 3.
        let mut w = [1.0, 0.0, 0.0, 1.0];
        merge(&mut w, [2, 2], &factors, 0.5, Some(&[2.0, 3.0]));
        let row = 2.0 / 15.25f32.sqrt();
        assert!((w[0] - 2.5 * row).abs() < 1e-6 && (w[1] - 3.0 * row).abs() < 1e-6, "{w:?}");
        assert_eq!(w[2..], [-3.0, 0.0]);
    }

    #[test]
    fn every_shape_is_the_f64_sum_up_to_rounding() {
        for [out, input, r] in [[1, 1, 1], [3, 5, 2], [17, 130, 8], [33, 257, 5], [40, 64, 16]] {
            let factors = LoraFactors { r, a: wave(r * input, 0.7), b: wave(out * r, 1.3), magnitude: None };
            let before = wave(out * input, 0.37);
            let mut after = before.clone();
            merge(&mut after, [out, input], &factors, 2.0, None);
            // A sum of r products below 1 errs by at most r²·2⁻²⁴, doubled by the scale; then one rounding of W.
            let bound = (2.0 * (r * r) as f64 + 2.0 * r as f64 + 1.0) * 2f64.powi(-24);
            for (got, want) in after.iter().zip(truth(&before, [out, input], &factors, 2.0)) {
                assert!((f64::from(*got) - want).abs() <= bound, "[{out}, {input}] r {r}: {got} {want}");
            }
        }
    }

    #[test]
    fn the_initial_magnitude_changes_nothing_but_rounding() {
        let shape = [19, 70];
        let factors = LoraFactors { r: 3, a: wave(3 * 70, 0.7), b: wave(19 * 3, 1.3), magnitude: None };
        let w = wave(19 * 70, 0.37);
        let (mut plain, mut dora) = (w.clone(), w.clone());
        merge(&mut plain, shape, &factors, 0.5, None);
        let magnitude = initial_magnitude(&w, shape, &factors, 0.5);
        merge(&mut dora, shape, &factors, 0.5, Some(&magnitude));
        for (plain, dora) in plain.iter().zip(&dora) {
            // m, m / ‖row‖ and the product with it are rounded once each: 3 · 2⁻²⁴.
            assert!((plain - dora).abs() <= 1.8e-7 * plain.abs(), "{plain} {dora}");
        }
    }

    #[test]
    fn a_row_of_zeros_stays() {
        let factors = LoraFactors { r: 1, a: vec![1.0; 3], b: vec![0.0], magnitude: None };
        let mut w = [0.0; 3];
        merge(&mut w, [1, 3], &factors, 1.0, Some(&[0.0]));
        assert_eq!(w, [0.0; 3]);
    }
}
