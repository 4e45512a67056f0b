//! One chunk of head and loss over slices; see [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::LmHead;
use super::token_log_probs::RowStatistics;
use crate::host::exp::{exp, exp_shifted, exp_sums, tanh};
use crate::host::{from_vec, into_vec, simd};
use crate::ops::matmul::{Form, cpu::product};

pub(super) fn forward(h: &Tensor<2>, head: &LmHead, targets: &[u32]) -> Vec<f32> {
    let mut logits = products(h, head);
    rows(
        &mut logits,
        head,
        targets,
        #[inline(always)]
        |row, _, target| {
            let logit = row[target];
            let (max, sum) = exp_shifted(row);
            sum.ln() + max - logit
        },
    )
}

/// The losses, and the gradient of `Σ weights · nll` to h·Wᵀ.
pub(super) fn forward_dlogits(h: &Tensor<2>, head: &LmHead, targets: &[u32], weights: &[f32]) -> (Vec<f32>, Tensor<2>) {
    let mut logits = products(h, head);
    let nll = rows(
        &mut logits,
        head,
        targets,
        #[inline(always)]
        |row, index, target| {
            if let Some(cap) = head.softcap {
                let statistics = statistics_of(row, target);
                gradient(row, &statistics, target, weights[index], Some(cap));
                return statistics.nll();
            }
            // Without a cap, the exponentials of the sums are those of the gradient.
            let logit = row[target];
            let (max, sum) = exp_shifted(row);
            let factor = weights[index] / sum;
            for x in row.iter_mut() {
                *x *= factor;
            }
            row[target] -= weights[index];
            sum.ln() + max - logit
        },
    );
    (nll, from_vec(logits, [targets.len(), head.vocab()]))
}

pub(super) fn statistics(h: &Tensor<2>, head: &LmHead, targets: &[u32]) -> Vec<RowStatistics> {
    let mut logits = products(h, head);
    rows(
        &mut logits,
        head,
        targets,
        #[inline(always)]
        |row, _, target| statistics_of(row, target),
    )
}

/// The gradient of `Σ weights · nll` to h·Wᵀ, from the statistics of the rows.
pub(super) fn dlogits(
    h: &Tensor<2>,
    head: &LmHead,
    targets: &[u32],
    weights: &[f32],
    statistics: &[RowStatistics],
) -> Tensor<2> {
    let mut logits = products(h, head);
    rows(
        &mut logits,
        head,
        targets,
        #[inline(always)]
        |row, index, target| gradient(row, &statistics[index], target, weights[index], head.softcap),
    );
    from_vec(logits, [targets.len(), head.vocab()])
}

fn products(h: &Tensor<2>, head: &LmHead) -> Vec<f32> {
    into_vec(product(h, head.weight.burn(), Form::Nt))
}

/// Turns each row of products into logits and hands them to `finish`, with the index of the row and its target.
fn rows<R: Send>(
    products: &mut [f32],
    head: &LmHead,
    targets: &[u32],
    finish: impl Fn(&mut [f32], usize, usize) -> R + Sync,
) -> Vec<R> {
    products
        .par_chunks_exact_mut(head.vocab())
        .zip(targets)
        .enumerate()
        .map(|(index, (row, &target))| {
            simd(
                #[inline(always)]
                || {
                    if head.multiplier != 1.0 {
                        row.iter_mut().for_each(|x| *x *= head.multiplier);
                    }
                    if let Some(cap) = head.softcap {
                        row.iter_mut().for_each(|x| *x = cap * tanh(*x / cap));
                    }
                    finish(row, index, target as usize)
                },
            )
        })
        .collect()
}

#[inline(always)]
fn statistics_of(row: &[f32], target: usize) -> RowStatistics {
    let (max, sum, shifted) = exp_sums(row);
    RowStatistics { logit: row[target], max, sum, shifted }
}

/// Replaces logits by their gradient.
#[inline(always)]
fn gradient(row: &mut [f32], statistics: &RowStatistics, target: usize, weight: f32, softcap: Option<f32>) {
    let &RowStatistics { logit, max, sum, .. } = statistics;
    let factor = weight / sum;
    match softcap {
        None => {
            row.iter_mut().for_each(|x| *x = exp(*x - max) * factor);
            row[target] -= weight;
        }
        Some(cap) => {
            // d(c·tanh(z / c))/dz = 1 − tanh²(z / c).
            let slope = |x: f32| 1.0 - (x / cap) * (x / cap);
            row.iter_mut().for_each(|x| *x = exp(*x - max) * factor * slope(*x));
            row[target] = (exp(logit - max) * factor - weight) * slope(logit);
        }
    }
}
