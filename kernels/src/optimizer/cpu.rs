//! Optimizer steps over slices, in place; the formulas stand in [`crate::optimizer`].

use core::ops::Range;

use burn::tensor::Tensor as BurnTensor;
use rayon::prelude::*;

use super::StepCoefficients;
use super::blockwise::cpu::sign;
use crate::Tensor;
use crate::host::{CHUNK, View, simd, with_mut};

/// Changes the values of `range` and their state `at` other places.
pub(crate) fn step(
    params: &mut BurnTensor<1>,
    grads: &BurnTensor<1>,
    factor: f64,
    moments: &mut [Tensor<1>],
    coefficients: &StepCoefficients,
    range: Range<usize>,
    at: Range<usize>,
) {
    let factor = factor as f32;
    let grads = View::of(grads);
    let grads = &grads.as_slice()[range.clone()];
    let single = |x: f64| x as f32;
    match (*coefficients, moments) {
        (
            StepCoefficients::AdamW { keep, step_size, root_correction, beta1, beta2, eps },
            [Tensor::Burn(first), Tensor::Burn(second)],
        ) => {
            let [keep, step_size, root_correction, eps] = [keep, step_size, root_correction, eps].map(single);
            let [b1, c1, b2, c2] = [beta1, 1.0 - beta1, beta2, 1.0 - beta2].map(single);
            with_mut(second, |v| {
                let v = v[at.clone()].par_chunks_mut(CHUNK);
                one_moment(
                    params,
                    grads,
                    first,
                    range,
                    at,
                    v,
                    #[inline(always)]
                    |p, g, m, v| {
                        for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
                            let g = g * factor;
                            *m = b1 * *m + c1 * g;
                            *v = b2 * *v + c2 * g * g;
                            *p = *p * keep - step_size * *m / (v.sqrt() * root_correction + eps);
                        }
                    },
                );
            });
        }
        (StepCoefficients::Lion { keep, lr, beta1, beta2 }, [Tensor::Burn(first)]) => {
            let [keep, lr] = [keep, lr].map(single);
            let [b1, c1, b2, c2] = [beta1, 1.0 - beta1, beta2, 1.0 - beta2].map(single);
            one_moment(
                params,
                grads,
                first,
                range,
                at,
                none(),
                #[inline(always)]
                |p, g, m, ()| {
                    for ((p, m), &g) in p.iter_mut().zip(m).zip(g) {
                        let g = g * factor;
                        *p = *p * keep - lr * sign(b1 * *m + c1 * g);
                        *m = b2 * *m + c2 * g;
                    }
                },
            );
        }
        (StepCoefficients::Sgd { weight_decay, lr, momentum }, [Tensor::Burn(first)]) => {
            let [decay, lr, momentum] = [weight_decay, lr, momentum].map(single);
            one_moment(
                params,
                grads,
                first,
                range,
                at,
                none(),
                #[inline(always)]
                |p, g, m, ()| {
                    for ((p, m), &g) in p.iter_mut().zip(m).zip(g) {
                        *m = momentum * *m + (g * factor + decay * *p);
                        *p -= lr * *m;
                    }
                },
            );
        }
        (StepCoefficients::Sgd { weight_decay, lr, .. }, []) => {
            let [decay, lr] = [weight_decay, lr].map(single);
            with_mut(params, |p| {
                p[range].par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK)).for_each(|(p, g)| {
                    simd(
                        #[inline(always)]
                        || p.iter_mut().zip(g).for_each(|(p, &g)| *p -= lr * (g * factor + decay * *p)),
                    )
                });
            });
        }
        _ => panic!("the moments of the rule, beside the values"),
    }
}

/// Calls `f` with chunks of the values, the gradients, the first moment and what comes with `more`.
fn one_moment<M: IndexedParallelIterator>(
    params: &mut BurnTensor<1>,
    grads: &[f32],
    first: &mut BurnTensor<1>,
    range: Range<usize>,
    at: Range<usize>,
    more: M,
    f: impl Fn(&mut [f32], &[f32], &mut [f32], M::Item) + Sync,
) {
    with_mut(params, |p| {
        with_mut(first, |m| {
            let chunks = p[range].par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK)).zip(m[at].par_chunks_mut(CHUNK));
            chunks.zip(more).for_each(|(((p, g), m), more)| {
                simd(
                    #[inline(always)]
                    || f(p, g, m, more),
                )
            });
        });
    });
}

/// Returns an iterator over any number of units.
fn none() -> impl IndexedParallelIterator<Item = ()> {
    rayon::iter::repeat_n((), usize::MAX)
}
