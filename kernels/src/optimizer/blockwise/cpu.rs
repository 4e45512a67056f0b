//! Optimizer steps over 8-bit blocks; the formulas stand in [`super`].

use core::iter::repeat_with;

use rayon::prelude::*;

use super::{BLOCK, Blocks, BlockwiseCoefficients};
use crate::host::simd;
use crate::optimizer::UpdateRule;
use crate::optimizer::dynamic_map::{signed, unsigned};

/// Blocks handed to one thread at a time.
const TASK: usize = 16;

/// Values of one parameter with what belongs to them.
struct Task<'a> {
    p: &'a mut [f32],
    g: &'a [f32],
    m: Blocks<'a>,
    v: Option<Blocks<'a>>,
}

/// Changes the values of one parameter and its blocks by one step with gradients `factor · grads`.
pub(crate) fn step(
    rule: UpdateRule,
    coefficients: &BlockwiseCoefficients,
    values: &mut [f32],
    grads: &[f32],
    factor: f32,
    m: Blocks<'_>,
    v: Option<Blocks<'_>>,
) {
    let values = values.chunks_mut(TASK * BLOCK).zip(grads.chunks(TASK * BLOCK));
    let second = v.into_iter().flat_map(|v| v.split(TASK)).map(Some).chain(repeat_with(|| None));
    let tasks = values.zip(m.split(TASK)).zip(second).map(|(((p, g), m), v)| Task { p, g, m, v });
    tasks.collect::<Vec<_>>().into_par_iter().for_each(|task| {
        simd(
            #[inline(always)]
            || run(rule, coefficients, factor, task),
        )
    });
}

#[inline(always)]
fn run(rule: UpdateRule, coefficients: &BlockwiseCoefficients, factor: f32, Task { p, g, m, v }: Task<'_>) {
    let &BlockwiseCoefficients { decay: a, rate: r, beta1: [b1, c1], beta2: [b2, c2], eps } = coefficients;
    let mut second = v.into_iter().flat_map(|v| v.split(1));
    for ((p, g), first) in p.chunks_mut(BLOCK).zip(g.chunks(BLOCK)).zip(m.split(1)) {
        let mut m = [0.0; BLOCK];
        let old = first.absmax[0];
        for (m, &code) in m.iter_mut().zip(&*first.codes) {
            *m = signed().values[usize::from(code)] * old;
        }
        match rule {
            UpdateRule::AdamW { .. } => {
                let second = second.next().expect("two moments");
                let mut v = [0.0; BLOCK];
                let old = second.absmax[0];
                for (v, &code) in v.iter_mut().zip(&*second.codes) {
                    *v = unsigned().values[usize::from(code)] * old;
                }
                for (((p, &g), m), v) in p.iter_mut().zip(g).zip(&mut m).zip(&mut v) {
                    let g = factor * g;
                    *m = flushed(c1.mul_add(g, *m * b1));
                    *v = flushed((c2 * g).mul_add(g, *v * b2));
                    *p = (-r).mul_add(*m / (v.sqrt() + eps), *p) * a;
                }
                encode_second(&v[..p.len()], second);
            }
            UpdateRule::Lion { .. } => {
                for ((p, &g), m) in p.iter_mut().zip(g).zip(&mut m) {
                    let g = factor * g;
                    *p = (-r).mul_add(sign(c1.mul_add(g, *m * b1)), *p * a);
                    *m = flushed(c2.mul_add(g, *m * b2));
                }
            }
            UpdateRule::Sgd { .. } => {
                for ((p, &g), m) in p.iter_mut().zip(g).zip(&mut m) {
                    *m = flushed(m.mul_add(b1, p.mul_add(a, factor * g)));
                    *p = (-r).mul_add(*m, *p);
                }
            }
        }
        encode_first(&m[..p.len()], first);
    }
}

#[inline(always)]
fn encode_first(m: &[f32], Blocks { codes, absmax }: Blocks<'_>) {
    absmax[0] = largest(m);
    if absmax[0] == 0.0 {
        codes.fill(255);
        return;
    }
    let inverse = 1.0 / absmax[0];
    for (code, &m) in codes.iter_mut().zip(m) {
        let nearest = signed().code(m * inverse);
        // A negative number does not become zero.
        *code = if m < 0.0 { nearest.min(126) } else { nearest };
    }
}

#[inline(always)]
fn encode_second(v: &[f32], Blocks { codes, absmax }: Blocks<'_>) {
    absmax[0] = largest(v);
    let inverse = if absmax[0] > 0.0 { 1.0 / absmax[0] } else { 0.0 };
    for (code, &v) in codes.iter_mut().zip(v) {
        *code = unsigned().code(v * inverse);
    }
}

/// The largest magnitude, in eight interleaved parts, which vectorizes.
#[inline(always)]
fn largest(x: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    for part in x.chunks(8) {
        for (lane, x) in lanes.iter_mut().zip(part) {
            *lane = lane.max(x.abs());
        }
    }
    lanes.into_iter().fold(0.0, f32::max)
}

/// Subnormal numbers become zero.
#[inline(always)]
fn flushed(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0.0 } else { x }
}

/// 1, −1, or 0 for zeros.
#[inline(always)]
pub(crate) fn sign(x: f32) -> f32 {
    if x > 0.0 {
        1.0
    } else if x < 0.0 {
        -1.0
    } else {
        0.0
    }
}
