//! Kernels on wgpu; the formulas stand in [`super`]. Everything is `f32`.
//!
//! A workgroup of 64 units computes 32 queries of one head (o, dq) or 32 keys of one key/value head (dk, dv), and walks over
//! tiles of 32 of the others. Products go through tiles of 32 × 32 values in shared memory, 32 channels at a time: 13 to 17 KiB
//! whatever the width of a head. Each unit has 4 × 4 values of a product in registers. Scores exist for one tile: forward
//! with an online softmax (Milakov & Gimelshein, arXiv:1805.02867; Dao, arXiv:2307.08691), backward from the saved lse. Query
//! heads that share a key/value head are summed by the workgroup of their keys: no atomics, and the same bits in every run.
//!
//! FLOPs: forward 4, backward 14 for each channel and pair of query and key, half of them under the causal mask. Launches: 1
//! and 2. Burn's operations take 21 and 37 for every 128 queries, and hold scores of `[heads, 128, keys]`.
//!
//! WGSL has no infinity: a hidden score is a finite number, and its probability is set to 0.

mod kernels;
mod tile;

use burn::tensor::Tensor as BurnTensor;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{AttentionGrads, Document, Heads, Saved};
use crate::Tensor;
use crate::tensor::wgpu::{arg, buffer, empty, result, words};

/// Queries, keys and channels of a tile.
const TILE: usize = 32;

/// Rows and columns of a tile that one unit computes.
const ROWS: usize = 4;
const COLS: usize = 4;

/// Units that share a row of a tile.
const LANES: usize = TILE / COLS;

/// Units of a workgroup.
const UNITS: usize = TILE / ROWS * LANES;

/// The widest head: a unit has `head_dim / 2` sums in registers, twice as many for dk and dv.
const MAX_HEAD_DIM: usize = 128;

/// The options of the scores that change the code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Options {
    has_window: bool,
    has_softcap: bool,
    has_sinks: bool,
}

impl Options {
    fn new(heads: Heads, sinks: bool) -> Self {
        Self { has_window: heads.window.is_some(), has_softcap: heads.softcap.is_some(), has_sinks: sinks }
    }
}

/// [`super::forward`].
pub(super) fn forward(
    q: &Tensor<2>,
    k: &Tensor<2>,
    v: &Tensor<2>,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    documents: &[Document],
) -> Option<(Tensor<2>, Tensor<2>)> {
    if heads.head_dim > MAX_HEAD_DIM {
        return None;
    }
    let [tokens, width] = q.dims();
    let options = Options::new(heads, sinks.is_some());
    let (q, k, v) = (buffer(q)?, buffer(k)?, buffer(v)?);
    let sinks = sinks.map_or(Some(q.clone()), buffer)?;
    let (o, lse) = (empty(&q, [tokens, width]), empty(&q, [heads.heads, tokens]));
    let tiles = query_tiles(documents);
    // SAFETY: the kernel reads and writes the rows of its tile alone, and rows of the keys before them.
    #[allow(unsafe_code)]
    unsafe {
        kernels::forward_kernel::launch_unchecked(
            &q.client,
            grid(heads.heads, tiles.len() / QUERY_FIELDS),
            CubeDim::new_1d(UNITS as u32),
            arg(&q),
            arg(&k),
            arg(&v),
            arg(&sinks),
            words(&q, &tiles),
            arg(&o),
            arg(&lse),
            heads.heads as u32,
            heads.kv_heads as u32,
            tokens as u32,
            heads.scale,
            heads.softcap.unwrap_or(1.0),
            heads.window.unwrap_or(0) as u32,
            heads.head_dim,
            options,
        );
    }
    Some((result(o), result(lse)))
}

/// [`super::backward`].
pub(super) fn backward(
    d_o: &Tensor<2>,
    saved: &Saved,
    sinks: Option<&Tensor<1>>,
    heads: Heads,
    documents: &[Document],
) -> Option<AttentionGrads> {
    if heads.head_dim > MAX_HEAD_DIM || !each_key_once(documents, saved.k.dims()[0]) {
        return None;
    }
    let ([tokens, width], [keys, kv_width]) = (saved.q.dims(), saved.k.dims());
    let options = Options::new(heads, false);
    let [d_o, q, k, v, o, lse] = [d_o, &saved.q, &saved.k, &saved.v, &saved.o, &saved.lse].map(buffer);
    let (d_o, q, k, v, o, lse) = (d_o?, q?, k?, v?, o?, lse?);
    let delta = empty(&q, [heads.heads, tokens]);
    let [dq, dk, dv] = [[tokens, width], [keys, kv_width], [keys, kv_width]].map(|shape| empty(&q, shape));
    let (scale, softcap) = (heads.scale, heads.softcap.unwrap_or(1.0));
    let window = heads.window.unwrap_or(0) as u32;
    let (by_query, by_key) = (query_tiles(documents), key_tiles(documents, heads));
    // SAFETY: as above; a tile of keys reads the rows of the queries that see them.
    #[allow(unsafe_code)]
    unsafe {
        kernels::backward_q_kernel::launch_unchecked(
            &q.client,
            grid(heads.heads, by_query.len() / QUERY_FIELDS),
            CubeDim::new_1d(UNITS as u32),
            arg(&d_o),
            arg(&q),
            arg(&k),
            arg(&v),
            arg(&o),
            arg(&lse),
            words(&q, &by_query),
            arg(&delta),
            arg(&dq),
            heads.heads as u32,
            heads.kv_heads as u32,
            tokens as u32,
            scale,
            softcap,
            window,
            heads.head_dim,
            options,
        );
        kernels::backward_kv_kernel::launch_unchecked(
            &q.client,
            grid(heads.kv_heads, by_key.len() / KEY_FIELDS),
            CubeDim::new_1d(UNITS as u32),
            arg(&d_o),
            arg(&q),
            arg(&k),
            arg(&v),
            arg(&lse),
            arg(&delta),
            words(&q, &by_key),
            arg(&dk),
            arg(&dv),
            heads.heads as u32,
            heads.kv_heads as u32,
            tokens as u32,
            scale,
            softcap,
            window,
            heads.head_dim,
            options,
        );
    }
    let sinks = sinks.map(|sinks| sinks_grad(sinks, &lse, &delta));
    Some(AttentionGrads { q: result(dq), k: result(dk), v: result(dv), sinks })
}

/// dsink = −Σ_i exp(sink − lse_i)·(dO_i·O_i).
fn sinks_grad(sinks: &Tensor<1>, lse: &CubeTensor, delta: &CubeTensor) -> Tensor<1> {
    let of = |tensor: &CubeTensor| -> BurnTensor<2> { result::<2>(tensor.clone()).into_burn() };
    let sinks = sinks.burn().clone().unsqueeze_dim::<2>(1); // [heads, 1]
    (((sinks - of(lse)).exp() * of(delta)).sum_dim(1).neg()).squeeze_dim::<1>(1).into()
}

/// Returns whether each row of k belongs to one document: a workgroup writes its rows of dk and dv.
fn each_key_once(documents: &[Document], keys: usize) -> bool {
    let mut end = 0;
    let in_order = documents.iter().filter(|document| document.queries > 0).all(|document| {
        let start = core::mem::replace(&mut end, document.key + document.past + document.queries);
        document.key == start
    });
    in_order && end == keys
}

/// A workgroup for each head and tile.
fn grid(heads: usize, tiles: usize) -> CubeCount {
    CubeCount::Static(heads as u32, tiles as u32, 1)
}

/// Numbers of a tile of queries: first row in q, rows, row of the document's first key in k and v, position of the first.
const QUERY_FIELDS: usize = 4;

fn query_tiles(documents: &[Document]) -> Vec<u32> {
    let tile = |document: &Document, first: usize| {
        let rows = TILE.min(document.queries - first);
        [document.query + first, rows, document.key, document.past + first].map(|n| n as u32)
    };
    let tiles = documents.iter().flat_map(|d| (0..d.queries).step_by(TILE).map(move |first| tile(d, first)));
    tiles.flatten().collect()
}

/// Numbers of a tile of keys: first row in k and v, rows, position of the first; then of the queries that see any of them, the
/// first row in q, rows, position of the first.
const KEY_FIELDS: usize = 6;

fn key_tiles(documents: &[Document], heads: Heads) -> Vec<u32> {
    let tile = |document: &Document, first: usize| {
        let Document { query, key, queries, past } = *document;
        let rows = TILE.min(past + queries - first);
        let from = first.saturating_sub(past);
        let end = heads.window.map_or(queries, |window| (first + rows - 1 + window).saturating_sub(past).min(queries));
        [key + first, rows, first, query + from, end.saturating_sub(from), past + from].map(|n| n as u32)
    };
    let keys = |d: &Document| if d.queries == 0 { 0 } else { d.past + d.queries };
    let tiles = documents.iter().flat_map(|d| (0..keys(d)).step_by(TILE).map(move |first| tile(d, first)));
    tiles.flatten().collect()
}
