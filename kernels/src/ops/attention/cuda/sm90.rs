//! Attention with wgmma and the bulk copy engine.

use super::general::row_sums;
use super::{Inputs, Plan};
use crate::runtime::op::{blocks, int};
use crate::runtime::{Array, DType, Defines, Entry, Kernel, MemoryUse, TensorMap, args, entry};

/// Query rows of a forward's tile.
const ROWS: usize = 128;

/// Keys of a tile.
const KEYS: usize = 128;

/// Keys of a forward's step with 256 channels, whose accumulators leave fewer registers.
const WIDE_KEYS: usize = 80;

/// Query rows of a backward's step.
const QUERIES: usize = 64;

/// Threads of a block: a warpgroup that copies, two that compute.
const THREADS: [u32; 3] = [384, 1, 1];

pub(super) fn forward(q: &Array, k: &Array, v: &Array, sinks: Option<&Array>, o: &Array, lse: &Array, plan: &Plan) {
    let Plan { cuda, heads, tokens, forward, tables, tickets, .. } = plan;
    let kernel = kernel(plan, entry!("attention_fwd_sm90.cu", "attention_fwd_sm90"), plan.options(sinks.is_some()));
    let (window, softcap) = plan.option_args();
    let dim = heads.head_dim;
    // Two tiles of queries or one, two each of keys and values, and barriers.
    let (tiles_of_queries, keys) = if dim == 256 { (1, WIDE_KEYS) } else { (2, KEYS) };
    let shared = (tiles_of_queries * ROWS + 4 * keys) * dim * 2 + 128;
    // Blocks stay on their multiprocessor and draw work.
    let grid = cuda.props().sm_count.min(blocks(forward.tiles * heads.heads));
    let q_map = map(q, dim, ROWS);
    let [k_map, v_map] = [k, v].map(|x| map(x, dim, keys));
    kernel.launch(
        [grid, 1, 1],
        THREADS,
        blocks(shared),
        args![
            q_map,
            k_map,
            v_map,
            o.ptr(),
            lse.ptr(),
            tables.ptr_at(forward.first),
            tickets.ptr(),
            int(tokens[0]),
            int(heads.heads),
            int(heads.kv_heads),
            int(o.ld()),
            int(forward.tiles),
            heads.scale,
            window,
            softcap,
            sinks.map_or(0, Array::ptr)
        ],
    );
}

pub(super) fn backward(inputs: &Inputs, grads: &[Array; 3], plan: &Plan) {
    if plan.heads.head_dim == 256 {
        return backward_wide(inputs, grads, plan);
    }
    let [dq, dk, dv] = grads;
    let Inputs { q, k, v, o, d_o, lse, delta } = inputs;
    let Plan { cuda, heads, tokens, dkdv, tables, .. } = plan;
    let (rows, n, kv_heads, dim) = (tokens[0], heads.heads, heads.kv_heads, heads.head_dim);
    // Sums of dq, in an order of the kernels' own, and whose turn it is to add to them.
    let sums = Array::dense(cuda, [n * rows, dim], DType::F32, MemoryUse::Scratch);
    let turns = cuda.is_deterministic().then(|| Array::dense(cuda, [n, rows], DType::F32, MemoryUse::Scratch));
    let mut options = plan.options(false);
    options.extend(turns.as_ref().map(|_| ("DETERMINISTIC", "")));
    let turns = turns.as_ref().map_or(0, Array::ptr);
    let (window, softcap) = plan.option_args();
    let per_row = [blocks((rows * n * (dim / 8)).div_ceil(256)), 1, 1];
    kernel(plan, entry!("attention_bwd_sm90.cu", "attention_bwd_delta_sm90"), options.clone()).launch(
        per_row,
        [256, 1, 1],
        0,
        args![o.ptr(), d_o.ptr(), delta.ptr(), sums.ptr(), turns, int(rows), int(n), int(o.ld()), int(d_o.ld())],
    );
    // Tiles of k, v, and two each of q and d_o; then two of ds and of dq, statistics and barriers.
    let shared = 1024 * dim + 66_688;
    let [q_map, do_map] = [q, d_o].map(|x| map(x, dim, QUERIES));
    let [k_map, v_map] = [k, v].map(|x| map(x, dim, KEYS));
    kernel(plan, entry!("attention_bwd_sm90.cu", "attention_bwd_sm90"), options.clone()).launch(
        [blocks(dkdv.tiles * kv_heads), 1, 1],
        THREADS,
        blocks(shared),
        args![
            q_map,
            k_map,
            v_map,
            do_map,
            lse.ptr(),
            delta.ptr(),
            sums.ptr(),
            turns,
            dk.ptr(),
            dv.ptr(),
            tables.ptr_at(dkdv.first),
            int(rows),
            int(n),
            int(kv_heads),
            int(dk.ld()),
            int(dv.ld()),
            heads.scale,
            window,
            softcap
        ],
    );
    kernel(plan, entry!("attention_bwd_sm90.cu", "attention_bwd_dq_sm90"), options).launch(
        per_row,
        [256, 1, 1],
        0,
        args![sums.ptr(), dq.ptr(), int(rows), int(n), int(dq.ld()), heads.scale],
    );
}

/// Computes the backward with 256 channels: dq by one kernel, dk and dv by another, without sums in global memory.
fn backward_wide(inputs: &Inputs, [dq, dk, dv]: &[Array; 3], plan: &Plan) {
    let Inputs { q, k, v, o, d_o, lse, delta } = inputs;
    let Plan { heads, tokens, tables, .. } = plan;
    let (n, kv_heads, dim) = (heads.heads, heads.kv_heads, heads.head_dim);
    let (window, softcap) = plan.option_args();
    // 64 rows of a head.
    let tile = QUERIES * dim * 2;
    row_sums(o, d_o, delta, plan);
    let [k_map, v_map] = [k, v].map(|x| map(x, dim, QUERIES));
    let [q_map, do_map] = [q, d_o].map(|x| map(x, dim, ROWS));
    kernel(plan, entry!("attention_bwd_256_sm90.cu", "attention_bwd_dq_256_sm90"), plan.options(false)).launch(
        [blocks(plan.dq.tiles * n), 1, 1],
        THREADS,
        // Two tiles each of q and d_o, two of k, one of v, and barriers.
        blocks(7 * tile + 64),
        args![
            q_map,
            k_map,
            v_map,
            do_map,
            lse.ptr(),
            delta.ptr(),
            dq.ptr(),
            tables.ptr_at(plan.dq.first),
            int(tokens[0]),
            int(n),
            int(kv_heads),
            int(dq.ld()),
            heads.scale,
            window,
            softcap
        ],
    );
    let [q_map, do_map] = [q, d_o].map(|x| map(x, dim, QUERIES));
    let [k_map, v_map] = [k, v].map(|x| map(x, dim, QUERIES));
    kernel(plan, entry!("attention_bwd_256_sm90.cu", "attention_bwd_dkdv_256_sm90"), plan.options(false)).launch(
        [blocks(plan.dkdv.tiles * kv_heads), 1, 1],
        THREADS,
        // A tile each of k and v, two each of q and d_o, probabilities, statistics and barriers.
        blocks(6 * tile + 17_408 + 104),
        args![
            q_map,
            k_map,
            v_map,
            do_map,
            lse.ptr(),
            delta.ptr(),
            dk.ptr(),
            dv.ptr(),
            tables.ptr_at(plan.dkdv.first),
            int(tokens[0]),
            int(n),
            int(kv_heads),
            int(dk.ld()),
            int(dv.ld()),
            heads.scale,
            window,
            softcap
        ],
    );
}

/// `options`: the definitions that choose between forms of the file.
fn kernel(plan: &Plan, entry: Entry, options: Defines) -> Kernel {
    let head_dim = plan.heads.head_dim.to_string();
    let mut defines = vec![("T", plan.dtype.name()), ("HEAD_DIM", &head_dim)];
    defines.extend(options);
    plan.cuda.kernel(entry, &defines)
}

/// Rows of heads as panels of 64 channels, copied `rows` at a time, a head at a time.
fn map(x: &Array, head_dim: usize, rows: usize) -> TensorMap {
    let panels = [x.cols() / 64, x.rows(), 64];
    let tile = [head_dim / 64, rows, 64];
    x.cuda().tensor_map(x.ptr(), x.dtype(), panels, [64, x.ld()], tile)
}
