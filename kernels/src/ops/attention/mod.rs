//! Causal grouped-query attention over documents that lie one after another.
//!
//! For a query at position i of its document: o = Σ_j p_j·v_j over the keys j ≤ i, with a window w over
//! i − w < j ≤ i. p_j = exp(s_j − lse), s_j = scale·q·k_j, with a softcap c s_j = c·tanh(scale·q·k_j / c), and
//! lse = ln Σ_j exp(s_j). With sinks the head's learned logit is one more term of that sum, without a value, so that
//! the probabilities sum to less than 1. Query head h reads key/value head h / (heads / kv_heads). Nothing crosses a
//! border of `cu_seqlens`.
//!
//! Backward by recomputing the probabilities from the saved lse (Dao, arXiv:2307.08691): P = exp(S − lse), dV = PᵀdO,
//! dP = dO·Vᵀ, dS = P ∘ (dP − rowsum(dO ∘ O)), with a softcap also ∘ (1 − (S/c)²), dQ = scale·dS·K, dK = scale·dSᵀ·Q,
//! dsink = −Σ_i exp(sink − lse_i)·(dO_i·O_i).
//!
//! Window, softcap and sinks are those of transformers' Mistral, Gemma 2 and gpt-oss.
//!
//! # Shapes
//! q, o `[tokens, heads · head_dim]`; k, v `[tokens, kv_heads · head_dim]`; lse `[heads, tokens]`; sinks `[heads]`.
//!
//! # Dtypes
//! Scores, softmax, sums and the gradient of sinks in `f32`.
//!
//! # Gradients
//! To q, k, v and sinks. Saved: q, k, v, o and lse. Scores exist for one block of queries at a time; keys outside the
//! window of a whole block are not read.

pub(crate) mod cpu;
pub(crate) mod cuda;
mod meta;
pub(crate) mod portable;
#[cfg(feature = "wgpu")]
mod wgpu;

use core::ops::Range;

use burn::tensor::{DType, Tensor as BurnTensor};

use crate::runtime::Array;
use crate::tensor::{MetaTensor, cuda_dtype, on_wgpu, pair};
use crate::{Backend, Device, Tensor};

/// Queries whose scores are held at once on the CPU and in Burn's operations.
pub(crate) const QUERIES: usize = 128;

/// The heads of an attention layer, and the options of their scores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Heads {
    /// Query heads; a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Factor of the scores, usually 1 / √head_dim; above 0.
    pub scale: f32,
    /// Number of keys that a query sees, the last of which is its own; `None` for all keys up to its own.
    pub window: Option<usize>,
    /// c in c·tanh(scores / c).
    pub softcap: Option<f32>,
}

impl Heads {
    /// Heads with neither a window nor a softcap.
    pub const fn new(heads: usize, kv_heads: usize, head_dim: usize, scale: f32) -> Self {
        Self { heads, kv_heads, head_dim, scale, window: None, softcap: None }
    }

    /// The same with a window.
    #[must_use]
    pub const fn with_window(self, window: usize) -> Self {
        Self { window: Some(window), ..self }
    }

    /// The same with a softcap.
    #[must_use]
    pub const fn with_softcap(self, softcap: f32) -> Self {
        Self { softcap: Some(softcap), ..self }
    }

    /// Returns the first key that the query at `position` sees.
    pub(crate) fn first_key(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Returns whether attention with these heads runs on `device`.
    pub fn supported_by(&self, device: &Device) -> bool {
        device.limits().takes_head_dim(self.head_dim)
    }
}

/// The borders of a batch's documents, made once for all layers.
#[derive(Clone, Debug)]
pub struct Documents {
    cu_seqlens: Vec<u32>,
    /// The order in which a GPU takes the blocks of queries.
    plan: Option<cuda::Plan>,
}

impl Documents {
    /// Documents with these cumulative lengths, from 0 to the number of tokens, for layers with these heads that
    /// compute in `dtype`.
    pub fn new(cu_seqlens: &[u32], heads: Heads, device: &Device, dtype: DType) -> Self {
        let plan = match device {
            Device::Burn(_) | Device::Meta(_) => None,
            Device::Cuda(cuda) => Some(cuda::Plan::new(cuda, cu_seqlens, heads, cuda_dtype(dtype))),
        };
        Self { cu_seqlens: cu_seqlens.to_vec(), plan }
    }

    /// Every document, with all its keys.
    fn whole(&self) -> Vec<Document> {
        let borders = self.cu_seqlens.windows(2);
        borders.map(|w| Document::whole(w[0] as usize, (w[1] - w[0]) as usize)).collect()
    }

    fn plan(&self) -> &cuda::Plan {
        self.plan.as_ref().expect("the operands of one operation lie on one device")
    }
}

/// Returns `(o, lse)` of attention inside each document; on CUDA o has `pad_cols` spare columns behind each row
/// ([`stacked`](crate::ops::stacked)).
pub fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    documents: &Documents,
    pad_cols: usize,
) -> (Tensor<2>, Tensor<2>) {
    check(q, k, v, sinks, heads);
    let last = documents.cu_seqlens.last().map_or(0, |&n| n as usize);
    assert_eq!(last, q.dims()[0], "cu_seqlens end at the last token");
    let whole = documents.whole();
    on_wgpu!(wgpu::forward(q, k, v, sinks, heads, &whole));
    match Backend::of(q) {
        Backend::Cpu => pair(cpu::forward(q.burn(), k.burn(), v.burn(), sinks.map(Tensor::burn), heads, &whole)),
        Backend::Portable => {
            pair(portable::forward(q.burn(), k.burn(), v.burn(), sinks.map(Tensor::burn), heads, &whole))
        }
        Backend::Cuda => {
            let sinks = sinks.map(Tensor::cuda);
            pair(cuda::forward(q.cuda(), k.cuda(), v.cuda(), sinks, documents.plan(), pad_cols))
        }
        Backend::Meta => pair(meta::forward(q.meta(), k.meta(), v.meta(), heads, &whole)),
    }
}

/// Tensors that [`forward`] saves for [`backward`].
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

/// Gradients that [`backward`] returns.
#[derive(Clone, Debug)]
pub struct AttentionGrads<M = Tensor<2>, V = Tensor<1>> {
    /// The gradient to the queries.
    pub q: M,
    /// The gradient to the keys.
    pub k: M,
    /// The gradient to the values.
    pub v: M,
    /// The gradient to the sinks, f32; `None` without sinks.
    pub sinks: Option<V>,
}

impl<M: Into<Tensor<2>>, V: Into<Tensor<1>>> AttentionGrads<M, V> {
    fn into_tensors(self) -> AttentionGrads {
        let Self { q, k, v, sinks } = self;
        AttentionGrads { q: q.into(), k: k.into(), v: v.into(), sinks: sinks.map(Into::into) }
    }
}

/// Returns the gradients; on CUDA those to q, k and v are columns of one matrix with `pad_cols` spare columns behind them.
/// `sinks` are given where their gradient is wanted.
pub fn backward(
    d_o: &Tensor<2>,
    saved: &Saved,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    documents: &Documents,
    pad_cols: usize,
) -> AttentionGrads {
    let whole = documents.whole();
    on_wgpu!(wgpu::backward(d_o, saved, sinks, heads, &whole));
    match Backend::of(d_o) {
        Backend::Cpu => cpu::backward(d_o.burn(), &saved.burn(), sinks.map(Tensor::burn), heads, &whole).into_tensors(),
        Backend::Portable => {
            portable::backward(d_o.burn(), &saved.burn(), sinks.map(Tensor::burn), heads, &whole).into_tensors()
        }
        Backend::Cuda => {
            let sinks = sinks.map(Tensor::cuda);
            cuda::backward(d_o.cuda(), &saved.cuda(), sinks, documents.plan(), pad_cols).into_tensors()
        }
        Backend::Meta => {
            meta::backward(d_o.meta(), &saved.meta(), sinks.map(Tensor::meta), heads, &whole).into_tensors()
        }
    }
}

/// [`Saved`] in the tensors of a backend.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SavedIn<'a, T> {
    pub(crate) q: &'a T,
    pub(crate) k: &'a T,
    pub(crate) v: &'a T,
    pub(crate) o: &'a T,
    pub(crate) lse: &'a T,
}

impl Saved {
    fn burn(&self) -> SavedIn<'_, BurnTensor<2>> {
        let Self { q, k, v, o, lse } = self;
        SavedIn { q: q.burn(), k: k.burn(), v: v.burn(), o: o.burn(), lse: lse.burn() }
    }

    fn meta(&self) -> SavedIn<'_, MetaTensor> {
        let Self { q, k, v, o, lse } = self;
        SavedIn { q: q.meta(), k: k.meta(), v: v.meta(), o: o.meta(), lse: lse.meta() }
    }

    fn cuda(&self) -> SavedIn<'_, Array> {
        let Self { q, k, v, o, lse } = self;
        SavedIn { q: q.cuda(), k: k.cuda(), v: v.cuda(), o: o.cuda(), lse: lse.cuda() }
    }
}

/// The rows of one document in q and in k, v.
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

    /// Its blocks of at most [`QUERIES`] queries.
    fn blocks(self, heads: Heads) -> impl Iterator<Item = QueryBlock> {
        let Self { query, key, queries, past } = self;
        (0..queries).step_by(QUERIES).map(move |first| {
            let rows = QUERIES.min(queries - first);
            let position = past + first;
            let keys = heads.first_key(position)..position + rows;
            QueryBlock { query: query + first, rows, position, key: key + keys.start, keys, window: heads.window }
        })
    }
}

/// Queries of one document that are computed together, and the keys that any of them sees.
#[derive(Clone, Debug)]
pub(crate) struct QueryBlock {
    /// First row in q.
    pub(crate) query: usize,
    /// Number of queries.
    pub(crate) rows: usize,
    /// Position of the first query in its document.
    pub(crate) position: usize,
    /// Row of the first key in k and v.
    pub(crate) key: usize,
    /// Positions of the keys.
    pub(crate) keys: Range<usize>,
    window: Option<usize>,
}

impl QueryBlock {
    /// Returns the keys that query `row` of the block sees, as indices into the block's keys.
    #[inline(always)]
    pub(crate) fn seen(&self, row: usize) -> Range<usize> {
        let end = self.position + row + 1;
        let start = self.window.map_or(0, |window| end.saturating_sub(window));
        start.max(self.keys.start) - self.keys.start..end - self.keys.start
    }
}

pub(crate) fn check(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, sinks: Option<&Tensor<1>>, heads: Heads) {
    assert!(heads.window.is_none_or(|window| window > 0), "a window of 0 keys; a query sees at least its own");
    assert!(heads.softcap.is_none_or(|softcap| softcap > 0.0), "a softcap of {:?}; it is above 0", heads.softcap);
    let Heads { heads, kv_heads, head_dim, .. } = heads;
    if let Some(sinks) = sinks {
        assert_eq!(sinks.dims(), [heads], "one sink a head");
    }
    assert_eq!(q.dims()[1], heads * head_dim, "width of q");
    assert_eq!(k.dims()[1], kv_heads * head_dim, "width of k");
    assert_eq!(k.dims(), v.dims(), "shapes of k and v");
    assert_eq!(heads % kv_heads, 0, "{heads} heads share {kv_heads} key/value heads");
}
