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

use burn::tensor::{DType, Tensor as BurnTensor};

use crate::cuda::ops;
use crate::tensor::cuda_dtype;
use crate::{Device, Path, Tensor, cpu, portable};

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
    /// What scores are multiplied with, usually 1 / √head_dim.
    pub scale: f32,
}

impl Heads {
    /// Whether attention with these heads runs on `device`; on CUDA a head has a multiple of 8 channels, up to 256.
    pub fn supported_by(&self, device: &Device) -> bool {
        match device {
            Device::Burn(_) => true,
            Device::Cuda(_) => self.head_dim.is_multiple_of(8) && self.head_dim <= 256,
        }
    }
}

impl From<Heads> for ops::attention::Heads {
    fn from(Heads { heads, kv_heads, head_dim, scale }: Heads) -> Self {
        Self { heads, kv_heads, head_dim, scale }
    }
}

/// Where the documents of a batch begin and end, made once for all layers.
#[derive(Clone, Debug)]
pub struct Documents {
    cu_seqlens: Vec<u32>,
    /// The order in which a GPU takes the blocks of queries.
    plan: Option<ops::attention::Plan>,
}

impl Documents {
    /// Documents with these cumulative lengths, from 0 to the number of tokens, for layers with these heads that
    /// compute in `dtype`.
    pub fn new(cu_seqlens: &[u32], heads: Heads, device: &Device, dtype: DType) -> Self {
        let plan = match device {
            Device::Burn(_) => None,
            Device::Cuda(cuda) => Some(ops::attention::Plan::new(cuda, cu_seqlens, heads.into(), cuda_dtype(dtype))),
        };
        Self { cu_seqlens: cu_seqlens.to_vec(), plan }
    }

    fn plan(&self) -> &ops::attention::Plan {
        self.plan.as_ref().expect("the operands of one operation lie on one device")
    }
}

/// Attention inside each document: `(o, lse)`; on CUDA o has room for `room` more columns
/// ([`stacked`](crate::stacked)).
pub fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    heads: Heads,
    documents: &Documents,
    room: usize,
) -> (Tensor<2>, Tensor<2>) {
    check(q, k, v, heads);
    let last = documents.cu_seqlens.last().map_or(0, |&n| n as usize);
    assert_eq!(last, q.dims()[0], "cu_seqlens end at the last token");
    if let Tensor::Cuda(q) = q {
        let (o, lse) = ops::attention::forward(q, k.cuda(), v.cuda(), documents.plan(), room);
        return (o.into(), lse.into());
    }
    let ranges = documents.cu_seqlens.windows(2);
    let whole: Vec<Document> = ranges.map(|w| Document::whole(w[0] as usize, (w[1] - w[0]) as usize)).collect();
    let (o, lse) = run(q.burn(), k.burn(), v.burn(), heads, &whole);
    (o.into(), lse.into())
}

/// Attention of new tokens, the last rows of one document whose keys and values are all given: `o`.
///
/// q `[new, heads · head_dim]`; k, v `[past + new, kv_heads · head_dim]`.
pub fn forward_cached(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads) -> Tensor<2> {
    check(q, k, v, heads);
    if let Tensor::Cuda(q) = q {
        return ops::attention::forward_cached(q, k.cuda(), v.cuda(), heads.into()).into();
    }
    let (new, all) = (q.dims()[0], k.dims()[0]);
    let document = Document { query: 0, key: 0, queries: new, past: all - new };
    run(q.burn(), k.burn(), v.burn(), heads, &[document]).0.into()
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

/// `(dq, dk, dv)`; on CUDA columns of one matrix with room for `room` more.
pub fn backward(
    d_o: &Tensor<2>,
    saved: &Saved,
    heads: Heads,
    documents: &Documents,
    room: usize,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let path = Path::of(d_o);
    if path == Path::Cuda {
        let [q, k, v, o, lse] = [&saved.q, &saved.k, &saved.v, &saved.o, &saved.lse].map(Tensor::cuda);
        let (dq, dk, dv) = ops::attention::backward(d_o.cuda(), q, k, v, o, lse, documents.plan(), room);
        return (dq.into(), dk.into(), dv.into());
    }
    let [q, k, v, o, lse] = [&saved.q, &saved.k, &saved.v, &saved.o, &saved.lse].map(|t| t.burn().clone());
    let (d_o, saved, cu_seqlens) = (d_o.burn(), Parts { q, k, v, o, lse }, &documents.cu_seqlens);
    let (dq, dk, dv) = match path {
        Path::Cpu => cpu::attention::backward(d_o, &saved, heads, cu_seqlens),
        _ => portable::attention::backward(d_o, &saved, heads, cu_seqlens),
    };
    (dq.into(), dk.into(), dv.into())
}

/// [`Saved`] in Burn's tensors.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    pub(crate) q: BurnTensor<2>,
    pub(crate) k: BurnTensor<2>,
    pub(crate) v: BurnTensor<2>,
    pub(crate) o: BurnTensor<2>,
    pub(crate) lse: BurnTensor<2>,
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

fn run(
    q: &BurnTensor<2>,
    k: &BurnTensor<2>,
    v: &BurnTensor<2>,
    heads: Heads,
    documents: &[Document],
) -> (BurnTensor<2>, BurnTensor<2>) {
    match Path::of_burn(q) {
        Path::Cpu => cpu::attention::forward(q, k, v, heads, documents),
        _ => portable::attention::forward(q, k, v, heads, documents),
    }
}

fn check(q: &Tensor<2>, k: &Tensor<2>, v: &Tensor<2>, heads: Heads) {
    let Heads { heads, kv_heads, head_dim, .. } = heads;
    assert_eq!(q.dims()[1], heads * head_dim, "width of q");
    assert_eq!(k.dims()[1], kv_heads * head_dim, "width of k");
    assert_eq!(k.dims(), v.dims(), "shapes of k and v");
    assert_eq!(heads % kv_heads, 0, "{heads} heads share {kv_heads} key/value heads");
}
