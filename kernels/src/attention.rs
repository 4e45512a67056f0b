//! Causal grouped-query attention over documents that lie one after another.
//!
//! For a query at place i of its document: o = Σ_{j ≤ i} softmax_j(scale · q·k_j) v_j. Query head h reads
//! key/value head h / (heads / kv_heads). Nothing crosses a border of `cu_seqlens`.
//! Backward by recomputing the probabilities from the saved logarithm of the softmax's denominator
//! (Dao, arXiv:2307.08691): P = exp(S − lse), dV = PᵀdO, dP = dO·Vᵀ, dS = P ∘ (dP − rowsum(dO ∘ O)),
//! dQ = scale · dS·K, dK = scale · dSᵀ·Q.
//!
//! # Shapes
//! q, o `[tokens, heads · head_dim]`; k, v `[tokens, kv_heads · head_dim]`; lse `[heads, tokens]`.
//!
//! # Dtypes
//! Scores, softmax and sums in `f32`.
//!
//! # Gradients
//! To q, k and v. Saved: q, k, v, o and lse. Scores exist for one block of queries at a time.

use burn::tensor::Tensor;

use crate::{Path, cpu, portable};

/// Queries whose scores are held at once.
pub(crate) const QUERIES: usize = 128;

/// Heads of one attention layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// What scores are multiplied with, usually 1 / √head_dim.
    pub scale: f32,
}

/// Attention inside each document: `(o, lse)`.
pub fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    heads: Heads,
    cu_seqlens: &[u32],
) -> (Tensor<2>, Tensor<2>) {
    check(q, k, v, heads);
    assert_eq!(cu_seqlens.last().map_or(0, |&n| n as usize), q.dims()[0], "cu_seqlens end at the last token");
    let documents: Vec<Document> =
        cu_seqlens.windows(2).map(|w| Document::whole(w[0] as usize, (w[1] - w[0]) as usize)).collect();
    run(q, k, v, heads, &documents)
}

/// Attention of new tokens, the last rows of one document whose keys and values are all given: `o`.
///
/// q `[new, heads · head_dim]`; k, v `[past + new, kv_heads · head_dim]`.
pub fn forward_cached(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads) -> Tensor<2> {
    check(q, k, v, heads);
    let (new, all) = (q.dims()[0], k.dims()[0]);
    let document = Document { query: 0, key: 0, queries: new, past: all - new };
    run(q, k, v, heads, &[document]).0
}

/// What [`forward`] saves for [`backward`].
#[derive(Clone, Debug)]
pub struct Saved {
    /// Queries, after normalization and rotation.
    pub q: Tensor<2>,
    /// Keys, after normalization and rotation.
    pub k: Tensor<2>,
    /// Values.
    pub v: Tensor<2>,
    /// The result.
    pub o: Tensor<2>,
    /// Logarithm of each softmax's denominator.
    pub lse: Tensor<2>,
}

/// `(dq, dk, dv)`.
pub fn backward(d_o: &Tensor<2>, saved: &Saved, heads: Heads, cu_seqlens: &[u32]) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    match Path::of(d_o) {
        Path::Cpu => cpu::attention::backward(d_o, saved, heads, cu_seqlens),
        Path::Portable => portable::attention::backward(d_o, saved, heads, cu_seqlens),
    }
}

/// Where a document's rows lie in q and in k, v.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Document {
    /// First row in q.
    pub(crate) query: usize,
    /// First row in k and v.
    pub(crate) key: usize,
    /// Rows in q.
    pub(crate) queries: usize,
    /// Keys before the first query's own.
    pub(crate) past: usize,
}

impl Document {
    fn whole(start: usize, length: usize) -> Self {
        Self { query: start, key: start, queries: length, past: 0 }
    }
}

fn run(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads, documents: &[Document]) -> (Tensor<2>, Tensor<2>) {
    match Path::of(q) {
        Path::Cpu => cpu::attention::forward(q, k, v, heads, documents),
        Path::Portable => portable::attention::forward(q, k, v, heads, documents),
    }
}

fn check(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads) {
    let Heads { heads, kv_heads, head_dim, .. } = heads;
    assert_eq!(q.dims()[1], heads * head_dim, "width of q");
    assert_eq!(k.dims()[1], kv_heads * head_dim, "width of k");
    assert_eq!(k.dims(), v.dims(), "shapes of k and v");
    assert_eq!(heads % kv_heads, 0, "{heads} heads share {kv_heads} key/value heads");
}
