//! Attention over slices: a task is one block of queries of one head (forward) or one key/value head
//! of one document (backward). The formulas stand in [`super`].
#![allow(unsafe_code)]

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{Document, Heads, QUERIES, SavedIn};
use crate::host::exp::{exp, exp_shifted};
use crate::host::{Shared, View, dot, from_vec, most_at_once, simd};
use crate::ops::matmul::cpu::{Mat, gemm, packed};

pub(crate) fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    heads: Heads,
    documents: &[Document],
) -> (Tensor<2>, Tensor<2>) {
    let Heads { heads: n, kv_heads, head_dim, scale } = heads;
    let [tokens, width] = q.dims();
    let kv_width = kv_heads * head_dim;
    let (q, k, v) = (View::of(q), View::of(k), View::of(v));
    let (q, k, v) = (q.as_slice(), k.as_slice(), v.as_slice());
    let mut out = vec![0.0; tokens * width];
    let mut lse = vec![0.0; n * tokens];
    let (o_out, lse_out) = (Shared::new(&mut out), Shared::new(&mut lse));
    let tasks: Vec<(Document, usize, usize)> = documents
        .iter()
        .flat_map(|&d| (0..d.queries).step_by(QUERIES).flat_map(move |first| (0..n).map(move |h| (d, first, h))))
        .collect();
    tasks.into_par_iter().for_each(|(document, first, head)| {
        let rows = QUERIES.min(document.queries - first);
        let keys = document.past + first + rows;
        let at = (document.query + first) * width + head * head_dim;
        let kv_at = document.key * kv_width + head / (n / kv_heads) * head_dim;
        let mut scores = vec![0.0; rows * keys];
        let key = Mat::rows(&k[kv_at..], kv_width);
        gemm(&mut scores, keys, (rows, keys, head_dim), 0.0, scale, Mat::rows(&q[at..], width), key.t());
        let mut lses = [0f32; QUERIES];
        simd(
            #[inline(always)]
            || {
                for (i, row) in scores.chunks_exact_mut(keys).enumerate() {
                    let seen = keys - rows + i + 1;
                    lses[i] = softmax(&mut row[..seen]);
                    row[seen..].fill(0.0);
                }
            },
        );
        let value = Mat::rows(&v[kv_at..], kv_width);
        let mut block = vec![0.0; rows * head_dim];
        gemm(&mut block, head_dim, (rows, head_dim, keys), 0.0, 1.0, Mat::rows(&scores, keys), value);
        // SAFETY: this task alone owns its head's channels of its rows, and its entries of lse.
        unsafe {
            for (i, row) in block.chunks_exact(head_dim).enumerate() {
                o_out.at(at + i * width).copy_from_nonoverlapping(row.as_ptr(), head_dim);
            }
            lse_out.at(head * tokens + document.query + first).copy_from_nonoverlapping(lses.as_ptr(), rows);
        }
    });
    (from_vec(out, [tokens, width]), from_vec(lse, [n, tokens]))
}

pub(crate) fn backward(
    d_o: &Tensor<2>,
    saved: &SavedIn<'_, Tensor<2>>,
    heads: Heads,
    cu_seqlens: &[u32],
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let Heads { heads: n, kv_heads, head_dim, scale } = heads;
    let [tokens, width] = d_o.dims();
    let kv_width = kv_heads * head_dim;
    let (q, k, v, o) = (View::of(saved.q), View::of(saved.k), View::of(saved.v), View::of(saved.o));
    let (d_o, lse) = (View::of(d_o), View::of(saved.lse));
    let (q, k, v, o) = (q.as_slice(), k.as_slice(), v.as_slice(), o.as_slice());
    let (d_o, lse) = (d_o.as_slice(), lse.as_slice());
    let (mut dq, mut dk, mut dv) =
        (vec![0.0; tokens * width], vec![0.0; tokens * kv_width], vec![0.0; tokens * kv_width]);
    let (dq_out, dk_out, dv_out) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
    let tasks: Vec<(usize, usize, usize)> = cu_seqlens
        .windows(2)
        .filter(|w| w[0] < w[1])
        .flat_map(|w| (0..kv_heads).map(move |g| (w[0] as usize, (w[1] - w[0]) as usize, g)))
        .collect();
    tasks.into_par_iter().for_each(|(start, length, kv_head)| {
        let kv_at = start * kv_width + kv_head * head_dim;
        let (key, value) = (Mat::rows(&k[kv_at..], kv_width), Mat::rows(&v[kv_at..], kv_width));
        let (mut dk, mut dv) = (vec![0.0; length * head_dim], vec![0.0; length * head_dim]);
        let group = n / kv_heads;
        for head in kv_head * group..(kv_head + 1) * group {
            for first in (0..length).step_by(QUERIES) {
                let rows = QUERIES.min(length - first);
                let keys = first + rows;
                let at = (start + first) * width + head * head_dim;
                let query = Mat::rows(&q[at..], width);
                let grad = Mat::rows(&d_o[at..], width);
                let (mut p, mut ds) = (vec![0.0; rows * keys], vec![0.0; rows * keys]);
                gemm(&mut p, keys, (rows, keys, head_dim), 0.0, scale, query, key.t());
                gemm(&mut ds, keys, (rows, keys, head_dim), 0.0, 1.0, grad, value.t());
                let lse = &lse[head * tokens + start + first..][..rows];
                simd(
                    #[inline(always)]
                    || {
                        for i in 0..rows {
                            let seen = first + i + 1;
                            let (p, ds) = (&mut p[i * keys..][..keys], &mut ds[i * keys..][..keys]);
                            let row = at + i * width;
                            let d = dot(&d_o[row..][..head_dim], &o[row..][..head_dim]);
                            for (p, ds) in p[..seen].iter_mut().zip(&mut ds[..seen]) {
                                *p = exp(*p - lse[i]);
                                *ds = *p * (*ds - d);
                            }
                            p[seen..].fill(0.0);
                            ds[seen..].fill(0.0);
                        }
                    },
                );
                let (p, ds) = (Mat::rows(&p, keys), Mat::rows(&ds, keys));
                gemm(&mut dv, head_dim, (keys, head_dim, rows), 1.0, 1.0, p.t(), grad);
                gemm(&mut dk, head_dim, (keys, head_dim, rows), 1.0, scale, ds.t(), query);
                let mut block = vec![0.0; rows * head_dim];
                gemm(&mut block, head_dim, (rows, head_dim, keys), 0.0, scale, ds, key);
                for (i, row) in block.chunks_exact(head_dim).enumerate() {
                    // SAFETY: this task alone owns these heads' channels of this document's rows.
                    unsafe { dq_out.at(at + i * width).copy_from_nonoverlapping(row.as_ptr(), head_dim) };
                }
            }
        }
        for i in 0..length {
            // SAFETY: as above, for the key/value head.
            unsafe {
                let at = kv_at + i * kv_width;
                dk_out.at(at).copy_from_nonoverlapping(dk[i * head_dim..].as_ptr(), head_dim);
                dv_out.at(at).copy_from_nonoverlapping(dv[i * head_dim..].as_ptr(), head_dim);
            }
        }
    });
    (from_vec(dq, [tokens, width]), from_vec(dk, [tokens, kv_width]), from_vec(dv, [tokens, kv_width]))
}

/// Bytes that the tasks of [`forward`] allocate at a time.
pub(super) fn forward_scratch(heads: Heads, documents: &[Document]) -> usize {
    let Heads { heads: n, head_dim, .. } = heads;
    let tasks = documents.iter().flat_map(|d| {
        (0..d.queries).step_by(QUERIES).flat_map(move |first| {
            let rows = QUERIES.min(d.queries - first);
            let keys = d.past + first + rows;
            let scores = packed((rows, keys, head_dim), true, false);
            let values = rows * head_dim + packed((rows, head_dim, keys), true, true);
            core::iter::repeat_n(size_of::<f32>() * (rows * keys + scores.max(values)), n)
        })
    });
    most_at_once(tasks.collect())
}

/// Bytes that the tasks of [`backward`] allocate at a time.
pub(super) fn backward_scratch(heads: Heads, cu_seqlens: &[u32]) -> usize {
    let Heads { kv_heads, head_dim, .. } = heads;
    let lengths = cu_seqlens.windows(2).map(|w| (w[1] - w[0]) as usize);
    let tasks = lengths.flat_map(|length| {
        let rows = QUERIES.min(length);
        let scores = packed((rows, length, head_dim), true, false);
        let keys = packed((length, head_dim, rows), false, true);
        let queries = rows * head_dim + packed((rows, head_dim, length), true, true);
        let elements = 2 * length * head_dim + 2 * rows * length + scores.max(keys).max(queries);
        core::iter::repeat_n(size_of::<f32>() * elements, kv_heads)
    });
    most_at_once(tasks.collect())
}

/// Turns scores into probabilities; returns the logarithm of the denominator.
#[inline(always)]
fn softmax(row: &mut [f32]) -> f32 {
    let (max, sum) = exp_shifted(row);
    let scale = 1.0 / sum;
    for p in row.iter_mut() {
        *p *= scale;
    }
    max + sum.ln()
}
