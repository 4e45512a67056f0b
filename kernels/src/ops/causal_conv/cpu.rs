//! The causal convolution over slices, split by rows. The formulas stand in [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::Sequences;
use crate::host::exp::sigmoid;
use crate::host::{ROWS, View, for_rows, from_vec, simd};

pub(crate) fn forward(x: &Tensor<2>, weight: &Tensor<2>, sequences: &Sequences, past: Option<&Tensor<2>>) -> Tensor<2> {
    let [tokens, channels] = x.dims();
    let (x, past, taps) = (View::of(x), past.map(View::of), Taps::of(weight));
    let rows = Rows { x: x.as_slice(), past: past.as_ref().map(View::as_slice), channels };
    let starts = starts(sequences, tokens);
    let mut y = vec![0.0; tokens * channels];
    for_rows(
        &mut y,
        channels,
        #[inline(always)]
        |first, block| {
            for (i, y) in block.chunks_exact_mut(channels).enumerate() {
                taps.sum(&rows, first + i, starts[first + i], y);
                for y in y {
                    *y *= sigmoid(*y);
                }
            }
        },
    );
    from_vec(y, [tokens, channels])
}

pub(crate) fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    weight: &Tensor<2>,
    sequences: &Sequences,
    weight_grad: bool,
) -> (Tensor<2>, Option<Tensor<2>>) {
    let [tokens, channels] = x.dims();
    let (x, dy, taps) = (View::of(x), View::of(dy), Taps::of(weight));
    let (rows, dy) = (Rows { x: x.as_slice(), past: None, channels }, dy.as_slice());
    let starts = starts(sequences, tokens);
    let mut dp = vec![0.0; tokens * channels];
    for_rows(
        &mut dp,
        channels,
        #[inline(always)]
        |first, block| {
            for (i, dp) in block.chunks_exact_mut(channels).enumerate() {
                let token = first + i;
                taps.sum(&rows, token, starts[token], dp);
                for (p, dy) in dp.iter_mut().zip(&dy[token * channels..][..channels]) {
                    let s = sigmoid(*p);
                    *p = dy * s * (1.0 + *p * (1.0 - s));
                }
            }
        },
    );
    let mut dx = vec![0.0; tokens * channels];
    for_rows(
        &mut dx,
        channels,
        #[inline(always)]
        |first, block| {
            for (i, dx) in block.chunks_exact_mut(channels).enumerate() {
                let token = first + i;
                let inside = |later: &usize| *later < tokens && starts[*later] <= token;
                for (tap, later) in (token..token + taps.width).take_while(inside).enumerate() {
                    accumulate(dx, taps.tap(tap), &dp[later * channels..][..channels]);
                }
            }
        },
    );
    let dw = weight_grad.then(|| {
        let width = taps.width;
        let partial: Vec<Vec<f32>> = dp
            .par_chunks(ROWS * channels.max(1))
            .enumerate()
            .map(|(block, dp)| {
                let mut sums = vec![0f32; width * channels];
                simd(
                    #[inline(always)]
                    || {
                        for (i, dp) in dp.chunks_exact(channels).enumerate() {
                            let token = block * ROWS + i;
                            for tap in 0..width.min(token - starts[token] + 1) {
                                accumulate(&mut sums[tap * channels..][..channels], rows.row(token - tap), dp);
                            }
                        }
                    },
                );
                sums
            })
            .collect();
        let mut dw = vec![0f32; channels * width];
        for sums in partial {
            for (i, sum) in sums.into_iter().enumerate() {
                dw[i % channels * width + width - 1 - i / channels] += sum;
            }
        }
        from_vec(dw, [channels, width])
    });
    (from_vec(dx, [tokens, channels]), dw)
}

/// Bytes that [`backward`] allocates beside its results, without and with the gradient to w.
pub(super) fn backward_scratch([tokens, channels]: [usize; 2], width: usize, weight_grad: bool) -> usize {
    let partial = if weight_grad { tokens.div_ceil(ROWS) * channels * width } else { 0 };
    size_of::<f32>() * (tokens * channels + channels * width + partial) + size_of::<usize>() * tokens
}

/// The first token of each token's document.
fn starts(sequences: &Sequences, tokens: usize) -> Vec<usize> {
    let mut starts = Vec::with_capacity(tokens);
    for (start, length) in sequences.documents() {
        starts.resize(start + length, start);
    }
    assert_eq!(starts.len(), tokens, "cu_seqlens end at the last token");
    starts
}

/// x, and the rows before the first one.
struct Rows<'a> {
    x: &'a [f32],
    past: Option<&'a [f32]>,
    channels: usize,
}

impl Rows<'_> {
    #[inline(always)]
    fn row(&self, token: usize) -> &[f32] {
        &self.x[token * self.channels..][..self.channels]
    }
}

/// The weights of each tap: of the token itself, of the one before, …
struct Taps {
    weights: Vec<f32>,
    width: usize,
}

impl Taps {
    fn of(weight: &Tensor<2>) -> Self {
        let [channels, width] = weight.dims();
        let weight = View::of(weight);
        let weight = weight.as_slice();
        let weights = (0..width * channels).map(|i| weight[i % channels * width + width - 1 - i / channels]).collect();
        Self { weights, width }
    }

    #[inline(always)]
    fn tap(&self, tap: usize) -> &[f32] {
        let channels = self.weights.len() / self.width;
        &self.weights[tap * channels..][..channels]
    }

    /// p of a token.
    #[inline(always)]
    fn sum(&self, rows: &Rows<'_>, token: usize, start: usize, p: &mut [f32]) {
        p.fill(0.0);
        for tap in 0..self.width {
            if tap <= token - start {
                accumulate(p, self.tap(tap), rows.row(token - tap));
            } else if let Some(past) = rows.past {
                let row = self.width - 1 + token - tap;
                accumulate(p, self.tap(tap), &past[row * rows.channels..][..rows.channels]);
            }
        }
    }
}

/// `sum + a ∘ b`.
#[inline(always)]
fn accumulate(sum: &mut [f32], a: &[f32], b: &[f32]) {
    for ((s, a), b) in sum.iter_mut().zip(a).zip(b) {
        *s += a * b;
    }
}
