//! One chunk of head and loss over slices; see [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::host::exp::exp_shifted;
use crate::host::{from_vec, into_vec, simd};

pub(crate) fn forward(h: &Tensor<2>, weight: &Tensor<2>, targets: &[u32]) -> Vec<f32> {
    let mut logits = into_vec(crate::ops::matmul::cpu::product(h, weight, crate::ops::matmul::Form::Nt));
    rows(
        &mut logits,
        weight.dims()[0],
        targets,
        #[inline(always)]
        |_, _, _| (),
    )
}

pub(crate) fn forward_dlogits(h: &Tensor<2>, weight: &Tensor<2>, targets: &[u32], scale: f32) -> (Vec<f32>, Tensor<2>) {
    let vocab = weight.dims()[0];
    let mut logits = into_vec(crate::ops::matmul::cpu::product(h, weight, crate::ops::matmul::Form::Nt));
    let nll = rows(
        &mut logits,
        vocab,
        targets,
        #[inline(always)]
        |exps, sum, target| {
            let factor = scale / sum;
            for x in exps.iter_mut() {
                *x *= factor;
            }
            exps[target] -= scale;
        },
    );
    (nll, from_vec(logits, [targets.len(), vocab]))
}

/// Turns each row of logits into shifted exponentials, hands them with their sum to `finish`, returns the losses.
fn rows(logits: &mut [f32], vocab: usize, targets: &[u32], finish: impl Fn(&mut [f32], f32, usize) + Sync) -> Vec<f32> {
    logits
        .par_chunks_exact_mut(vocab)
        .zip(targets)
        .map(|(row, &target)| {
            simd(
                #[inline(always)]
                || {
                    let logit = row[target as usize];
                    let (max, sum) = exp_shifted(row);
                    finish(row, sum, target as usize);
                    sum.ln() + max - logit
                },
            )
        })
        .collect()
}
