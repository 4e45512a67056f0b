// The gradients of attention's keys and values on mma.sync: every GPU from sm_80 up. kernels/src/ops/attention; the
// other half of the backward, its order and its scratch are in attention_bwd_dq.cu.
//
// With Pᵀ = exp(scale·k·qᵀ - lse) recomputed: dv = Pᵀ·d_o, dSᵀ = Pᵀ ∘ (v·d_oᵀ - delta), dk = scale·dSᵀ·q.
// A block takes BLOCK_N keys of one key/value head and walks over the queries that see them, of every query head that
// reads this head, BLOCK_M at a time; so the sum over the group needs no atomics and is deterministic.
// Two warps share each 16·M keys: one computes Pᵀ and sums dv, its partner computes v·d_oᵀ, reads Pᵀ (rounded to T, as dv's
// product uses it) from shared memory, and sums dk. So a warp has one accumulator of 16·M × HEAD_DIM in registers,
// not two.
//
// Layout: as in attention_fwd.cu; d_o like q; dk like k, dv like v, each with its stride; lse, delta f32
// [heads, tokens].
// tiles int4, one for each BLOCK_N keys of a document of rows s .. e: for t = 0, BLOCK_N, 2·BLOCK_N … < e - s:
// (s + t, e, s, t), in the order of y - x descending, the longest work first.
//
// Source: prelude.cuh, attention_scores.cuh, mma_sync.cuh, this file. Defines as in attention_fwd.cu:
//   BLOCK_M, BLOCK_N, WARPS, BLOCKS     sm_80, sm_87    sm_86, 89, 120    sm_90           sm_100, 103
//   HEAD_DIM 256                        32, 64, 8, 1    16, 64, 8, 1      64, 64, 8, 1    64, 64, 8, 1
//   HEAD_DIM 128                        64, 128, 8, 1   32, 64, 8, 1      64, 64, 4, 2    64, 64, 4, 2
//   HEAD_DIM 64                         64, 64, 4, 2    64, 128, 8, 1     64, 64, 4, 3    64, 64, 4, 2
// Launch: attention_bwd_dkdv(q, k, v, d_o, lse, delta, dk, dv, tiles, i32 ldq, ldk, ldv, lddo, lddk, lddv, heads,
//   kv_heads, tokens, f32 scale, i32 window, f32 softcap), grid (tiles·kv_heads), block (32·WARPS),
//   dynamic shared memory (2·BLOCK_N + 4·BLOCK_M)·HEAD_DIM·2 + 2·BLOCK_M·BLOCK_N + 16·BLOCK_M bytes
//
// Floor, 4 × 2,048 tokens, 32/8 heads × 128: 275 GFLOP, 0.35 ms at the 790 TFLOP/s of an H200's wgmma, which mma.sync
// does not reach; 204 MB, 0.05 ms at 4.25 TB/s.
// Status (H200, 2026-11-23, bf16; the whole backward beside its peers is in attention_bwd_dq.cu):
//   4 × 2,048, 32/8 × 128    0.815 ms    43 % of the floor
//   1 × 32,768, 32/8 × 128   49.9 ms
//   4 × 2,048, 16/8 × 64     0.260 ms
//   2 × 512, 16/8 × 128      0.040 ms    in a CUDA graph
//   with the tiles of sm_80: 0.865 ms, of sm_86: 1.40 ms for the first row on this card.
// Tests: as the forward's, without caches; two runs bit-equal.
// Did not help: one warp for 16 keys with both accumulators (0.895 ms at HEAD_DIM 128, where each B fragment then
// serves one product instead of two; but 0.241 ms at HEAD_DIM 64); a barrier of the pair alone instead of the block's
// (0.817 ms); one barrier instruction for both roles (0.873 ms).

static const int PAIRS = WARPS / 2;
static const int M = BLOCK_N / (16 * PAIRS); // fragments of 16 keys in a warp
static const int N8 = BLOCK_M / 8;
static const int KV_BYTES = BLOCK_N * ROW_BYTES;
static const int Q_BYTES = BLOCK_M * ROW_BYTES;
static_assert(BLOCK_N == 16 * M * PAIRS && BLOCK_M % 16 == 0, "whole fragments");

// Replaces s by the probabilities; `column` points to the lane's first lse, and the first `blind` queries do not see the
// warp's first key.
DEVICE void probabilities(f32 (&s)[M][N8][4], const f32* column, f32 scale_log2, int blind, int window) {
#pragma unroll
    for (int n = 0; n < N8; n++) {
        const float2 l = *reinterpret_cast<const float2*>(column + n * 8);
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                s[m][n][e] = exp2_approx(fmaf(s[m][n][e], scale_log2, -LOG2E * (e % 2 ? l.y : l.x)));
    }
    const int lane = threadIdx.x % 32;
    if (HAS_WINDOW && blind + window < BLOCK_M) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    if (n * 8 + lane % 4 * 2 + e % 2 >= blind + window + m * 16 + e / 2 * 8 + lane / 4) s[m][n][e] = 0.0f;
    }
    if (blind + 16 * M - 1 <= 0) return;
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++)
                if (n * 8 + lane % 4 * 2 + e % 2 < blind + m * 16 + e / 2 * 8 + lane / 4) s[m][n][e] = 0.0f;
}

// A pair's first warp leaves its probabilities for the second, lane to lane; the block's next barrier frees the space.
DEVICE void leave(uint4* space, const u32 (&p)[M][N8 / 2][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int j = 0; j < N8 / 2; j++)
            space[(m * (N8 / 2) + j) * 32] = make_uint4(p[m][j][0], p[m][j][1], p[m][j][2], p[m][j][3]);
}

// ds = p · (dp - delta), with `column` at the lane's first lse.
DEVICE void multiply(f32 (&dp)[M][N8][4], const uint4* space, const f32* column, const ScoreScale& score) {
#pragma unroll
    for (int j = 0; j < N8 / 2; j++)
#pragma unroll
        for (int m = 0; m < M; m++) {
            const uint4 raw = space[(m * (N8 / 2) + j) * 32];
            const u32 p[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float2 d = *reinterpret_cast<const float2*>(column + BLOCK_M + j * 16 + i / 2 * 8);
                f32 (&x)[4] = dp[m][j * 2 + i / 2];
                const f32 p0 = to_f32(T{(u16)p[i]}), p1 = to_f32(T{(u16)(p[i] >> 16)});
                x[i % 2 * 2] = (x[i % 2 * 2] - d.x) * p0;
                x[i % 2 * 2 + 1] = (x[i % 2 * 2 + 1] - d.y) * p1;
                if (HAS_SOFTCAP) {
                    const float2 l = *reinterpret_cast<const float2*>(column + j * 16 + i / 2 * 8);
                    x[i % 2 * 2] *= score.slope_at(p0, l.x * LOG2E);
                    x[i % 2 * 2 + 1] *= score.slope_at(p1, l.y * LOG2E);
                }
            }
        }
}

// The barrier of the block, in PTX because the two roles reach it in two places: CUDA C++ wants one __syncthreads for
// all threads of a block, PTX one instruction for all threads of a warp.
DEVICE void probabilities_left() { asm volatile("bar.sync 0;" ::: "memory"); }

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_bwd_dkdv(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ d_o,
                   const f32* __restrict__ lse, const f32* __restrict__ delta, T* __restrict__ dk, T* __restrict__ dv,
                   const int4* __restrict__ tiles, int ldq, int ldk, int ldv, int lddo, int lddk, int lddv, int heads,
                   int kv_heads, int tokens, f32 scale, int window, f32 softcap) {
    extern __shared__ __align__(1024) u8 shared[];
    const int lane = threadIdx.x % 32, pair = threadIdx.x / 32 % PAIRS, pair_row = pair * 16 * M;
    const bool makes_p = threadIdx.x / 32 < PAIRS;
    const int group = heads / kv_heads, kv_head = blockIdx.x % kv_heads;
    const int4 tile = tiles[blockIdx.x / kv_heads];
    const int queries = tile.y - tile.x;
    const int rows = min(BLOCK_N, queries);
    // Queries from the tile's first key on that see any of its keys.
    const int last = HAS_WINDOW ? min(queries, rows - 1 + window) : queries;
    const int blocks = (last + BLOCK_M - 1) / BLOCK_M;
    const int steps = group * blocks;
    const ScoreScale score(scale, softcap);
    const f32 scale_log2 = score.factor * LOG2E;

    const u32 k_tile = shared_address(shared), v_tile = k_tile + KV_BYTES, stages = v_tile + KV_BYTES;
    uint4* const handed = reinterpret_cast<uint4*>(shared + 2 * KV_BYTES + 4 * Q_BYTES);
    f32* const statistics = reinterpret_cast<f32*>(handed + PAIRS * M * (N8 / 2) * 32);
    auto load_step = [&](int step) {
        const u32 stage = stages + step % 2 * (2 * Q_BYTES);
        const int head = kv_head * group + step / blocks, first = step % blocks * BLOCK_M;
        load_tile<BLOCK_M>(stage, q + (long long)(tile.x + first) * ldq + head * HEAD_DIM, ldq, queries - first);
        load_tile<BLOCK_M>(stage + Q_BYTES, d_o + (long long)(tile.x + first) * lddo + head * HEAD_DIM, lddo,
                           queries - first);
        for (int i = threadIdx.x; i < 2 * BLOCK_M; i += THREADS) {
            const int row = first + i % BLOCK_M;
            const f32* from = (i < BLOCK_M ? lse : delta) + (long long)head * tokens + tile.x;
            copy4_async(shared_address(statistics + step % 2 * (2 * BLOCK_M) + i), from + (row < queries ? row : 0),
                        row < queries);
        }
    };
    load_tile<BLOCK_N>(k_tile, k + (long long)tile.x * ldk + kv_head * HEAD_DIM, ldk, rows);
    load_tile<BLOCK_N>(v_tile, v + (long long)tile.x * ldv + kv_head * HEAD_DIM, ldv, rows);
    load_step(0);

    f32 acc[M][D8][4] = {};
    const u32 fragment = fragment_a((makes_p ? k_tile : v_tile) + pair_row * ROW_BYTES);
    const u32 q_offset = makes_p ? 0 : Q_BYTES;
    uint4* const space = handed + pair * M * (N8 / 2) * 32 + lane;

    for (int step = 0; step < steps; step++) {
        copies_arrived();
        __syncthreads();
        if (step + 1 < steps) load_step(step + 1);
        // Queries of this block that come before the pair's first key.
        const int blind = pair_row - step % blocks * BLOCK_M;
        const u32 stage = stages + step % 2 * (2 * Q_BYTES);
        const f32* column = statistics + step % 2 * (2 * BLOCK_M) + lane % 4 * 2;
        f32 s[M][N8][4];
        u32 p[M][N8 / 2][4];
        product_rows(s, fragment, fragment_b(stage + q_offset));
        if (makes_p) {
            shape_scores(s, score);
            probabilities(s, column, scale_log2, blind, window);
            round_to_a(p, s);
            leave(space, p);
            probabilities_left();
        } else {
            probabilities_left();
            multiply(s, space, column, score);
            round_to_a(p, s);
        }
        product_columns(acc, p, fragment_a(stage + Q_BYTES - q_offset));
    }

    const f32 factor = makes_p ? 1.0f : scale;
    f32 factors[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factors[m][0] = factors[m][1] = factor;
    const int ld = makes_p ? lddv : lddk;
    store_rows((makes_p ? dv : dk) + (long long)(tile.x + pair_row) * ld + kv_head * HEAD_DIM, ld, rows - pair_row,
               shared + (makes_p ? 0 : KV_BYTES) + pair_row * ROW_BYTES, acc, factors);
}
