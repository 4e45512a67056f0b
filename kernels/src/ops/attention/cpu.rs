//! Attention over slices: a task is one block of queries of one head (forward) or one key/value head
//! of one document (backward). The formulas stand in [`super`].
#![allow(unsafe_code)]

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{AttentionGrads, Document, Heads, QUERIES, QueryBlock, SavedIn};
use crate::host::exp::{exp, exp_shifted, tanh};
use crate::host::{Shared, View, dot, from_vec, most_at_once, simd};
use crate::ops::matmul::cpu::{Mat, gemm, packed};

pub(crate) fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    documents: &[Document],
) -> (Tensor<2>, Tensor<2>) {
    let Heads { heads: n, kv_heads, head_dim, softcap, .. } = heads;
    let [tokens, width] = q.dims();
    let kv_width = kv_heads * head_dim;
    let (q, k, v) = (View::of(q), View::of(k), View::of(v));
    let (q, k, v) = (q.as_slice(), k.as_slice(), v.as_slice());
    let sinks = sinks.map(View::of);
    let sinks = sinks.as_ref().map(View::as_slice);
    let mut out = vec![0.0; tokens * width];
    let mut lse = vec![0.0; n * tokens];
    let (o_out, lse_out) = (Shared::new(&mut out), Shared::new(&mut lse));
    let tasks: Vec<(QueryBlock, usize)> = documents
        .iter()
        .flat_map(|document| document.blocks(heads).flat_map(|block| (0..n).map(move |head| (block.clone(), head))))
        .collect();
    tasks.into_par_iter().for_each(|(block, head)| {
        let (rows, keys) = (block.rows, block.keys.len());
        let at = block.query * width + head * head_dim;
        let kv_at = block.key * kv_width + head / (n / kv_heads) * head_dim;
        let mut scores = vec![0.0; rows * keys];
        let key = Mat::rows(&k[kv_at..], kv_width);
        gemm(&mut scores, keys, (rows, keys, head_dim), 0.0, factor(heads), Mat::rows(&q[at..], width), key.t());
        let mut lses = [0f32; QUERIES];
        let sink = sinks.map(|sinks| sinks[head]);
        simd(
            #[inline(always)]
            || {
                for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
                    let seen = block.seen(i);
                    row[..seen.start].fill(0.0);
                    row[seen.end..].fill(0.0);
                    let row = &mut row[seen];
                    if let Some(softcap) = softcap {
                        row.iter_mut().for_each(|s| *s = softcap * tanh(*s));
                    }
                    lses[i] = softmax(row, sink);
                }
            },
        );
        let value = Mat::rows(&v[kv_at..], kv_width);
        let mut result = vec![0.0; rows * head_dim];
        gemm(&mut result, head_dim, (rows, head_dim, keys), 0.0, 1.0, Mat::rows(&scores, keys), value);
        // SAFETY: this task alone owns its head's channels of its rows, and its entries of lse.
        unsafe {
            for (i, row) in result.chunks_exact(head_dim).enumerate() {
                o_out.at(at + i * width).copy_from_nonoverlapping(row.as_ptr(), head_dim);
            }
            lse_out.at(head * tokens + block.query).copy_from_nonoverlapping(lses.as_ptr(), rows);
        }
    });
    (from_vec(out, [tokens, width]), from_vec(lse, [n, tokens]))
}

pub(crate) fn backward(
    d_o: &Tensor<2>,
    saved: &SavedIn<'_, Tensor<2>>,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    documents: &[Document],
) -> AttentionGrads<Tensor<2>, Tensor<1>> {
    let Heads { heads: n, kv_heads, head_dim, scale, softcap, .. } = heads;
    let [tokens, width] = d_o.dims();
    let kv_width = kv_heads * head_dim;
    let (q, k, v, o) = (View::of(saved.q), View::of(saved.k), View::of(saved.v), View::of(saved.o));
    let (d_o, lse) = (View::of(d_o), View::of(saved.lse));
    let (q, k, v, o) = (q.as_slice(), k.as_slice(), v.as_slice(), o.as_slice());
    let (d_o, lse) = (d_o.as_slice(), lse.as_slice());
    let (mut dq, mut dk, mut dv) =
        (vec![0.0; tokens * width], vec![0.0; tokens * kv_width], vec![0.0; tokens * kv_width]);
    let (dq_out, dk_out, dv_out) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
    let tasks: Vec<(Document, usize)> = documents
        .iter()
        .filter(|document| document.queries > 0)
        .flat_map(|&document| (0..kv_heads).map(move |kv_head| (document, kv_head)))
        .collect();
    tasks.into_par_iter().for_each(|(document, kv_head)| {
        let length = document.queries;
        let (mut dk, mut dv) = (vec![0.0; length * head_dim], vec![0.0; length * head_dim]);
        let group = n / kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for block in document.blocks(heads) {
                let (rows, keys) = (block.rows, block.keys.len());
                let at = block.query * width + head * head_dim;
                let kv_at = block.key * kv_width + kv_head * head_dim;
                let (key, value) = (Mat::rows(&k[kv_at..], kv_width), Mat::rows(&v[kv_at..], kv_width));
                let query = Mat::rows(&q[at..], width);
                let grad = Mat::rows(&d_o[at..], width);
                let (mut p, mut ds) = (vec![0.0; rows * keys], vec![0.0; rows * keys]);
                gemm(&mut p, keys, (rows, keys, head_dim), 0.0, factor(heads), query, key.t());
                gemm(&mut ds, keys, (rows, keys, head_dim), 0.0, 1.0, grad, value.t());
                let lse = &lse[head * tokens + block.query..][..rows];
                simd(
                    #[inline(always)]
                    || {
                        for i in 0..rows {
                            let seen = block.seen(i);
                            let (p, ds) = (&mut p[i * keys..][..keys], &mut ds[i * keys..][..keys]);
                            for row in [&mut *p, &mut *ds] {
                                row[..seen.start].fill(0.0);
                                row[seen.end..].fill(0.0);
                            }
                            let (p, ds) = (&mut p[seen.clone()], &mut ds[seen]);
                            let row = at + i * width;
                            let d = dot(&d_o[row..][..head_dim], &o[row..][..head_dim]);
                            match softcap {
                                None => {
                                    for (p, ds) in p.iter_mut().zip(ds) {
                                        *p = exp(*p - lse[i]);
                                        *ds = *p * (*ds - d);
                                    }
                                }
                                Some(softcap) => {
                                    for (p, ds) in p.iter_mut().zip(ds) {
                                        let t = tanh(*p);
                                        *p = exp(softcap * t - lse[i]);
                                        *ds = *p * (*ds - d) * (1.0 - t * t);
                                    }
                                }
                            }
                        }
                    },
                );
                let (p, ds) = (Mat::rows(&p, keys), Mat::rows(&ds, keys));
                let first = block.keys.start * head_dim;
                gemm(&mut dv[first..], head_dim, (keys, head_dim, rows), 1.0, 1.0, p.t(), grad);
                gemm(&mut dk[first..], head_dim, (keys, head_dim, rows), 1.0, scale, ds.t(), query);
                let mut result = vec![0.0; rows * head_dim];
                gemm(&mut result, head_dim, (rows, head_dim, keys), 0.0, scale, ds, key);
                for (i, row) in result.chunks_exact(head_dim).enumerate() {
                    // SAFETY: this task alone owns these heads' channels of this document's rows.
                    unsafe { dq_out.at(at + i * width).copy_from_nonoverlapping(row.as_ptr(), head_dim) };
                }
            }
        }
        for i in 0..length {
            // SAFETY: as above, for the key/value head.
            unsafe {
                let at = (document.key + i) * kv_width + kv_head * head_dim;
                dk_out.at(at).copy_from_nonoverlapping(dk[i * head_dim..].as_ptr(), head_dim);
                dv_out.at(at).copy_from_nonoverlapping(dv[i * head_dim..].as_ptr(), head_dim);
            }
        }
    });
    let sinks = sinks.map(|sinks| sinks_grad(View::of(sinks).as_slice(), d_o, o, lse, head_dim));
    AttentionGrads {
        q: from_vec(dq, [tokens, width]),
        k: from_vec(dk, [tokens, kv_width]),
        v: from_vec(dv, [tokens, kv_width]),
        sinks: sinks.map(|sinks| from_vec(sinks, [n])),
    }
}

/// −Σ_i exp(sink − lse_i)·(dO_i·O_i) of each head.
fn sinks_grad(sinks: &[f32], d_o: &[f32], o: &[f32], lse: &[f32], head_dim: usize) -> Vec<f32> {
    let (width, tokens) = (sinks.len() * head_dim, lse.len() / sinks.len());
    let head_grad = |head: usize| {
        simd(
            #[inline(always)]
            || {
                let row = |token: usize| token * width + head * head_dim;
                let term = |token: usize| {
                    let d = dot(&d_o[row(token)..][..head_dim], &o[row(token)..][..head_dim]);
                    f64::from(exp(sinks[head] - lse[head * tokens + token]) * d)
                };
                -(0..tokens).map(term).sum::<f64>() as f32
            },
        )
    };
    (0..sinks.len()).into_par_iter().map(head_grad).collect()
}

/// The factor of q·k: scale, or scale / c where tanh follows.
pub(crate) fn factor(heads: Heads) -> f32 {
    heads.softcap.map_or(heads.scale, |softcap| heads.scale / softcap)
}

/// Bytes that the tasks of [`forward`] allocate at a time.
pub(super) fn forward_scratch(heads: Heads, documents: &[Document]) -> usize {
    let Heads { heads: n, head_dim, .. } = heads;
    let tasks = documents.iter().flat_map(|document| {
        document.blocks(heads).flat_map(move |block| {
            let (rows, keys) = (block.rows, block.keys.len());
            let scores = packed((rows, keys, head_dim), true, false);
            let values = rows * head_dim + packed((rows, head_dim, keys), true, true);
            core::iter::repeat_n(size_of::<f32>() * (rows * keys + scores.max(values)), n)
        })
    });
    most_at_once(tasks.collect())
}

/// Bytes that the tasks of [`backward`] allocate at a time.
pub(super) fn backward_scratch(heads: Heads, documents: &[Document]) -> usize {
    let Heads { kv_heads, head_dim, .. } = heads;
    let tasks = documents.iter().flat_map(|document| {
        let length = document.queries;
        let rows = QUERIES.min(length);
        // The block with the most keys.
        let keys = heads.window.map_or(length, |window| length.min(window + rows - 1));
        let scores = packed((rows, keys, head_dim), true, false);
        let sums = packed((keys, head_dim, rows), false, true);
        let queries = rows * head_dim + packed((rows, head_dim, keys), true, true);
        let elements = 2 * length * head_dim + 2 * rows * keys + scores.max(sums).max(queries);
        core::iter::repeat_n(size_of::<f32>() * elements, kv_heads)
    });
    most_at_once(tasks.collect())
}

/// Turns scores into probabilities; returns the logarithm of the denominator, of which `sink` is a term.
#[inline(always)]
pub(crate) fn softmax(row: &mut [f32], sink: Option<f32>) -> f32 {
    let (max, sum) = exp_shifted(row);
    let (shrink, top, sum) = match sink {
        None => (1.0, max, sum),
        Some(sink) => {
            let top = max.max(sink);
            let shrink = exp(max - top);
            (shrink, top, sum.mul_add(shrink, exp(sink - top)))
        }
    };
    let scale = shrink / sum;
    for p in row.iter_mut() {
        *p *= scale;
    }
    top + sum.ln()
}
