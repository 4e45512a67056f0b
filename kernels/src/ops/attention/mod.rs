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

pub(crate) mod cpu;
pub(crate) mod cuda;
mod meta;
pub(crate) mod portable;

use burn::tensor::{DType, Tensor as BurnTensor};

use crate::runtime::Array;
use crate::tensor::{MetaTensor, cuda_dtype, pair, triple};
use crate::{Backend, Device, Tensor};

/// Queries whose scores are held at once on the CPU and in Burn's operations.
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
    /// Factor of the scores, usually 1 / √head_dim.
    pub scale: f32,
}

impl Heads {
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
    heads: Heads,
    documents: &Documents,
    pad_cols: usize,
) -> (Tensor<2>, Tensor<2>) {
    check(q, k, v, heads);
    let last = documents.cu_seqlens.last().map_or(0, |&n| n as usize);
    assert_eq!(last, q.dims()[0], "cu_seqlens end at the last token");
    match Backend::of(q) {
        Backend::Cpu => pair(cpu::forward(q.burn(), k.burn(), v.burn(), heads, &documents.whole())),
        Backend::Portable => pair(portable::forward(q.burn(), k.burn(), v.burn(), heads, &documents.whole())),
        Backend::Cuda => pair(cuda::forward(q.cuda(), k.cuda(), v.cuda(), documents.plan(), pad_cols)),
        Backend::Meta => pair(meta::forward(q.meta(), k.meta(), v.meta(), heads, &documents.whole())),
    }
}

/// Attention of new tokens, the last rows of one document whose keys and values are all given: `o`.
///
/// q `[new, heads · head_dim]`; k, v `[past + new, kv_heads · head_dim]`.
pub fn forward_cached(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads) -> Tensor<2> {
    check(q, k, v, heads);
    let (new, all) = (q.dims()[0], k.dims()[0]);
    let document = [Document { query: 0, key: 0, queries: new, past: all - new }];
    match Backend::of(q) {
        Backend::Cpu => cpu::forward(q.burn(), k.burn(), v.burn(), heads, &document).0.into(),
        Backend::Portable => portable::forward(q.burn(), k.burn(), v.burn(), heads, &document).0.into(),
        Backend::Cuda => cuda::forward_cached(q.cuda(), k.cuda(), v.cuda(), heads).into(),
        Backend::Meta => meta::forward(q.meta(), k.meta(), v.meta(), heads, &document).0.into(),
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

/// Returns `(dq, dk, dv)`; on CUDA these are columns of one matrix with `pad_cols` spare columns behind them.
pub fn backward(
    d_o: &Tensor<2>,
    saved: &Saved,
    heads: Heads,
    documents: &Documents,
    pad_cols: usize,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    match Backend::of(d_o) {
        Backend::Cpu => triple(cpu::backward(d_o.burn(), &saved.burn(), heads, &documents.cu_seqlens)),
        Backend::Portable => triple(portable::backward(d_o.burn(), &saved.burn(), heads, &documents.cu_seqlens)),
        Backend::Cuda => triple(cuda::backward(d_o.cuda(), &saved.cuda(), documents.plan(), pad_cols)),
        Backend::Meta => triple(meta::backward(d_o.meta(), &saved.meta(), heads, &documents.cu_seqlens)),
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
}

fn check(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads) {
    let Heads { heads, kv_heads, head_dim, .. } = heads;
    assert_eq!(q.dims()[1], heads * head_dim, "width of q");
    assert_eq!(k.dims()[1], kv_heads * head_dim, "width of k");
    assert_eq!(k.dims(), v.dims(), "shapes of k and v");
    assert_eq!(heads % kv_heads, 0, "{heads} heads share {kv_heads} key/value heads");
}
