//! Causal grouped-query attention over documents that lie one after another.

mod general;
mod sm90;
mod tables;

use core::ops::Range;

use super::{AttentionGrads, Heads, SavedIn};
use crate::runtime::limits::{HEAD_DIM_MULTIPLE, MAX_HEAD_DIM};
use crate::runtime::op::{blocks, check_dims, int, kernel, padded};
use crate::runtime::{Arch, Array, AttentionKernel, Cuda, DType, Defines, DeviceProps, Ints, MemoryUse, args, entry};
use tables::{Document, Table};

/// The kernels that compute attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Engine {
    /// wgmma and bulk copies: compute capability 9.0, 16-bit dtypes, heads of 64, 128 or 256 channels.
    Sm90,
    /// mma.sync: any card, 16-bit dtypes, heads of 64, 128 or 256 channels.
    MmaSync,
    /// No tensor cores: f32, and other sizes of heads.
    Plain,
}

impl Engine {
    /// The fastest for a card, a dtype and a size of heads.
    pub(crate) fn fastest(props: &DeviceProps, dtype: DType, head_dim: usize) -> Self {
        match (dtype, head_dim) {
            (DType::Bf16 | DType::F16, 64 | 128 | 256) if [props.major, props.minor] == [9, 0] => Self::Sm90,
            (DType::Bf16 | DType::F16, 64 | 128 | 256) => Self::MmaSync,
            _ => Self::Plain,
        }
    }
}

/// The documents of a batch as the kernels' tables of tiles on the device: made once a batch, used by every layer
/// of its kind.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    cuda: Cuda,
    /// The window only where a document is longer.
    heads: Heads,
    dtype: DType,
    engine: Engine,
    /// Rows of q; of k and v.
    tokens: [usize; 2],
    tables: Ints,
    forward: Table,
    dq: Table,
    dkdv: Table,
    /// Two counters of [`Engine::Sm90`], which every launch leaves at 0.
    tickets: Ints,
}

impl Plan {
    /// Returns the tables for documents with the cumulative lengths `cu_seqlens`, which begin with 0.
    pub(crate) fn new(cuda: &Cuda, cu_seqlens: &[u32], heads: Heads, dtype: DType) -> Self {
        Self::with(cuda, cu_seqlens, heads, dtype, Engine::fastest(cuda.props(), dtype, heads.head_dim))
    }

    /// [`Plan::new`] with an engine of choice, for comparisons.
    pub(crate) fn with(cuda: &Cuda, cu_seqlens: &[u32], heads: Heads, dtype: DType, engine: Engine) -> Self {
        let documents: Vec<_> = cu_seqlens.windows(2).map(|w| Document::whole(w[0] as usize, w[1] as usize)).collect();
        let tokens = cu_seqlens.last().map_or(0, |&end| end as usize);
        Self::of(cuda, &documents, [tokens; 2], heads, dtype, engine)
    }

    /// Returns the tables for prompts that are these rows of a batch of `tokens` rows.
    pub(crate) fn of_prompts(cuda: &Cuda, rows: &[Range<usize>], tokens: usize, heads: Heads, dtype: DType) -> Self {
        let documents: Vec<_> = rows.iter().map(|rows| Document::whole(rows.start, rows.end)).collect();
        Self::of(cuda, &documents, [tokens; 2], heads, dtype, Engine::fastest(cuda.props(), dtype, heads.head_dim))
    }

    fn of(cuda: &Cuda, documents: &[Document], tokens: [usize; 2], heads: Heads, dtype: DType, engine: Engine) -> Self {
        let longest = documents.iter().map(|document| document.past + document.queries).max().unwrap_or(0);
        let heads = Heads { window: heads.window.filter(|&window| window < longest), ..heads };
        let Heads { heads: n, kv_heads, head_dim, .. } = heads;
        assert!(kv_heads > 0 && n % kv_heads == 0, "{n} heads share {kv_heads} key/value heads");
        assert!(
            head_dim.is_multiple_of(HEAD_DIM_MULTIPLE) && head_dim <= MAX_HEAD_DIM,
            "heads of {head_dim} channels; the kernels take multiples of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}"
        );
        let mut words = Vec::new();
        let arch = arch(cuda);
        let kernels = [AttentionKernel::Fwd, AttentionKernel::BwdDq, AttentionKernel::BwdDkdv];
        let [forward, dq, dkdv] = kernels.map(|kernel| {
            let rows = tables::rows(kernel, engine, head_dim, arch);
            Table::append(&mut words, documents, engine, rows, kernel)
        });
        let tables = Ints::from_slice(cuda, &words, MemoryUse::Inputs);
        let tickets = Ints::from_slice(cuda, &[0u32; 2], MemoryUse::Inputs);
        Self { cuda: cuda.clone(), heads, dtype, engine, tokens, tables, forward, dq, dkdv, tickets }
    }

    fn check(&self, q: &Array, k: &Array, v: &Array, sinks: Option<&Array>) {
        let Heads { heads, kv_heads, head_dim, .. } = self.heads;
        check_dims("q", q, [self.tokens[0], heads * head_dim]);
        check_dims("k", k, [self.tokens[1], kv_heads * head_dim]);
        check_dims("v", v, [self.tokens[1], kv_heads * head_dim]);
        assert_eq!([q.dtype(), k.dtype(), v.dtype()], [self.dtype; 3], "dtypes of q, k and v");
        if let Some(sinks) = sinks {
            check_dims("sinks", sinks, [1, heads]);
            assert_eq!(sinks.dtype(), self.dtype, "the dtype of sinks");
        }
    }

    /// The definitions that choose how scores are made.
    fn options(&self, sinks: bool) -> Defines {
        let Heads { window, softcap, .. } = self.heads;
        let all = [("WINDOW", window.is_some()), ("SOFTCAP", softcap.is_some()), ("SINKS", sinks)];
        all.into_iter().filter(|(_, used)| *used).map(|(name, _)| (name, "")).collect()
    }

    /// Window and softcap as the kernels' arguments, which those compiled without them ignore.
    fn option_args(&self) -> (i32, f32) {
        (self.heads.window.map_or(0, int), self.heads.softcap.unwrap_or(1.0))
    }

    /// An uninitialized matrix `[heads, tokens]` of statistics.
    fn statistics(&self) -> Array {
        Array::dense(&self.cuda, [self.heads.heads, self.tokens[0]], DType::F32, MemoryUse::Activations)
    }
}

/// Attention inside each document: o `[tokens, heads · head_dim]` with `pad_cols` spare columns behind each row, and lse, f32
/// `[heads, tokens]`. `sinks` `[1, heads]`.
pub(crate) fn forward(
    q: &Array,
    k: &Array,
    v: &Array,
    sinks: Option<&Array>,
    plan: &Plan,
    pad_cols: usize,
) -> (Array, Array) {
    let lse = plan.statistics();
    (run(q, k, v, sinks, &lse, plan, pad_cols), lse)
}

/// Attention inside the documents of `plan`, which need not be all rows, into their rows of o. q, k and v are aligned.
pub(crate) fn forward_onto(q: &Array, k: &Array, v: &Array, sinks: Option<&Array>, o: &Array, plan: &Plan) {
    plan.check(q, k, v, sinks);
    launch_forward(q, k, v, sinks, o, &plan.statistics(), plan);
}

/// Returns the gradients: those to q, k and v as columns of one matrix with `pad_cols` spare columns behind them, and that to
/// `sinks`, f32 `[1, heads]`.
pub(crate) fn backward(
    d_o: &Array,
    &SavedIn { q, k, v, o, lse }: &SavedIn<'_, Array>,
    sinks: Option<&Array>,
    plan: &Plan,
    pad_cols: usize,
) -> AttentionGrads<Array, Array> {
    plan.check(q, k, v, sinks);
    check_dims("o", o, q.dims());
    check_dims("d_o", d_o, q.dims());
    check_dims("lse", lse, [plan.heads.heads, plan.tokens[0]]);
    let [q, k, v, o, d_o] = [q, k, v, o, d_o].map(Array::aligned);
    let all = Array::padded(q.cuda(), [q.rows(), q.cols() + 2 * k.cols()], pad_cols, q.dtype(), MemoryUse::Activations);
    let [dq, dk] = [(0, q.cols()), (q.cols(), k.cols())].map(|(first, cols)| all.columns(first, cols));
    let grads = [dq, dk, all.columns(q.cols() + k.cols(), v.cols())];
    drop(all);
    let dsinks = sinks.map(|_| Array::zeros(q.cuda(), [1, plan.heads.heads], DType::F32, MemoryUse::Activations));
    if plan.tokens[0] > 0 {
        let inputs = Inputs { q, k, v, o, d_o, lse: lse.contiguous(), delta: plan.statistics() };
        match plan.engine {
            Engine::Sm90 => sm90::backward(&inputs, &grads, plan),
            Engine::MmaSync | Engine::Plain => general::backward(&inputs, &grads, plan),
        }
        if let (Some(sinks), Some(dsinks)) = (sinks, &dsinks) {
            let sinks = sinks.contiguous();
            kernel(sinks.cuda(), entry!("attention_sinks.cu", "attention_bwd_sinks"), sinks.dtype()).launch(
                [blocks(plan.heads.heads), 1, 1],
                [256, 1, 1],
                0,
                args![inputs.lse.ptr(), inputs.delta.ptr(), sinks.ptr(), dsinks.ptr(), int(plan.tokens[0])],
            );
        }
    }
    let [q, k, v] = grads;
    AttentionGrads { q, k, v, sinks: dsinks }
}

fn run(q: &Array, k: &Array, v: &Array, sinks: Option<&Array>, lse: &Array, plan: &Plan, pad_cols: usize) -> Array {
    plan.check(q, k, v, sinks);
    let [q, k, v] = [q, k, v].map(Array::aligned);
    let sinks = sinks.map(Array::contiguous);
    let o = padded(&q, pad_cols);
    if plan.tokens[0] == 0 {
        return o;
    }
    launch_forward(&q, &k, &v, sinks.as_ref(), &o, lse, plan);
    o
}

fn launch_forward(q: &Array, k: &Array, v: &Array, sinks: Option<&Array>, o: &Array, lse: &Array, plan: &Plan) {
    match plan.engine {
        Engine::Sm90 => sm90::forward(q, k, v, sinks, o, lse, plan),
        Engine::MmaSync | Engine::Plain => general::forward(q, k, v, sinks, o, lse, plan),
    }
}

fn arch(cuda: &Cuda) -> Arch {
    Arch::new(cuda.props().major, cuda.props().minor)
}

/// The inputs of a backward, and scratch memory for the row sums of d_o ∘ o.
struct Inputs {
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    d_o: Array,
    lse: Array,
    delta: Array,
}
