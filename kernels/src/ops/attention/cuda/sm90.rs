//! Attention with wgmma and the bulk copy engine.

use super::{Inputs, Plan};
use crate::runtime::op::{blocks, int};
use crate::runtime::{Array, DType, Entry, Kernel, MemoryUse, TensorMap, args, entry};

/// Keys of a tile, and query rows of a forward's.
const KEYS: usize = 128;

/// Query rows of a backward's step.
const QUERIES: usize = 64;

/// Threads of a block: a warpgroup that copies, two that compute.
const THREADS: [u32; 3] = [384, 1, 1];

pub(super) fn forward(q: &Array, k: &Array, v: &Array, o: &Array, lse: &Array, plan: &Plan) {
    let Plan { cuda, heads, tokens, forward, tables, tickets, .. } = plan;
    let kernel = kernel(plan, entry!("attention_fwd_sm90.cu", "attention_fwd_sm90"));
    let shared = 6 * KEYS * heads.head_dim * 2 + 128;
    // Blocks stay on their multiprocessor and draw work.
    let grid = cuda.props().sm_count.min(blocks(forward.tiles * heads.heads));
    let [q_map, k_map, v_map] = [q, k, v].map(|x| map(x, heads.head_dim, KEYS));
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
            heads.scale
        ],
    );
}

pub(super) fn backward(inputs: &Inputs, [dq, dk, dv]: &[Array; 3], plan: &Plan) {
    let Inputs { q, k, v, o, d_o, lse, delta } = inputs;
    let Plan { cuda, heads, tokens, dkdv, tables, .. } = plan;
    let (rows, n, kv_heads, dim) = (tokens[0], heads.heads, heads.kv_heads, heads.head_dim);
    // Sums of dq, in an order of the kernels' own, and whose turn it is to add to them.
    let sums = Array::dense(cuda, [n * rows, dim], DType::F32, MemoryUse::Scratch);
    let turns = cuda.is_deterministic().then(|| Array::dense(cuda, [n, rows], DType::F32, MemoryUse::Scratch));
    let turns = turns.as_ref().map_or(0, Array::ptr);
    let per_row = [blocks((rows * n * (dim / 8)).div_ceil(256)), 1, 1];
    kernel(plan, entry!("attention_bwd_sm90.cu", "attention_bwd_delta_sm90")).launch(
        per_row,
        [256, 1, 1],
        0,
        args![o.ptr(), d_o.ptr(), delta.ptr(), sums.ptr(), turns, int(rows), int(n), int(o.ld()), int(d_o.ld())],
    );
    // Tiles of k, v, and two each of q and d_o; then two of ds and of dq, statistics and barriers.
    let shared = 1024 * dim + 66_688;
    let [q_map, do_map] = [q, d_o].map(|x| map(x, dim, QUERIES));
    let [k_map, v_map] = [k, v].map(|x| map(x, dim, KEYS));
    kernel(plan, entry!("attention_bwd_sm90.cu", "attention_bwd_sm90")).launch(
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
            heads.scale
        ],
    );
    kernel(plan, entry!("attention_bwd_sm90.cu", "attention_bwd_dq_sm90")).launch(
        per_row,
        [256, 1, 1],
        0,
        args![sums.ptr(), dq.ptr(), int(rows), int(n), int(dq.ld()), heads.scale],
    );
}

fn kernel(plan: &Plan, entry: Entry) -> Kernel {
    let head_dim = plan.heads.head_dim.to_string();
    let mut defines = vec![("T", plan.dtype.name()), ("HEAD_DIM", &head_dim)];
    if plan.cuda.is_deterministic() {
        defines.push(("DETERMINISTIC", ""));
    }
    plan.cuda.kernel(entry, &defines)
}

/// Rows of heads as panels of 64 channels, copied `rows` at a time, a head at a time.
fn map(x: &Array, head_dim: usize, rows: usize) -> TensorMap {
    let panels = [x.cols() / 64, x.rows(), 64];
    let tile = [head_dim / 64, rows, 64];
    x.cuda().tensor_map(x.ptr(), x.dtype(), panels, [64, x.ld()], tile)
}
