//! The kernels of attention on wgpu; [`super`] says how they divide the work.

use cubecl::prelude::*;

use super::tile::{OWN, Queries, ROW, add_nn, add_nt, cap_slope, capped, clear, first_key, load, queries, sees, store};
use super::{COLS, KEY_FIELDS, LANES, Options, ROWS, TILE};

/// Stands for −∞.
const HIDDEN: f32 = -1e30;

#[cube(launch_unchecked)]
pub(super) fn forward_kernel(
    q: &[f32],
    k: &[f32],
    v: &[f32],
    sinks: &[f32],
    tiles: &[u32],
    o: &mut [f32],
    lse: &mut [f32],
    heads: u32,
    kv_heads: u32,
    tokens: u32,
    scale: f32,
    softcap: f32,
    window: u32,
    #[comptime] head_dim: usize,
    #[comptime] options: Options,
) {
    let Queries { head, query, rows, key, position, q_width, kv_width, q_col, kv_col } =
        queries(tiles, heads, kv_heads, head_dim);
    let unit = UNIT_POS as usize;
    let (row, col) = (unit / LANES * ROWS, unit % LANES * COLS);
    let chunks = comptime!(head_dim.div_ceil(TILE));

    let mut left = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut right = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut probs = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut sums = Array::<f32>::new(comptime!(chunks * OWN));
    clear(&mut sums, comptime!(chunks * OWN));
    let mut max = Array::<f32>::new(ROWS);
    let mut denominator = Array::<f32>::new(ROWS);
    #[unroll]
    for r in 0..ROWS {
        if comptime!(options.has_sinks) {
            max[r] = sinks[head];
            denominator[r] = 1.0;
        } else {
            max[r] = HIDDEN;
            denominator[r] = 0.0;
        }
    }

    let end = position + rows;
    let mut first = first_key(position, window, options);
    while first < end {
        let mut scores = Array::<f32>::new(OWN);
        clear(&mut scores, OWN);
        for chunk in 0..chunks {
            let channel = chunk * TILE;
            load(&mut left, q, query, rows, q_width, q_col, channel, head_dim);
            load(&mut right, k, key + first, end - first, kv_width, kv_col, channel, head_dim);
            sync_cube();
            add_nt(&left, &right, &mut scores, row, col);
            sync_cube();
        }
        #[unroll]
        for i in 0..OWN {
            let (r, c) = (comptime!(i / COLS), comptime!(i % COLS));
            let seen = sees(position + row + r, first + col + c, window, options);
            let score = capped(scores[i] * scale, softcap, options);
            scores[i] = select(seen, score, HIDDEN);
            probs[(row + r) * ROW + col + c] = scores[i];
        }
        sync_cube();
        let mut factor = Array::<f32>::new(ROWS);
        #[unroll]
        for r in 0..ROWS {
            let mut highest = max[r];
            for c in 0..TILE {
                highest = highest.max(probs[(row + r) * ROW + c]);
            }
            factor[r] = (max[r] - highest).exp();
            max[r] = highest;
        }
        sync_cube();
        #[unroll]
        for i in 0..OWN {
            let (r, c) = (comptime!(i / COLS), comptime!(i % COLS));
            let p = select(scores[i] > HIDDEN, (scores[i] - max[r]).exp(), 0.0);
            probs[(row + r) * ROW + col + c] = p;
        }
        sync_cube();
        #[unroll]
        for r in 0..ROWS {
            let mut sum = 0.0f32;
            for c in 0..TILE {
                sum += probs[(row + r) * ROW + c];
            }
            denominator[r] = denominator[r] * factor[r] + sum;
        }
        #[unroll]
        for chunk in 0..chunks {
            load(&mut right, v, key + first, end - first, kv_width, kv_col, chunk * TILE, head_dim);
            sync_cube();
            #[unroll]
            for i in 0..OWN {
                sums[chunk * OWN + i] *= factor[comptime!(i / COLS)];
            }
            add_nn(&probs, &right, &mut sums, chunk * OWN, row, col);
            sync_cube();
        }
        first += TILE;
    }

    #[unroll]
    for r in 0..ROWS {
        if row + r < rows && col == 0 {
            lse[head * tokens as usize + query + row + r] = max[r] + denominator[r].ln();
        }
    }
    #[unroll]
    for chunk in 0..chunks {
        #[unroll]
        for i in 0..OWN {
            sums[chunk * OWN + i] /= denominator[comptime!(i / COLS)];
        }
    }
    store(o, &sums, query, rows, q_width, q_col, row, col, head_dim);
}

#[cube(launch_unchecked)]
pub(super) fn backward_q_kernel(
    d_o: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    o: &[f32],
    lse: &[f32],
    tiles: &[u32],
    delta: &mut [f32],
    dq: &mut [f32],
    heads: u32,
    kv_heads: u32,
    tokens: u32,
    scale: f32,
    softcap: f32,
    window: u32,
    #[comptime] head_dim: usize,
    #[comptime] options: Options,
) {
    let Queries { head, query, rows, key, position, q_width, kv_width, q_col, kv_col } =
        queries(tiles, heads, kv_heads, head_dim);
    let unit = UNIT_POS as usize;
    let (row, col) = (unit / LANES * ROWS, unit % LANES * COLS);
    let chunks = comptime!(head_dim.div_ceil(TILE));

    let mut left = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut right = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut slopes = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut sums = Array::<f32>::new(comptime!(chunks * OWN));
    clear(&mut sums, comptime!(chunks * OWN));

    // dO·O of each row: every eighth channel by one unit, then their sum.
    #[unroll]
    for r in 0..ROWS {
        let mut sum = 0.0f32;
        if row + r < rows {
            let token = (query + row + r) * q_width + q_col;
            let mut channel = unit % LANES;
            while channel < head_dim {
                sum += d_o[token + channel] * o[token + channel];
                channel += LANES;
            }
        }
        slopes[(row + r) * ROW + unit % LANES] = sum;
    }
    sync_cube();
    let mut along = Array::<f32>::new(ROWS);
    let mut normalizer = Array::<f32>::new(ROWS);
    #[unroll]
    for r in 0..ROWS {
        let mut sum = 0.0f32;
        #[unroll]
        for c in 0..LANES {
            sum += slopes[(row + r) * ROW + c];
        }
        along[r] = sum;
        normalizer[r] = 0.0;
        if row + r < rows {
            let at = head * tokens as usize + query + row + r;
            normalizer[r] = lse[at];
            if col == 0 {
                delta[at] = sum;
            }
        }
    }
    sync_cube();

    let end = position + rows;
    let mut first = first_key(position, window, options);
    while first < end {
        let mut scores = Array::<f32>::new(OWN);
        let mut d_probs = Array::<f32>::new(OWN);
        clear(&mut scores, OWN);
        clear(&mut d_probs, OWN);
        for chunk in 0..chunks {
            let channel = chunk * TILE;
            load(&mut left, q, query, rows, q_width, q_col, channel, head_dim);
            load(&mut right, k, key + first, end - first, kv_width, kv_col, channel, head_dim);
            sync_cube();
            add_nt(&left, &right, &mut scores, row, col);
            sync_cube();
            load(&mut left, d_o, query, rows, q_width, q_col, channel, head_dim);
            load(&mut right, v, key + first, end - first, kv_width, kv_col, channel, head_dim);
            sync_cube();
            add_nt(&left, &right, &mut d_probs, row, col);
            sync_cube();
        }
        #[unroll]
        for i in 0..OWN {
            let (r, c) = (comptime!(i / COLS), comptime!(i % COLS));
            let seen = sees(position + row + r, first + col + c, window, options) && row + r < rows;
            let score = capped(scores[i] * scale, softcap, options);
            let p = select(seen, (score - normalizer[r]).exp(), 0.0);
            let slope = p * (d_probs[i] - along[r]) * scale * cap_slope(score, softcap, options);
            slopes[(row + r) * ROW + col + c] = slope;
        }
        #[unroll]
        for chunk in 0..chunks {
            load(&mut right, k, key + first, end - first, kv_width, kv_col, chunk * TILE, head_dim);
            sync_cube();
            add_nn(&slopes, &right, &mut sums, chunk * OWN, row, col);
            sync_cube();
        }
        first += TILE;
    }
    store(dq, &sums, query, rows, q_width, q_col, row, col, head_dim);
}

#[cube(launch_unchecked)]
pub(super) fn backward_kv_kernel(
    d_o: &[f32],
    q: &[f32],
    k: &[f32],
    v: &[f32],
    lse: &[f32],
    delta: &[f32],
    tiles: &[u32],
    dk: &mut [f32],
    dv: &mut [f32],
    heads: u32,
    kv_heads: u32,
    tokens: u32,
    scale: f32,
    softcap: f32,
    window: u32,
    #[comptime] head_dim: usize,
    #[comptime] options: Options,
) {
    let kv_head = CUBE_POS_X as usize;
    let group = (heads / kv_heads) as usize;
    let at = CUBE_POS_Y as usize * KEY_FIELDS;
    let (key, rows, key_position) = (tiles[at] as usize, tiles[at + 1] as usize, tiles[at + 2] as usize);
    let (query, queries, position) = (tiles[at + 3] as usize, tiles[at + 4] as usize, tiles[at + 5] as usize);
    let (q_width, kv_width) = (heads as usize * head_dim, kv_heads as usize * head_dim);
    let kv_col = kv_head * head_dim;
    let unit = UNIT_POS as usize;
    // Rows are keys here, and columns are queries.
    let (row, col) = (unit / LANES * ROWS, unit % LANES * COLS);
    let chunks = comptime!(head_dim.div_ceil(TILE));

    let mut left = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut right = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut probs = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut slopes = Shared::<[f32]>::new_slice(TILE * ROW);
    let mut sums_k = Array::<f32>::new(comptime!(chunks * OWN));
    let mut sums_v = Array::<f32>::new(comptime!(chunks * OWN));
    clear(&mut sums_k, comptime!(chunks * OWN));
    clear(&mut sums_v, comptime!(chunks * OWN));

    for member in 0..group {
        let head = kv_head * group + member;
        let q_col = head * head_dim;
        let mut first = 0usize.runtime();
        while first < queries {
            let rest = queries - first;
            let mut scores = Array::<f32>::new(OWN);
            let mut d_probs = Array::<f32>::new(OWN);
            clear(&mut scores, OWN);
            clear(&mut d_probs, OWN);
            for chunk in 0..chunks {
                let channel = chunk * TILE;
                load(&mut left, k, key, rows, kv_width, kv_col, channel, head_dim);
                load(&mut right, q, query + first, rest, q_width, q_col, channel, head_dim);
                sync_cube();
                add_nt(&left, &right, &mut scores, row, col);
                sync_cube();
                load(&mut left, v, key, rows, kv_width, kv_col, channel, head_dim);
                load(&mut right, d_o, query + first, rest, q_width, q_col, channel, head_dim);
                sync_cube();
                add_nt(&left, &right, &mut d_probs, row, col);
                sync_cube();
            }
            #[unroll]
            for c in 0..COLS {
                let mut normalizer = 0.0f32;
                let mut along = 0.0f32;
                if col + c < rest {
                    let at = head * tokens as usize + query + first + col + c;
                    normalizer = lse[at];
                    along = delta[at];
                }
                #[unroll]
                for r in 0..ROWS {
                    let own = position + first + col + c;
                    let seen = sees(own, key_position + row + r, window, options) && col + c < rest;
                    let score = capped(scores[r * COLS + c] * scale, softcap, options);
                    let p = select(seen, (score - normalizer).exp(), 0.0);
                    let slope = p * (d_probs[r * COLS + c] - along) * scale * cap_slope(score, softcap, options);
                    probs[(row + r) * ROW + col + c] = p;
                    slopes[(row + r) * ROW + col + c] = slope;
                }
            }
            #[unroll]
            for chunk in 0..chunks {
                load(&mut left, d_o, query + first, rest, q_width, q_col, chunk * TILE, head_dim);
                load(&mut right, q, query + first, rest, q_width, q_col, chunk * TILE, head_dim);
                sync_cube();
                add_nn(&probs, &left, &mut sums_v, chunk * OWN, row, col);
                add_nn(&slopes, &right, &mut sums_k, chunk * OWN, row, col);
                sync_cube();
            }
            first += TILE;
        }
    }
    store(dk, &sums_k, key, rows, kv_width, kv_col, row, col, head_dim);
    store(dv, &sums_v, key, rows, kv_width, kv_col, row, col, head_dim);
}
