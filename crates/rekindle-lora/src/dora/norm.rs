//! The row norms of DoRA (arXiv:2402.09353).

use rayon::prelude::*;

use crate::LoraFactors;
use crate::merge::{add_product, assert_shape};

/// Returns the initial magnitude m = ‖W + s·B·A‖ of each row, `[out]`. It leaves the function of base and adapter unchanged.
///
/// W is `[out, in]`, row-major. A row is summed in `f64` and rounded once.
///
/// # Panics
/// If a slice's length is not that of its shape.
pub fn initial_magnitude(w: &[f32], [out, input]: [usize; 2], factors: &LoraFactors, scale: f64) -> Vec<f32> {
    assert_shape(factors, [out, input]);
    assert_eq!(w.len(), out * input, "W is [{out}, {input}]");
    let unchanged = factors.b.iter().all(|&b| b == 0.0);
    let row = |(row, w): (usize, &[f32])| {
        if unchanged {
            return norm(w) as f32;
        }
        let mut sum = w.to_vec();
        add_product(&mut sum, input, factors, row, scale);
        norm(&sum) as f32
    };
    if input == 0 { vec![0.0; out] } else { w.par_chunks_exact(input).enumerate().map(row).collect() }
}

/// Returns ‖W + s·B·A‖ of each row, `[out]`, from products with A, without forming W + s·B·A:
///
/// ‖w + s·b·A‖² = ‖w‖² + 2s·b·(A·wᵀ) + s²·b·(A·Aᵀ)·bᵀ
///
/// The cost is r·(r + 1) multiplications a row instead of r·in.
///
/// # Shapes
/// ‖w‖² `[out]`, `wa` = W·Aᵀ `[out, r]`, A `[r, in]`, B `[out, r]`.
///
/// # Dtypes
/// Stored in `f32`, summed in `f64`. The remaining error is the rounding of ‖w‖² and W·Aᵀ to `f32`; it is largest where
/// the adapter nearly cancels the base.
///
/// # Gradients
/// None: PEFT and §4.3 of the paper treat this norm as a constant in the backward pass.
///
/// # Panics
/// If a slice's length is not that of its shape.
pub(crate) fn dora_norm(row_norms_sq: &[f32], wa: &[f32], factors: &LoraFactors, scale: f64) -> Vec<f32> {
    let (out, r) = (row_norms_sq.len(), factors.r);
    assert_eq!(wa.len(), out * r, "W·Aᵀ is [{out}, {r}]");
    assert_eq!(factors.b.len(), out * r, "B is [{out}, {r}]");
    let gram = gram(&factors.a, r);
    let row = |((w, wa), b): ((&f32, &[f32]), &[f32])| {
        let mut sq = f64::from(*w);
        for ((b_i, wa), gram) in b.iter().zip(wa).zip(gram.chunks_exact(r)) {
            let quadratic: f64 = b.iter().zip(gram).map(|(b_j, g)| f64::from(*b_j) * g).sum();
            sq += scale * f64::from(*b_i) * (2.0 * f64::from(*wa) + scale * quadratic);
        }
        // Rounding can push a length near zero below it.
        sq.max(0.0).sqrt() as f32
    };
    row_norms_sq.par_iter().zip(wa.par_chunks_exact(r)).zip(factors.b.par_chunks_exact(r)).map(row).collect()
}

/// Returns the norm of a row.
pub(crate) fn norm(row: &[f32]) -> f64 {
    norm_sq(row).sqrt()
}

fn norm_sq(row: &[f32]) -> f64 {
    dot(row, row)
}

/// Returns A·Aᵀ, `[r, r]`.
fn gram(a: &[f32], r: usize) -> Vec<f64> {
    let input = a.len() / r;
    (0..r * r).into_par_iter().map(|at| dot(&a[at / r * input..][..input], &a[at % r * input..][..input])).collect()
}

/// Returns the dot product in `f64`. Eight independent sums hide the latency of an addition.
fn dot(x: &[f32], y: &[f32]) -> f64 {
    let mut sums = [0f64; 8];
    let (x, x_rest) = x.as_chunks::<8>();
    let (y, y_rest) = y.as_chunks::<8>();
    for (x, y) in x.iter().zip(y) {
        for ((sum, x), y) in sums.iter_mut().zip(x).zip(y) {
            *sum += f64::from(*x) * f64::from(*y);
        }
    }
    let rest: f64 = x_rest.iter().zip(y_rest).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum();
    sums.iter().sum::<f64>() + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row_norms_sq(w: &[f32], input: usize) -> Vec<f32> {
        w.chunks_exact(input).map(|row| norm_sq(row) as f32).collect()
    }

    fn wave(n: usize, step: f32) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * step).sin()).collect()
    }

    #[test]
    fn a_row_by_hand() {
        // w = (3, 0), b·A = 2·(0, 1) + 1·(1, 0), s = 2: w + s·b·A = (5, 4).
        let factors = LoraFactors { r: 2, a: vec![0.0, 1.0, 1.0, 0.0], b: vec![2.0, 1.0], magnitude: None };
        let length = 41f32.sqrt();
        assert_eq!(dora_norm(&[9.0], &[0.0, 3.0], &factors, 2.0), [length]);
        assert_eq!(initial_magnitude(&[3.0, 0.0], [1, 2], &factors, 2.0), [length]);
        assert_eq!(row_norms_sq(&[3.0, 4.0, 0.0, 1.0], 2), [25.0, 1.0]);
    }

    #[test]
    fn the_expanded_length_is_the_direct_one() {
        for ([out, input, r], scale) in [([7, 33, 4], 2.0), ([64, 100, 16], 0.5), ([20, 256, 1], 8.0)] {
            let factors = LoraFactors { r, a: wave(r * input, 0.7), b: wave(out * r, 1.3), magnitude: None };
            let w = wave(out * input, 0.37);
            let wa: Vec<f32> = (0..out * r)
                .map(|at| dot(&w[at / r * input..][..input], &factors.a[at % r * input..][..input]) as f32)
                .collect();
            let expanded = dora_norm(&row_norms_sq(&w, input), &wa, &factors, scale);
            let direct = initial_magnitude(&w, [out, input], &factors, scale);
            for (expanded, direct) in expanded.iter().zip(&direct) {
                assert!((expanded - direct).abs() <= 1e-6 * direct, "{expanded} {direct}");
            }
        }
    }

    #[test]
    fn an_adapter_that_cancels_its_base_has_length_zero() {
        let factors = LoraFactors { r: 1, a: vec![0.1, 0.7], b: vec![-1.0], magnitude: None };
        let w = [0.1, 0.7];
        let norms = row_norms_sq(&w, 2);
        let length = dora_norm(&norms, &norms, &factors, 1.0)[0];
        // ‖w‖² is rounded to f32: its root errs by at most √(2 · 0.5 · 2⁻²⁴).
        assert!((0.0..2.5e-4).contains(&length), "{length}");
    }
}
