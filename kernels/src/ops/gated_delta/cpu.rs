//! The gated delta rule over slices: a task is one value head (forward) or one key head (backward) of one document. The
//! formulas stand in [`super`].
#![allow(unsafe_code)]

mod chunk;

use burn::tensor::Tensor;
use rayon::prelude::*;

use chunk::{Chunk, Operands, Views, add, e, inverse_norm, key_scale, scale, sigmoid, softplus, solve_transposed};

use super::{CHUNK, DeltaHeads, GradsIn, InputsIn, Sequences};
use crate::host::{Shared, View, dot, from_vec, into_vec, most_at_once};
use crate::ops::matmul::cpu::{Mat, gemm, packed};

type Inputs<'a> = InputsIn<'a, Tensor<2>, Tensor<1>>;

/// `(o, states)`; the states before the first token and after the last are those of one document.
pub(crate) fn forward(
    inputs: &Inputs<'_>,
    heads: DeltaHeads,
    sequences: &Sequences,
    start: Option<Tensor<2>>,
) -> (Tensor<2>, Tensor<2>) {
    let views = Views::of(inputs);
    let operands = views.operands(heads);
    let DeltaHeads { value_heads, key_dim: dk, value_dim: dv, .. } = heads;
    let (tokens, width) = (operands.tokens, heads.value_width());
    let mut out = vec![0.0; tokens * width];
    let mut states = start.map_or_else(|| vec![0.0; value_heads * dk * dv], into_vec);
    let (o_out, states_out) = (Shared::new(&mut out), Shared::new(&mut states));
    let documents: Vec<_> = sequences.documents().collect();
    let alone = documents.len() == 1;
    let tasks = documents.into_iter().flat_map(|document| (0..value_heads).map(move |head| (document, head)));
    tasks.collect::<Vec<_>>().into_par_iter().for_each(|((start, length), head)| {
        let mut state = vec![0.0; dk * dv];
        let mut chunk = Chunk::new(heads, length);
        // SAFETY: this task alone reads and writes the state of its head, where there is one document.
        let own = alone.then(|| unsafe { core::slice::from_raw_parts_mut(states_out.at(head * dk * dv), dk * dv) });
        if let Some(own) = &own {
            state.copy_from_slice(own);
        }
        let mut block = vec![0.0; CHUNK.min(length) * dv];
        for first in (0..length).step_by(CHUNK) {
            chunk.read(&operands, head, start + first, CHUNK.min(length - first));
            chunk.solve(&operands, head, &state);
            let rows = chunk.rows;
            let s = Mat::rows(&state, dv);
            gemm(&mut block, dv, (rows, dv, dk), 0.0, 1.0, Mat::rows(&chunk.q, dk), s);
            for (row, cum) in block.chunks_exact_mut(dv).zip(&chunk.cum[..rows]) {
                scale(row, e(*cum));
            }
            let scores = Mat::rows(&chunk.scores, rows);
            gemm(&mut block, dv, (rows, dv, rows), 1.0, 1.0, scores, Mat::rows(&chunk.delta, dv));
            for (i, row) in block.chunks_exact(dv).take(rows).enumerate() {
                // SAFETY: this task alone owns its head's channels of its document's rows.
                unsafe {
                    let to = o_out.at((start + first + i) * width + head * dv);
                    to.copy_from_nonoverlapping(row.as_ptr(), dv);
                }
            }
            chunk.advance(&mut state);
        }
        if let Some(own) = own {
            own.copy_from_slice(&state);
        }
    });
    (from_vec(out, [tokens, width]), from_vec(states, [value_heads * dk, dv]))
}

pub(crate) fn backward(
    d_o: &Tensor<2>,
    inputs: &Inputs<'_>,
    heads: DeltaHeads,
    sequences: &Sequences,
) -> GradsIn<Tensor<2>, Tensor<1>> {
    let views = Views::of(inputs);
    let operands = views.operands(heads);
    let d_o = View::of(d_o);
    let d_o = d_o.as_slice();
    let DeltaHeads { key_heads, value_heads, .. } = heads;
    let (tokens, width) = (operands.tokens, heads.width());
    let mut dqkv = vec![0.0; tokens * width];
    let (mut db, mut da) = (vec![0.0; tokens * value_heads], vec![0.0; tokens * value_heads]);
    let outs = Outs { qkv: Shared::new(&mut dqkv), b: Shared::new(&mut db), a: Shared::new(&mut da) };
    let documents = sequences.documents();
    let tasks: Vec<_> =
        documents.flat_map(|document| (0..key_heads).map(move |key_head| (document, key_head))).collect();
    let sums: Vec<Vec<[f64; 2]>> = tasks
        .par_iter()
        .map(|&((start, length), key_head)| backward_of(&operands, d_o, start, length, key_head, outs))
        .collect();
    let (mut d_a_log, mut d_dt_bias) = (vec![0f64; value_heads], vec![0f64; value_heads]);
    for ((_, key_head), sums) in tasks.iter().zip(sums) {
        for (member, [to_log, to_bias]) in sums.into_iter().enumerate() {
            d_a_log[key_head * heads.group() + member] += to_log;
            d_dt_bias[key_head * heads.group() + member] += to_bias;
        }
    }
    GradsIn {
        qkv: from_vec(dqkv, [tokens, width]),
        b: from_vec(db, [tokens, value_heads]),
        a: from_vec(da, [tokens, value_heads]),
        a_log: narrowed(d_a_log),
        dt_bias: narrowed(d_dt_bias),
    }
}

fn narrowed(values: Vec<f64>) -> Tensor<1> {
    let n = values.len();
    from_vec(values.into_iter().map(|value| value as f32).collect(), [n])
}

/// The results of the backward, each written by the task that owns its channels of its rows.
#[derive(Clone, Copy)]
struct Outs {
    qkv: Shared,
    b: Shared,
    a: Shared,
}

/// The gradients of a document and a key head; returns those to a_log and dt_bias of each value head of its group.
fn backward_of(
    operands: &Operands<'_>,
    d_o: &[f32],
    start: usize,
    length: usize,
    key_head: usize,
    outs: Outs,
) -> Vec<[f64; 2]> {
    let heads = operands.heads;
    let DeltaHeads { key_dim: dk, value_dim: dv, value_heads, .. } = heads;
    let most = CHUNK.min(length);
    let chunks = length.div_ceil(CHUNK);
    let (mut dq, mut dk_sum) = (vec![0.0; length * dk], vec![0.0; length * dk]);
    let mut states = vec![0.0; chunks * dk * dv];
    let mut end = vec![0.0; dk * dv];
    let mut chunk = Chunk::new(heads, length);
    let (mut grad, mut d_delta) = (vec![0.0; most * dv], vec![0.0; most * dv]);
    let (mut by_queries, mut by_keys) = (vec![0.0; most * most], vec![0.0; most * most]);
    let [mut from_queries, mut reader, mut writer] = [(); 3].map(|()| vec![0.0; most * dk]);
    let mut sums = Vec::with_capacity(heads.group());
    for head in key_head * heads.group()..(key_head + 1) * heads.group() {
        for (i, first) in (0..length).step_by(CHUNK).enumerate().take(chunks - 1) {
            let (before, after) = states[i * dk * dv..].split_at_mut(dk * dv);
            if i == 0 {
                before.fill(0.0);
            }
            chunk.read(operands, head, start + first, CHUNK);
            chunk.solve(operands, head, before);
            after[..dk * dv].copy_from_slice(before);
            chunk.advance(&mut after[..dk * dv]);
        }
        end.fill(0.0);
        let mut sum = [0f64; 2];
        for (i, first) in (0..length).step_by(CHUNK).enumerate().rev() {
            let rows = CHUNK.min(length - first);
            let state = &states[i * dk * dv..][..dk * dv];
            chunk.read(operands, head, start + first, rows);
            chunk.solve(operands, head, state);
            let at = (start + first) * heads.value_width() + head * dv;
            for (i, row) in grad.chunks_exact_mut(dv).take(rows).enumerate() {
                row.copy_from_slice(&d_o[at + i * heads.value_width()..][..dv]);
            }
            let Chunk { q, k, beta, cum, lower, scores, delta, .. } = &chunk;
            let (q, k, delta) = (Mat::rows(q, dk), Mat::rows(k, dk), Mat::rows(delta, dv));
            let last = cum[rows - 1];
            // dΔ, and in its place dV.
            gemm(&mut d_delta, dv, (rows, dv, dk), 0.0, 1.0, k, Mat::rows(&end, dv));
            for (row, cum) in d_delta.chunks_exact_mut(dv).zip(&cum[..rows]) {
                scale(row, e(last - cum));
            }
            let grad_o = Mat::rows(&grad, dv);
            gemm(&mut d_delta, dv, (rows, dv, rows), 1.0, 1.0, Mat::rows(scores, rows).t(), grad_o);
            solve_transposed(lower, &beta[..rows], &mut d_delta, dv);
            for (row, beta) in d_delta.chunks_exact_mut(dv).zip(&beta[..rows]) {
                scale(row, *beta);
            }
            let dv_rows = Mat::rows(&d_delta, dv);
            gemm(&mut by_queries, rows, (rows, rows, dv), 0.0, 1.0, grad_o, delta.t());
            gemm(&mut by_keys, rows, (rows, rows, dv), 0.0, -1.0, dv_rows, delta.t());
            // What the decays between two tokens get, summed over the later tokens of pairs and then over the earlier ones.
            let mut across = [0f64; CHUNK];
            for i in 0..rows {
                let (x, y) = (&mut by_queries[i * rows..][..rows], &mut by_keys[i * rows..][..rows]);
                let mut sum = 0f64;
                for j in 0..i {
                    sum += f64::from(x[j] * scores[i * rows + j] + y[j] * lower[i * rows + j]);
                    across[j + 1] += sum;
                    let decay = e(cum[i] - cum[j]);
                    x[j] *= decay;
                    y[j] *= decay;
                }
                x[i + 1..].fill(0.0);
                y[i..].fill(0.0);
            }
            let (b, m) = (Mat::rows(&by_queries, rows), Mat::rows(&by_keys, rows));
            let turned = Mat::rows(state, dv).t();
            gemm(&mut from_queries, dk, (rows, dk, dv), 0.0, 1.0, grad_o, turned);
            gemm(&mut reader, dk, (rows, dk, dv), 0.0, -1.0, dv_rows, turned);
            gemm(&mut writer, dk, (rows, dk, dv), 0.0, 1.0, delta, Mat::rows(&end, dv).t());
            let along = f64::from(e(last) * dot(state, &end));
            // What γ and c get: sums from a token on, and up to the one before it.
            let (mut from, mut before) = ([0f64; CHUNK], [0f64; CHUNK]);
            for i in 0..rows {
                scale(&mut from_queries[i * dk..][..dk], e(cum[i]));
                scale(&mut reader[i * dk..][..dk], e(cum[i]));
                scale(&mut writer[i * dk..][..dk], e(last - cum[i]));
                let (q, k) = (&chunk.q[i * dk..][..dk], &chunk.k[i * dk..][..dk]);
                from[i] = f64::from(dot(q, &from_queries[i * dk..][..dk]) + dot(k, &reader[i * dk..][..dk]));
                if i + 1 < rows {
                    before[i + 1] = before[i] + f64::from(dot(k, &writer[i * dk..][..dk]));
                }
            }
            for i in (1..rows).rev() {
                from[i - 1] += from[i];
            }
            gemm(&mut from_queries, dk, (rows, dk, rows), 1.0, 1.0, b, k);
            gemm(&mut reader, dk, (rows, dk, rows), 1.0, 1.0, m, k);
            gemm(&mut writer, dk, (rows, dk, rows), 1.0, 1.0, b.t(), q);
            gemm(&mut writer, dk, (rows, dk, rows), 1.0, 1.0, m.t(), k);
            for i in 0..rows {
                let token = start + first + i;
                let (xq, xr, xw) = (&from_queries[i * dk..][..dk], &reader[i * dk..][..dk], &writer[i * dk..][..dk]);
                let read = dot(&chunk.k[i * dk..][..dk], xr);
                let dg = (along + from[i] + before[i] + across[i]) as f32;
                let (rate, x) = operands.decay(head, token);
                let to_a = dg * rate * sigmoid(x);
                sum[0] += f64::from(dg * rate * softplus(x));
                sum[1] += f64::from(to_a);
                let value = &d_delta[i * dv..][..dv];
                let db = (1.0 - beta[i]) * (dot(operands.value(head, token), value) + read);
                // SAFETY: this task alone owns these channels of its document's rows.
                unsafe {
                    *outs.a.at(token * value_heads + head) = to_a;
                    *outs.b.at(token * value_heads + head) = db;
                    let to = outs.qkv.at(token * heads.width() + 2 * heads.key_width() + head * dv);
                    to.copy_from_nonoverlapping(value.as_ptr(), dv);
                }
                let row = (first + i) * dk;
                add(&mut dq[row..][..dk], xq, 1.0);
                add(&mut dk_sum[row..][..dk], xr, 1.0);
                add(&mut dk_sum[row..][..dk], xw, 1.0);
            }
            // E of the chunk before.
            scale(&mut end, e(last));
            for (i, cum) in cum[..rows].iter().enumerate() {
                scale(&mut grad[i * dv..][..dv], e(*cum));
                scale(&mut d_delta[i * dv..][..dv], -e(*cum));
            }
            gemm(&mut end, dv, (dk, dv, rows), 1.0, 1.0, q.t(), Mat::rows(&grad, dv));
            gemm(&mut end, dv, (dk, dv, rows), 1.0, 1.0, k.t(), Mat::rows(&d_delta, dv));
        }
        sums.push(sum);
    }
    // Through the L2 norms.
    for i in 0..length {
        let token = start + i;
        for (part, grad, factor) in [(0, &mut dq, key_scale(dk)), (1, &mut dk_sum, 1.0)] {
            let x = operands.key(part, key_head, token);
            let r = inverse_norm(x);
            let row = &mut grad[i * dk..][..dk];
            let along = r * r * dot(row, x);
            for (g, x) in row.iter_mut().zip(x) {
                *g = factor * r * (*g - x * along);
            }
            // SAFETY: as above.
            unsafe {
                let to = outs.qkv.at(token * heads.width() + part * heads.key_width() + key_head * dk);
                to.copy_from_nonoverlapping(row.as_ptr(), dk);
            }
        }
    }
    sums
}

/// Bytes that the tasks of [`forward`] allocate at a time.
pub(super) fn forward_scratch(heads: DeltaHeads, sequences: &Sequences) -> usize {
    let DeltaHeads { key_dim: dk, value_dim: dv, value_heads, .. } = heads;
    let tasks = sequences.documents().flat_map(|(_, length)| {
        let most = CHUNK.min(length);
        let elements = dk * dv + most * dv + Chunk::elements(heads, length) + products(heads, most);
        core::iter::repeat_n(size_of::<f32>() * elements, value_heads)
    });
    most_at_once(tasks.collect())
}

/// Bytes that the tasks of [`backward`] allocate at a time.
pub(super) fn backward_scratch(heads: DeltaHeads, sequences: &Sequences) -> usize {
    let DeltaHeads { key_dim: dk, value_dim: dv, key_heads, .. } = heads;
    let tasks = sequences.documents().flat_map(|(_, length)| {
        let most = CHUNK.min(length);
        let whole = 2 * length * dk + (length.div_ceil(CHUNK) + 1) * dk * dv;
        let blocks = most * (2 * dv + 2 * most + 3 * dk);
        let elements = whole + blocks + Chunk::elements(heads, length) + products(heads, most);
        core::iter::repeat_n(size_of::<f32>() * elements, key_heads)
    });
    most_at_once(tasks.collect())
}

/// Elements that the largest product of a chunk copies into its own order.
fn products(DeltaHeads { key_dim: dk, value_dim: dv, .. }: DeltaHeads, rows: usize) -> usize {
    let sizes = [(rows, rows, dk), (rows, dv, dk), (rows, dk, dv), (dk, dv, rows), (rows, dv, rows)];
    sizes.into_iter().map(|size| packed(size, false, false)).max().unwrap_or(0)
}
