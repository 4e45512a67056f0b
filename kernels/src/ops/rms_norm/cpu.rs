//! RMSNorm over slices; the formulas stand in [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::GainForm;
use crate::host::{ROWS, View, dot, for_rows, from_vec, into_vec, simd};

pub(crate) fn forward(x: &Tensor<2>, form: GainForm, weight: Option<&Tensor<1>>, eps: f32) -> (Tensor<2>, Tensor<1>) {
    let [tokens, hidden] = x.dims();
    let (x, gain) = (View::of(x), gain(form, weight, hidden));
    let x = x.as_slice();
    let mut rstd = vec![0.0; tokens];
    for_rows(
        &mut rstd,
        1,
        #[inline(always)]
        |first, rows| {
            for (i, r) in rows.iter_mut().enumerate() {
                let row = &x[(first + i) * hidden..][..hidden];
                *r = 1.0 / (dot(row, row) / hidden as f32 + eps).sqrt();
            }
        },
    );
    let y = scaled(x, &gain, &rstd, hidden);
    (from_vec(y, [tokens, hidden]), from_vec(rstd, [tokens]))
}

pub(crate) fn recompute(x: &Tensor<2>, form: GainForm, weight: Option<&Tensor<1>>, rstd: &Tensor<1>) -> Tensor<2> {
    let [tokens, hidden] = x.dims();
    let (x, gain, rstd) = (View::of(x), gain(form, weight, hidden), View::of(rstd));
    let y = scaled(x.as_slice(), &gain, rstd.as_slice(), hidden);
    from_vec(y, [tokens, hidden])
}

pub(crate) fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    form: GainForm,
    weight: Option<&Tensor<1>>,
    rstd: &Tensor<1>,
    residual: Option<Tensor<2>>,
) -> Tensor<2> {
    let [tokens, hidden] = x.dims();
    let (dy, x, gain, rstd) = (View::of(dy), View::of(x), gain(form, weight, hidden), View::of(rstd));
    let (dy, x, gain, rstd) = (dy.as_slice(), x.as_slice(), gain.as_slice(), rstd.as_slice());
    let mut dx = residual.map_or_else(|| vec![0.0; tokens * hidden], into_vec);
    for_rows(
        &mut dx,
        hidden,
        #[inline(always)]
        |first, rows| {
            for (i, dx) in rows.chunks_exact_mut(hidden).enumerate() {
                let at = (first + i) * hidden;
                let (dy, x, r) = (&dy[at..][..hidden], &x[at..][..hidden], rstd[first + i]);
                let along = r * r * dot3(dy, gain, x) / hidden as f32;
                for j in 0..hidden {
                    dx[j] += r * (dy[j] * gain[j] - x[j] * along);
                }
            }
        },
    );
    from_vec(dx, [tokens, hidden])
}

pub(crate) fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<1> {
    let [_, hidden] = x.dims();
    let (dy, x, rstd) = (View::of(dy), View::of(x), View::of(rstd));
    let (dy, x, rstd) = (dy.as_slice(), x.as_slice(), rstd.as_slice());
    let partial: Vec<Vec<f32>> = rstd
        .par_chunks(ROWS)
        .enumerate()
        .map(|(block, rstd)| {
            let mut sum = vec![0f32; hidden];
            simd(
                #[inline(always)]
                || {
                    for (i, r) in rstd.iter().enumerate() {
                        let at = (block * ROWS + i) * hidden;
                        let (dy, x) = (&dy[at..][..hidden], &x[at..][..hidden]);
                        for j in 0..hidden {
                            sum[j] += dy[j] * x[j] * r;
                        }
                    }
                },
            );
            sum
        })
        .collect();
    let mut total = vec![0f32; hidden];
    for part in partial {
        for (t, p) in total.iter_mut().zip(part) {
            *t += p;
        }
    }
    from_vec(total, [hidden])
}

/// Bytes of the partial sums of [`weight_grad`].
pub(super) fn weight_grad_scratch([tokens, hidden]: [usize; 2]) -> usize {
    size_of::<f32>() * tokens.div_ceil(ROWS) * hidden
}

/// Bytes of the factors of a row.
pub(super) fn gain_scratch(hidden: usize) -> usize {
    size_of::<f32>() * hidden
}

/// The factor of each channel.
fn gain(form: GainForm, weight: Option<&Tensor<1>>, hidden: usize) -> Vec<f32> {
    let Some(weight) = weight.map(View::of) else { return vec![1.0; hidden] };
    let weight = weight.as_slice();
    match form {
        GainForm::OnePlus => weight.iter().map(|w| 1.0 + w).collect(),
        GainForm::Plain | GainForm::RoundedAfter | GainForm::None => weight.to_vec(),
    }
}

fn scaled(x: &[f32], gain: &[f32], rstd: &[f32], hidden: usize) -> Vec<f32> {
    let mut y = vec![0.0; x.len()];
    for_rows(
        &mut y,
        hidden,
        #[inline(always)]
        |first, rows| {
            for (i, y) in rows.chunks_exact_mut(hidden).enumerate() {
                let (x, r) = (&x[(first + i) * hidden..][..hidden], rstd[first + i]);
                for j in 0..hidden {
                    y[j] = x[j] * r * gain[j];
                }
            }
        },
    );
    y
}

/// `Σ a·b·c` in sixteen interleaved partial sums.
#[inline(always)]
fn dot3(a: &[f32], b: &[f32], c: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let whole = a.len() / 16 * 16;
    for start in (0..whole).step_by(16) {
        let (a, b, c) = (&a[start..][..16], &b[start..][..16], &c[start..][..16]);
        for i in 0..16 {
            lanes[i] = (a[i] * b[i]).mul_add(c[i], lanes[i]);
        }
    }
    let tail: f32 = (whole..a.len()).map(|i| a[i] * b[i] * c[i]).sum();
    lanes.iter().sum::<f32>() + tail
}
