// Causal grouped-query attention over documents that lie one after another, forward, on mma.sync: every GPU from sm_80
// up. kernels/src/ops/attention.
//
// For a query that sees keys 0 .. n: o = Σ_j p_j·v_j, p = softmax(scale·q·k_j), lse = ln Σ_j exp(scale·q·k_j); a window, a
// softcap and sinks are options of attention_scores.cuh. Blocks of keys before the window of a whole tile are not loaded.
// A block takes BLOCK_M queries of one head and walks over their keys, BLOCK_N at a time, with a running maximum and
// sum (Dao, arXiv:2307.08691); each warp keeps its rows' scores, probabilities and sums in registers. Scores and sums
// are f32; probabilities are rounded to T before the product with v.
//
// Layout: q, o [tokens, heads·HEAD_DIM], k, v [·, kv_heads·HEAD_DIM] of T (bf16 or f16), row-major with row strides in
// elements; pointers 16-byte aligned, strides multiples of 8. lse f32 [heads, tokens], or null. scale > 0. Query head h
// reads key/value head h / (heads / kv_heads).
// tiles int4, one for each BLOCK_M queries of a document:
//   x  the tile's first row of q      y  the end of the document's rows of q
//   z  the document's first row of k  w  keys before the first query's own; query x + i sees rows z ..= z + w + i of k
// A document of rows s .. e gives, for t = 0, BLOCK_M, 2·BLOCK_M … < e - s: (s + t, e, s, t). Where q holds the last
// e - s rows of a document whose keys begin at row z, after `past` others: (s + t, e, z, past + t). Order: w
// descending, so that the longest work starts first. Empty documents have no tiles.
//
// Source: prelude.cuh, attention_scores.cuh, mma_sync.cuh, this file. Defines: the options, T, HEAD_DIM = 64 | 128 | 256,
// BLOCK_M, BLOCK_N, WARPS, BLOCKS (a multiprocessor's blocks that registers must allow). None of these leaves registers for
// local memory:
//   BLOCK_M, BLOCK_N, WARPS, BLOCKS     sm_80, sm_87    sm_86, 89, 120    sm_90           sm_100, 103
//   HEAD_DIM 256                        128, 32, 8, 1   64, 32, 4, 1      128, 64, 8, 1   128, 64, 8, 1
//   HEAD_DIM 128                        128, 32, 4, 2   128, 64, 8, 1     128, 64, 4, 2   128, 32, 4, 2
//   HEAD_DIM 64                         128, 64, 4, 2   128, 64, 4, 2     128, 128, 4, 2  128, 64, 4, 2
// With an option sm_90 takes the last column's tiles for heads of 64 and 128 channels.
// Launch: attention_fwd(q, k, v, o, lse|null, tiles, i32 ldq, ldk, ldv, ldo, heads, kv_heads, tokens, f32 scale,
//   i32 window, f32 softcap, sinks|null), grid (tiles·heads), block (32·WARPS), dynamic shared memory (BLOCK_M + 4·BLOCK_N)·HEAD_DIM·2 bytes;
//   tokens: rows of q
//
// Floor, 4 × 2,048 tokens, 32/8 heads × 128: 137 GFLOP, 0.17 ms at the 790 TFLOP/s of an H200's wgmma, which mma.sync
// does not reach; 169 MB, 0.04 ms at 4.25 TB/s.
// Status (H200, 2026-11-23, bf16; TFLOP/s count 4·heads·head_dim·Σ length²/2; FA2 and cuDNN are PyTorch 2.11's):
//   4 × 2,048, 32/8 × 128    0.408 ms  337    43 % of the floor   FA2 0.478 ms  287   cuDNN 0.261 ms  526
//   1 × 32,768, 32/8 × 128   23.4 ms   376                        FA2 25.5 ms   346   cuDNN 14.7 ms   600
//   4 × 2,048, 16/8 × 64     0.124 ms  278                        FA2 0.159 ms  216   cuDNN 0.101 ms  340
//   2 × 512, 16/8 × 128      0.019 ms  111    in a CUDA graph
//   with the tiles of sm_80: 0.432 ms, of sm_86: 0.524 ms for the first row on this card.
// Tests: o within 2 × the error of the same dtype with materialized scores, against f64; documents of 1 … 1,000 tokens,
// many of them, groups of 1, 2, 4, 7, strided slices, caches of 0 … 1,000 keys; memcheck and racecheck clean.
// Did not help: 16 rows a warp instead of 32 (0.52 ms: every B fragment then serves one product instead of two);
// rescaling at every new maximum (SLACK = 0: 0.425 ms); BLOCK_N 48 (0.411 ms, spills).

static const int M = BLOCK_M / (16 * WARPS); // fragments of 16 rows in a warp
static const int N8 = BLOCK_N / 8;
static const int Q_BYTES = BLOCK_M * ROW_BYTES;
static const int KV_BYTES = BLOCK_N * ROW_BYTES;
static_assert(BLOCK_M == 16 * M * WARPS && BLOCK_N % 16 == 0, "whole fragments");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_fwd(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ o,
              f32* __restrict__ lse, const int4* __restrict__ tiles, int ldq, int ldk, int ldv, int ldo, int heads,
              int kv_heads, int tokens, f32 scale, int window, f32 softcap, const T* __restrict__ sinks) {
    extern __shared__ __align__(1024) u8 shared[];
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16 * M;
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int4 tile = tiles[blockIdx.x / heads];
    const int rows = min(BLOCK_M, tile.y - tile.x);
    const int keys = tile.w + tile.y - tile.x;
    const int start = first_key(tile.w, window);
    const int blocks = (tile.w + rows - start + BLOCK_N - 1) / BLOCK_N;
    const ScoreScale score(scale, softcap);
    const f32 scale_log2 = score.factor * LOG2E;

    k += (long long)tile.z * ldk + kv_head * HEAD_DIM;
    v += (long long)tile.z * ldv + kv_head * HEAD_DIM;
    const u32 q_tile = shared_address(shared), stages = q_tile + Q_BYTES;
    auto load_block = [&](int block) {
        const u32 stage = stages + block % 2 * (2 * KV_BYTES);
        const int first = start + block * BLOCK_N;
        load_tile<BLOCK_N>(stage, k + (long long)first * ldk, ldk, keys - first);
        load_tile<BLOCK_N>(stage + KV_BYTES, v + (long long)first * ldv, ldv, keys - first);
    };
    load_tile<BLOCK_M>(q_tile, q + (long long)tile.x * ldq + head * HEAD_DIM, ldq, rows);
    load_block(0);

    f32 acc[M][D8][4] = {}, top[M][2], sum[M][2] = {};
#pragma unroll
    // With a window a row may see no key of its first blocks; its maximum must be finite all the same.
    for (int m = 0; m < M; m++) top[m][0] = top[m][1] = HAS_WINDOW ? -1e30f : __int_as_float(0xff800000);
    const u32 q_fragment = fragment_a(q_tile + warp_row * ROW_BYTES);

    for (int block = 0; block < blocks; block++) {
        copies_arrived();
        __syncthreads();
        if (block + 1 < blocks) load_block(block + 1);
        // Keys of this block that the warp's first row sees.
        const int seen = tile.w + warp_row + 1 - start - block * BLOCK_N;
        if (seen + 16 * M - 1 <= 0 || (HAS_WINDOW && seen - window >= BLOCK_N)) continue;

        const u32 stage = stages + block % 2 * (2 * KV_BYTES);
        f32 s[M][N8][4];
        product_rows(s, q_fragment, fragment_b(stage));
        shape_scores(s, score);
        if (seen < BLOCK_N) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n * 8 + lane % 4 * 2 + e % 2 >= seen + m * 16 + e / 2 * 8 + lane / 4)
                            s[m][n][e] = __int_as_float(0xff800000);
        }
        if (HAS_WINDOW && seen + 16 * M - 1 > window) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n * 8 + lane % 4 * 2 + e % 2 < seen - window + m * 16 + e / 2 * 8 + lane / 4)
                            s[m][n][e] = __int_as_float(0xff800000);
        }
        softmax_step(s, acc, top, sum, scale_log2);
        u32 p[M][N8 / 2][4];
        round_to_a(p, s);
        product_columns(acc, p, fragment_a(stage + KV_BYTES));
    }

    f32 inverse[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            f32 total = sum[m][half];
            total += __shfl_xor_sync(0xffffffffu, total, 1);
            total += __shfl_xor_sync(0xffffffffu, total, 2);
            const SoftmaxEnd end(top[m][half] * score.factor, total, sinks, head);
            inverse[m][half] = end.inverse;
            const int row = warp_row + m * 16 + half * 8 + lane / 4;
            if (lse && lane % 4 == 0 && row < rows) lse[(long long)head * tokens + tile.x + row] = end.lse;
        }
    store_rows(o + (long long)(tile.x + warp_row) * ldo + head * HEAD_DIM, ldo, rows - warp_row,
               shared + warp_row * ROW_BYTES, acc, inverse);
}
