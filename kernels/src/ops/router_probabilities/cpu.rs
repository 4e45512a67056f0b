//! Sums of probabilities over slices; the formulas stand in [`super`].

use burn::tensor::Tensor as BurnTensor;

use crate::host::exp::exp_shifted;
use crate::host::{View, for_rows, from_vec};

pub(super) fn forward(logits: &BurnTensor<2>) -> Vec<f64> {
    let experts = logits.dims()[1];
    let p = probabilities(logits);
    let mut sums = vec![0.0; experts];
    for row in p.chunks_exact(experts) {
        sums.iter_mut().zip(row).for_each(|(sum, &p)| *sum += f64::from(p));
    }
    sums
}

pub(super) fn backward(logits: &BurnTensor<2>, coefficients: &[f32]) -> BurnTensor<2> {
    let [tokens, experts] = logits.dims();
    let mut dlogits = probabilities(logits);
    for_rows(
        &mut dlogits,
        experts,
        #[inline(always)]
        |_, rows| {
            for row in rows.chunks_exact_mut(experts) {
                let mean: f32 = row.iter().zip(coefficients).map(|(p, c)| p * c).sum();
                row.iter_mut().zip(coefficients).for_each(|(p, c)| *p *= c - mean);
            }
        },
    );
    from_vec(dlogits, [tokens, experts])
}

/// p, `[tokens · experts]`.
fn probabilities(logits: &BurnTensor<2>) -> Vec<f32> {
    let [tokens, experts] = logits.dims();
    let view = View::of(logits);
    let logits = view.as_slice();
    let mut p = vec![0.0; tokens * experts];
    for_rows(
        &mut p,
        experts,
        #[inline(always)]
        |first, rows| {
            rows.copy_from_slice(&logits[first * experts..][..rows.len()]);
            for row in rows.chunks_exact_mut(experts) {
                let (_, sum) = exp_shifted(row);
                row.iter_mut().for_each(|p| *p /= sum);
            }
        },
    );
    p
}
