//! The operands over slices, and what a value head computes of a chunk's tokens. The formulas stand in
//! [`super::super`].

use super::Inputs;
use crate::host::{View, dot, simd};
use crate::ops::gated_delta::{CHUNK, DeltaHeads, EPS, InputsIn};
use crate::ops::matmul::cpu::{Mat, gemm};

/// The operands' storage.
pub(super) struct Views {
    qkv: View,
    b: View,
    a: View,
    a_log: View,
    dt_bias: View,
    tokens: usize,
}

impl Views {
    pub(super) fn of(inputs: &Inputs<'_>) -> Self {
        let &InputsIn { qkv, b, a, a_log, dt_bias } = inputs;
        let tokens = qkv.dims()[0];
        let [qkv, b, a] = [qkv, b, a].map(View::of);
        Self { qkv, b, a, a_log: View::of(a_log), dt_bias: View::of(dt_bias), tokens }
    }

    pub(super) fn operands(&self, heads: DeltaHeads) -> Operands<'_> {
        let Self { qkv, b, a, a_log, dt_bias, tokens } = self;
        let (qkv, b, a) = (qkv.as_slice(), b.as_slice(), a.as_slice());
        Operands { qkv, b, a, a_log: a_log.as_slice(), dt_bias: dt_bias.as_slice(), tokens: *tokens, heads }
    }
}

/// The operands' elements, row after row.
pub(super) struct Operands<'a> {
    pub(super) qkv: &'a [f32],
    pub(super) b: &'a [f32],
    pub(super) a: &'a [f32],
    pub(super) a_log: &'a [f32],
    pub(super) dt_bias: &'a [f32],
    pub(super) tokens: usize,
    pub(super) heads: DeltaHeads,
}

impl Operands<'_> {
    /// The query (`part` 0) or key (1) of a token.
    pub(super) fn key(&self, part: usize, key_head: usize, token: usize) -> &[f32] {
        let heads = self.heads;
        &self.qkv[token * heads.width() + part * heads.key_width() + key_head * heads.key_dim..][..heads.key_dim]
    }

    pub(super) fn value(&self, head: usize, token: usize) -> &[f32] {
        let heads = self.heads;
        &self.qkv[token * heads.width() + 2 * heads.key_width() + head * heads.value_dim..][..heads.value_dim]
    }

    /// −e^A and a + dt_bias; g is the first times the softplus of the second.
    pub(super) fn decay(&self, head: usize, token: usize) -> (f32, f32) {
        (-self.a_log[head].exp(), self.a[token * self.heads.value_heads + head] + self.dt_bias[head])
    }
}

/// The quantities of a chunk's tokens for one value head.
pub(super) struct Chunk {
    pub(super) heads: DeltaHeads,
    pub(super) first: usize,
    pub(super) rows: usize,
    /// Q̂ and K̂ `[rows, key_dim]`.
    pub(super) q: Vec<f32>,
    pub(super) k: Vec<f32>,
    pub(super) beta: Vec<f32>,
    /// G. Of two large sums the difference counts, which `f32` would round away.
    pub(super) cum: Vec<f64>,
    /// tril₋₁(D ∘ K̂K̂ᵀ), which is L without β, and P `[rows, rows]`.
    pub(super) lower: Vec<f32>,
    pub(super) scores: Vec<f32>,
    /// Δ `[rows, value_dim]`.
    pub(super) delta: Vec<f32>,
}

impl Chunk {
    pub(super) fn new(heads: DeltaHeads, length: usize) -> Self {
        let most = CHUNK.min(length);
        let zeros = |n| vec![0.0; n];
        Self {
            heads,
            first: 0,
            rows: 0,
            q: zeros(most * heads.key_dim),
            k: zeros(most * heads.key_dim),
            beta: zeros(most),
            cum: vec![0.0; most],
            lower: zeros(most * most),
            scores: zeros(most * most),
            delta: zeros(most * heads.value_dim),
        }
    }

    /// Elements of the buffers of [`Chunk::new`].
    pub(super) fn elements(heads: DeltaHeads, length: usize) -> usize {
        let most = CHUNK.min(length);
        most * (2 * heads.key_dim + heads.value_dim + 3 + 2 * most)
    }

    /// Computes what no state takes part in, of `rows` tokens from `first` on.
    pub(super) fn read(&mut self, operands: &Operands<'_>, head: usize, first: usize, rows: usize) {
        let DeltaHeads { key_dim: dk, value_heads, .. } = self.heads;
        let key_head = head / self.heads.group();
        (self.first, self.rows) = (first, rows);
        let mut sum = 0f64;
        for i in 0..rows {
            for (part, to, factor) in [(0, &mut self.q, key_scale(dk)), (1, &mut self.k, 1.0)] {
                let x = operands.key(part, key_head, first + i);
                let by = factor * inverse_norm(x);
                for (to, x) in to[i * dk..][..dk].iter_mut().zip(x) {
                    *to = x * by;
                }
            }
            self.beta[i] = sigmoid(operands.b[(first + i) * value_heads + head]);
            let (rate, x) = operands.decay(head, first + i);
            sum += f64::from(rate * softplus(x));
            self.cum[i] = sum;
        }
        let (q, k) = (Mat::rows(&self.q, dk), Mat::rows(&self.k, dk));
        gemm(&mut self.scores, rows, (rows, rows, dk), 0.0, 1.0, q, k.t());
        gemm(&mut self.lower, rows, (rows, rows, dk), 0.0, 1.0, k, k.t());
        for i in 0..rows {
            let (scores, lower) = (&mut self.scores[i * rows..][..rows], &mut self.lower[i * rows..][..rows]);
            for j in 0..i {
                let decay = e(self.cum[i] - self.cum[j]);
                scores[j] *= decay;
                lower[j] *= decay;
            }
            scores[i + 1..].fill(0.0);
            lower[i..].fill(0.0);
        }
    }

    /// Computes Δ from the state before the chunk.
    pub(super) fn solve(&mut self, operands: &Operands<'_>, head: usize, state: &[f32]) {
        let DeltaHeads { key_dim: dk, value_dim: dv, .. } = self.heads;
        let (rows, first) = (self.rows, self.first);
        gemm(&mut self.delta, dv, (rows, dv, dk), 0.0, 1.0, Mat::rows(&self.k, dk), Mat::rows(state, dv));
        for i in 0..rows {
            let (beta, gamma) = (self.beta[i], e(self.cum[i]));
            for (d, v) in self.delta[i * dv..][..dv].iter_mut().zip(operands.value(head, first + i)) {
                *d = beta * (v - gamma * *d);
            }
        }
        let (lower, beta) = (&self.lower, &self.beta);
        simd(
            #[inline(always)]
            || {
                for i in 1..rows {
                    let (solved, row) = self.delta.split_at_mut(i * dv);
                    for (j, solved) in solved.chunks_exact(dv).enumerate() {
                        add(&mut row[..dv], solved, -beta[i] * lower[i * rows + j]);
                    }
                }
            },
        );
    }

    /// Turns the state before the chunk into that after it.
    pub(super) fn advance(&mut self, state: &mut [f32]) {
        let DeltaHeads { key_dim: dk, value_dim: dv, .. } = self.heads;
        let (rows, last) = (self.rows, self.cum[self.rows - 1]);
        scale(state, e(last));
        for (row, cum) in self.delta.chunks_exact_mut(dv).zip(&self.cum[..rows]) {
            scale(row, e(last - cum));
        }
        gemm(state, dv, (dk, dv, rows), 1.0, 1.0, Mat::rows(&self.k, dk).t(), Mat::rows(&self.delta, dv));
    }
}

/// x ← (I + L)⁻ᵀ·x.
pub(super) fn solve_transposed(lower: &[f32], beta: &[f32], x: &mut [f32], width: usize) {
    let rows = beta.len();
    simd(
        #[inline(always)]
        || {
            for i in (1..rows).rev() {
                let (others, row) = x.split_at_mut(i * width);
                for (j, other) in others.chunks_exact_mut(width).enumerate() {
                    add(other, &row[..width], -beta[i] * lower[i * rows + j]);
                }
            }
        },
    );
}

/// `a + by · b`.
#[inline(always)]
pub(super) fn add(a: &mut [f32], b: &[f32], by: f32) {
    for (a, b) in a.iter_mut().zip(b) {
        *a += by * b;
    }
}

pub(super) fn scale(row: &mut [f32], by: f32) {
    for x in row {
        *x *= by;
    }
}

/// e^x of a difference of sums.
pub(super) fn e(x: f64) -> f32 {
    (x as f32).exp()
}

pub(super) fn inverse_norm(x: &[f32]) -> f32 {
    1.0 / (dot(x, x) + EPS as f32).sqrt()
}

pub(super) fn key_scale(key_dim: usize) -> f32 {
    1.0 / (key_dim as f32).sqrt()
}

pub(super) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

pub(super) fn softplus(x: f32) -> f32 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}
