//! Attention over pages in slices: a task is some queries of one key/value head of one sequence. The formulas stand in
//! [`super`].
//!
//! Every score is a dot product of its own, and values are added in the order of their positions, so that the bits of a
//! query do not depend on the queries beside it. A page of keys is read by all queries of a task while it is in the cache.
#![allow(unsafe_code)]

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{PAGE, PagedBatch, PagedSequence};
use crate::attention::Heads;
use crate::host::exp::tanh;
use crate::host::{Shared, View, dot, from_vec, most_at_once, simd, with_mut};
use crate::ops::attention::cpu::{factor, softmax};

/// Queries of a task.
const QUERIES: usize = 16;

/// Queries of one sequence, and a key/value head.
struct Task<'a> {
    sequence: &'a PagedSequence,
    /// The first query, counted from the sequence's first new token.
    first: usize,
    queries: usize,
    kv_head: usize,
}

impl Task<'_> {
    /// Returns the number of keys up to the last query's own.
    fn keys(&self) -> usize {
        self.sequence.past + self.first + self.queries
    }

    /// Returns the scores of all queries and heads of a group.
    fn scores(&self, heads: Heads) -> usize {
        self.queries * heads.heads / heads.kv_heads * self.keys()
    }
}

fn tasks(heads: Heads, batch: &PagedBatch) -> Vec<Task<'_>> {
    let mut tasks = Vec::new();
    for sequence in &batch.sequences {
        for first in (0..sequence.new).step_by(QUERIES) {
            let queries = QUERIES.min(sequence.new - first);
            tasks.extend((0..heads.kv_heads).map(|kv_head| Task { sequence, first, queries, kv_head }));
        }
    }
    tasks
}

/// Writes the rows of new tokens into the pool.
pub(super) fn write(rows: &Tensor<2>, pool: &mut Tensor<2>, batch: &PagedBatch) {
    let width = rows.dims()[1];
    let rows = View::of(rows);
    let rows = rows.as_slice();
    with_mut(pool, |pool| {
        for sequence in &batch.sequences {
            for (tokens, at) in sequence.runs(sequence.past..sequence.past + sequence.new) {
                let row = sequence.row + tokens.start - sequence.past;
                let part = &rows[row * width..][..tokens.len() * width];
                pool[at * width..][..part.len()].copy_from_slice(part);
            }
        }
    });
}

/// Copies the rows of a page.
pub(super) fn copy_page(pool: &mut Tensor<2>, from: usize, to: usize) {
    let page = PAGE * pool.dims()[1];
    with_mut(pool, |pool| pool.copy_within(from * page..(from + 1) * page, to * page));
}

pub(super) fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    batch: &PagedBatch,
) -> Tensor<2> {
    let [rows, width] = q.dims();
    let (q, k, v) = (View::of(q), View::of(k), View::of(v));
    let (q, k, v) = (q.as_slice(), k.as_slice(), v.as_slice());
    let sinks = sinks.map(View::of);
    let sinks = sinks.as_ref().map(View::as_slice);
    let mut out = vec![0.0; rows * width];
    let o = Shared::new(&mut out);
    tasks(heads, batch).into_par_iter().for_each(|task| {
        simd(
            #[inline(always)]
            || attend(&task, heads, [q, k, v], sinks, o),
        );
    });
    from_vec(out, [rows, width])
}

/// Computes the results of a task.
#[inline(always)]
fn attend(task: &Task<'_>, heads: Heads, [q, k, v]: [&[f32]; 3], sinks: Option<&[f32]>, o: Shared) {
    let Heads { heads: n, kv_heads, head_dim, softcap, .. } = heads;
    let &Task { sequence, first, queries, kv_head } = task;
    let (width, kv_width, group, factor) = (n * head_dim, kv_heads * head_dim, n / kv_heads, factor(heads));
    let keys = task.keys();
    let position = |query: usize| sequence.past + first + query;
    // Where the heads of a query's group begin in q and in o.
    let at = |query: usize| (sequence.row + first + query) * width + kv_head * group * head_dim;
    let unseen = heads.first_key(position(0));
    let mut scores = vec![0f32; queries * group * keys]; // [queries, group, keys]
    for (tokens, row) in sequence.runs(unseen..keys) {
        for query in 0..queries {
            let seen = heads.first_key(position(query)).max(tokens.start)..tokens.end.min(position(query) + 1);
            for head in 0..group {
                let q = &q[at(query) + head * head_dim..][..head_dim];
                let scores = &mut scores[(query * group + head) * keys..][..keys];
                for key in seen.clone() {
                    let k = &k[(row + key - tokens.start) * kv_width + kv_head * head_dim..][..head_dim];
                    scores[key] = factor * dot(q, k);
                }
            }
        }
    }
    for (i, scores) in scores.chunks_exact_mut(keys).enumerate() {
        let position = position(i / group);
        let scores = &mut scores[heads.first_key(position)..position + 1];
        if let Some(softcap) = softcap {
            scores.iter_mut().for_each(|s| *s = softcap * tanh(*s));
        }
        softmax(scores, sinks.map(|sinks| sinks[kv_head * group + i % group]));
    }
    let mut sums = vec![0f32; queries * group * head_dim]; // [queries, group, head_dim]
    for (tokens, row) in sequence.runs(unseen..keys) {
        for query in 0..queries {
            let seen = heads.first_key(position(query)).max(tokens.start)..tokens.end.min(position(query) + 1);
            for head in 0..group {
                let probabilities = &scores[(query * group + head) * keys..][..keys];
                let sums = &mut sums[(query * group + head) * head_dim..][..head_dim];
                for key in seen.clone() {
                    let v = &v[(row + key - tokens.start) * kv_width + kv_head * head_dim..][..head_dim];
                    let p = probabilities[key];
                    for (sum, v) in sums.iter_mut().zip(v) {
                        *sum = p.mul_add(*v, *sum);
                    }
                }
            }
        }
    }
    for (query, sums) in sums.chunks_exact(group * head_dim).enumerate() {
        // SAFETY: this task alone owns the channels of its group in its rows.
        unsafe { o.at(at(query)).copy_from_nonoverlapping(sums.as_ptr(), sums.len()) };
    }
}

/// Bytes that the tasks of [`forward`] allocate at a time.
pub(super) fn scratch(heads: Heads, batch: &PagedBatch) -> usize {
    let sums = |task: &Task<'_>| task.queries * heads.heads / heads.kv_heads * heads.head_dim;
    most_at_once(tasks(heads, batch).iter().map(|t| size_of::<f32>() * (t.scores(heads) + sums(t))).collect())
}
