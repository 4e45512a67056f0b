//! The gated norm over slices; the formulas stand in [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::host::exp::sigmoid;
use crate::host::{ROWS, View, dot, for_rows, from_vec, simd};

pub(crate) fn forward(x: &Tensor<2>, z: &Tensor<2>, weight: &Tensor<1>, eps: f32) -> Tensor<2> {
    let shape @ [tokens, columns] = x.dims();
    let [width] = weight.dims();
    let (x, z, weight) = (View::of(x), View::of(z), View::of(weight));
    let (x, z, weight) = (x.as_slice(), z.as_slice(), weight.as_slice());
    let mut y = vec![0.0; tokens * columns];
    for_rows(
        &mut y,
        columns,
        #[inline(always)]
        |first, block| {
            for (i, y) in block.chunks_exact_mut(width).enumerate() {
                let at = first * columns + i * width;
                let (x, z) = (&x[at..][..width], &z[at..][..width]);
                let rstd = rstd(x, eps);
                for j in 0..width {
                    y[j] = weight[j] * (x[j] * rstd) * (z[j] * sigmoid(z[j]));
                }
            }
        },
    );
    from_vec(y, shape)
}

pub(crate) fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    z: &Tensor<2>,
    weight: &Tensor<1>,
    eps: f32,
) -> (Tensor<2>, Tensor<2>) {
    let shape @ [tokens, columns] = x.dims();
    let [width] = weight.dims();
    let (dy, x, z, weight) = (View::of(dy), View::of(x), View::of(z), View::of(weight));
    let (dy, x, z, weight) = (dy.as_slice(), x.as_slice(), z.as_slice(), weight.as_slice());
    let (mut dx, mut dz) = (vec![0.0; tokens * columns], vec![0.0; tokens * columns]);
    let blocks = dx.par_chunks_mut(ROWS * columns.max(1)).zip(dz.par_chunks_mut(ROWS * columns.max(1)));
    blocks.enumerate().for_each(|(block, (dx, dz))| {
        simd(
            #[inline(always)]
            || {
                let heads = dx.chunks_exact_mut(width).zip(dz.chunks_exact_mut(width));
                for (i, (dx, dz)) in heads.enumerate() {
                    let at = block * ROWS * columns + i * width;
                    let (dy, x, z) = (&dy[at..][..width], &x[at..][..width], &z[at..][..width]);
                    let rstd = rstd(x, eps);
                    for j in 0..width {
                        let (s, n) = (sigmoid(z[j]), x[j] * rstd);
                        dx[j] = dy[j] * (z[j] * s) * weight[j];
                        dz[j] = dy[j] * weight[j] * n * s * (1.0 + z[j] * (1.0 - s));
                    }
                    let along = rstd * rstd * dot(dx, x) / width as f32;
                    for j in 0..width {
                        dx[j] = rstd * (dx[j] - x[j] * along);
                    }
                }
            },
        );
    });
    (from_vec(dx, shape), from_vec(dz, shape))
}

pub(crate) fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, z: &Tensor<2>, weight: &Tensor<1>, eps: f32) -> Tensor<1> {
    let [_, columns] = x.dims();
    let [width] = weight.dims();
    let (dy, x, z) = (View::of(dy), View::of(x), View::of(z));
    let (dy, x, z) = (dy.as_slice(), x.as_slice(), z.as_slice());
    let partial: Vec<Vec<f32>> = x
        .par_chunks(ROWS * columns.max(1))
        .enumerate()
        .map(|(block, rows)| {
            let mut sum = vec![0f32; width];
            simd(
                #[inline(always)]
                || {
                    for (i, x) in rows.chunks_exact(width).enumerate() {
                        let at = block * ROWS * columns + i * width;
                        let (dy, z) = (&dy[at..][..width], &z[at..][..width]);
                        let rstd = rstd(x, eps);
                        for j in 0..width {
                            sum[j] += dy[j] * (z[j] * sigmoid(z[j])) * (x[j] * rstd);
                        }
                    }
                },
            );
            sum
        })
        .collect();
    let mut total = vec![0f32; width];
    for part in partial {
        for (t, p) in total.iter_mut().zip(part) {
            *t += p;
        }
    }
    from_vec(total, [width])
}

/// Bytes of the partial sums of [`weight_grad`].
pub(super) fn weight_grad_scratch(tokens: usize, width: usize) -> usize {
    size_of::<f32>() * tokens.div_ceil(ROWS) * width
}

#[inline(always)]
fn rstd(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}
