//! Tiles of 32 × 32 values in shared memory, and the sums that a unit has of their products.

use cubecl::prelude::*;

use super::{COLS, Options, QUERY_FIELDS, ROWS, TILE, UNITS};

/// Distance of a tile's rows in shared memory: units that read different rows use different banks.
pub(super) const ROW: usize = TILE + 1;

/// Values of a tile that a unit has.
pub(super) const OWN: usize = ROWS * COLS;

/// The queries of one head that a workgroup computes, and where they lie.
#[derive(CubeType)]
pub(super) struct Queries {
    pub(super) head: usize,
    /// First row in q.
    pub(super) query: usize,
    pub(super) rows: usize,
    /// Row of the document's first key in k and v.
    pub(super) key: usize,
    /// Position of the first query in its document.
    pub(super) position: usize,
    /// Columns of q, and of k and v.
    pub(super) q_width: usize,
    pub(super) kv_width: usize,
    /// First channel of the head in q, and of its key/value head in k and v.
    pub(super) q_col: usize,
    pub(super) kv_col: usize,
}

/// The queries of this workgroup.
#[cube]
pub(super) fn queries(tiles: &[u32], heads: u32, kv_heads: u32, #[comptime] head_dim: usize) -> Queries {
    let head = CUBE_POS_X as usize;
    let kv_head = head / (heads / kv_heads) as usize;
    let at = CUBE_POS_Y as usize * QUERY_FIELDS;
    Queries {
        head,
        query: tiles[at] as usize,
        rows: tiles[at + 1] as usize,
        key: tiles[at + 2] as usize,
        position: tiles[at + 3] as usize,
        q_width: heads as usize * head_dim,
        kv_width: kv_heads as usize * head_dim,
        q_col: head * head_dim,
        kv_col: kv_head * head_dim,
    }
}

/// The first key of the first tile that the query at `position` or one after it sees.
#[cube]
pub(super) fn first_key(position: usize, window: u32, #[comptime] options: Options) -> usize {
    if comptime!(options.has_window) {
        let window = window as usize;
        select(position >= window, position + 1 - window, 0) / TILE * TILE
    } else {
        0usize.runtime()
    }
}

#[cube]
pub(super) fn sees(query: usize, key: usize, window: u32, #[comptime] options: Options) -> bool {
    if comptime!(options.has_window) { key <= query && key + window as usize > query } else { key <= query }
}

/// c·tanh(score / c).
#[cube]
pub(super) fn capped(score: f32, softcap: f32, #[comptime] options: Options) -> f32 {
    if comptime!(options.has_softcap) { (score / softcap).tanh() * softcap } else { score }
}

/// 1 − (score / c)².
#[cube]
pub(super) fn cap_slope(score: f32, softcap: f32, #[comptime] options: Options) -> f32 {
    if comptime!(options.has_softcap) { 1.0 - (score / softcap) * (score / softcap) } else { 1.0f32.runtime() }
}

#[cube]
pub(super) fn clear(values: &mut Array<f32>, #[comptime] count: usize) {
    #[unroll]
    for i in 0..count {
        values[i] = 0.0;
    }
}

/// Loads 32 rows of 32 channels; what lies past `rows` or the head is 0.
#[cube]
pub(super) fn load(
    tile: &mut Shared<[f32]>,
    values: &[f32],
    first: usize,
    rows: usize,
    width: usize,
    head: usize,
    channel: usize,
    #[comptime] head_dim: usize,
) {
    #[unroll]
    for i in 0..comptime!(TILE * TILE / UNITS) {
        let at = i * UNITS + UNIT_POS as usize;
        let (r, c) = (at / TILE, at % TILE);
        let mut value = 0.0f32;
        if r < rows && channel + c < head_dim {
            value = values[(first + r) * width + head + channel + c];
        }
        tile[r * ROW + c] = value;
    }
}

/// Adds left·rightᵀ to this unit's sums.
#[cube]
pub(super) fn add_nt(left: &Shared<[f32]>, right: &Shared<[f32]>, sums: &mut Array<f32>, row: usize, col: usize) {
    for channel in 0..TILE {
        let mut values = Array::<f32>::new(ROWS);
        #[unroll]
        for r in 0..ROWS {
            values[r] = left[(row + r) * ROW + channel];
        }
        #[unroll]
        for c in 0..COLS {
            let value = right[(col + c) * ROW + channel];
            #[unroll]
            for r in 0..ROWS {
                sums[r * COLS + c] = fma(values[r], value, sums[r * COLS + c]);
            }
        }
    }
}

/// Adds left·right to this unit's sums, which begin at `at`.
#[cube]
pub(super) fn add_nn(
    left: &Shared<[f32]>,
    right: &Shared<[f32]>,
    sums: &mut Array<f32>,
    #[comptime] at: usize,
    row: usize,
    col: usize,
) {
    for i in 0..TILE {
        let mut values = Array::<f32>::new(ROWS);
        #[unroll]
        for r in 0..ROWS {
            values[r] = left[(row + r) * ROW + i];
        }
        #[unroll]
        for c in 0..COLS {
            let value = right[i * ROW + col + c];
            #[unroll]
            for r in 0..ROWS {
                sums[at + r * COLS + c] = fma(values[r], value, sums[at + r * COLS + c]);
            }
        }
    }
}

/// Writes this unit's sums.
#[cube]
pub(super) fn store(
    values: &mut [f32],
    sums: &Array<f32>,
    first: usize,
    rows: usize,
    width: usize,
    head: usize,
    row: usize,
    col: usize,
    #[comptime] head_dim: usize,
) {
    #[unroll]
    for r in 0..ROWS {
        if row + r < rows {
            #[unroll]
            for chunk in 0..comptime!(head_dim.div_ceil(TILE)) {
                #[unroll]
                for c in 0..COLS {
                    let channel = chunk * TILE + col + c;
                    if channel < head_dim {
                        values[(first + row + r) * width + head + channel] = sums[chunk * OWN + r * COLS + c];
                    }
                }
            }
        }
    }
}
