//! AdamW over slices, in place; the formulas stand in [`crate::adamw`].

use core::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{CHUNK, View, simd, with_mut};
use crate::adamw::{Moments, Step};

pub(crate) fn step(params: &mut Tensor<1>, grads: &Tensor<1>, state: Moments<'_>, step: &Step, range: Range<usize>) {
    let (step_size, root_correction) = step.corrections();
    let (step_size, root_correction) = (step_size as f32, root_correction as f32);
    let keep = (1.0 - step.lr * step.weight_decay) as f32;
    let (b1, b2, eps) = (step.beta1 as f32, step.beta2 as f32, step.eps as f32);
    let (c1, c2) = ((1.0 - step.beta1) as f32, (1.0 - step.beta2) as f32);
    let scale = step.grad_scale as f32;
    let grads = View::of(grads);
    let grads = grads.as_slice();
    with_mut(params, |p| {
        with_mut(state.m, |m| {
            with_mut(state.v, |v| {
                p[range.clone()]
                    .par_chunks_mut(CHUNK)
                    .zip(m[range.clone()].par_chunks_mut(CHUNK))
                    .zip(v[range.clone()].par_chunks_mut(CHUNK))
                    .zip(grads[range.clone()].par_chunks(CHUNK))
                    .for_each(|(((p, m), v), g)| {
                        simd(
                            #[inline(always)]
                            || {
                                for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(g) {
                                    let g = g * scale;
                                    *m = b1 * *m + c1 * g;
                                    *v = b2 * *v + c2 * g * g;
                                    *p = *p * keep - step_size * *m / (v.sqrt() * root_correction + eps);
                                }
                            },
                        );
                    });
            });
        });
    });
}
