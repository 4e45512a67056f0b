// The gradient of attention's queries on mma.sync: every GPU from sm_80 up. kernels/src/ops/attention; the forward is
// attention_fwd.cu.
//
// With P = exp(scale·q·kᵀ - lse) recomputed and delta = rowsum(d_o ∘ o): dS = P ∘ (d_o·vᵀ - delta), dq = scale·dS·k.
// A block takes BLOCK_M queries of one head and walks over their keys as the forward does. dk and dv come from a second
// kernel, attention_bwd_dkdv.cu: seven products instead of five, but no sum ever leaves its block, so there are no
// atomics, no f32 copy of dq to clear and convert, and the result is deterministic.
//
// Layout and tiles: as in attention_fwd.cu (with this kernel's BLOCK_M); d_o, dq like q; lse, delta f32
// [heads, tokens]. Scratch of the whole backward: delta, 4·heads·tokens bytes.
// Order of a backward: attention_delta, then attention_bwd_dq and attention_bwd_dkdv in any order or concurrently.
//
// Source: prelude.cuh, attention_scores.cuh, mma_sync.cuh, this file. Defines as in attention_fwd.cu:
//   BLOCK_M, BLOCK_N, WARPS, BLOCKS     sm_80, sm_87    sm_86, 89, 120    sm_90           sm_100, 103
//   HEAD_DIM 256                        64, 32, 4, 1    64, 16, 4, 1      128, 32, 8, 1   128, 32, 8, 1
//   HEAD_DIM 128                        128, 64, 8, 1   128, 32, 8, 1     128, 32, 4, 2   128, 32, 4, 2
//   HEAD_DIM 64                         128, 64, 4, 2   128, 64, 8, 1     128, 64, 4, 2   128, 48, 4, 2
// With an option sm_80 and sm_87 take the last column's tiles for heads of 64 channels.
// Launch: attention_bwd_dq(q, k, v, d_o, lse, delta, dq, tiles, i32 ldq, ldk, ldv, lddo, lddq, heads, kv_heads, tokens,
//   f32 scale, i32 window, f32 softcap), grid (tiles·heads), block (32·WARPS), dynamic shared memory (2·BLOCK_M + 4·BLOCK_N)·HEAD_DIM·2 bytes
//
// Floor, 4 × 2,048 tokens, 32/8 heads × 128: 206 GFLOP, 0.26 ms at the 790 TFLOP/s of an H200's wgmma, which mma.sync
// does not reach; 238 MB, 0.06 ms at 4.25 TB/s.
// Status (H200, 2026-11-23, bf16; a backward = delta + dq + dkdv, TFLOP/s count its 2.5 × the forward's):
//                            this kernel   backward              FA2 in PyTorch 2.11    cuDNN
//   4 × 2,048, 32/8 × 128    0.571 ms      1.41 ms   244         1.66 ms   207          0.865 ms  397
//   1 × 32,768, 32/8 × 128   33.4 ms       84.0 ms   262         68.6 ms   321          40.3 ms   546
//   4 × 2,048, 16/8 × 64     0.156 ms      0.426 ms  202         0.530 ms  162          0.314 ms  274
//   2 × 512, 16/8 × 128      0.026 ms      0.068 ms  79          in a CUDA graph
//   with the tiles of sm_80: 0.733 ms, of sm_86: 0.819 ms for the first row on this card.
//   This kernel's first row is 46 % of its floor.
// Tests: as the forward's, without caches; two runs bit-equal.
// Did not help: 16 rows a warp (0.69 … 0.83 ms, as in the forward); BLOCK_N 48 (spills).

static const int M = BLOCK_M / (16 * WARPS); // fragments of 16 rows in a warp
static const int N8 = BLOCK_N / 8;
static const int Q_BYTES = BLOCK_M * ROW_BYTES;
static const int KV_BYTES = BLOCK_N * ROW_BYTES;
static_assert(BLOCK_M == 16 * M * WARPS && BLOCK_N % 16 == 0, "whole fragments");

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
attention_bwd_dq(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ d_o,
                 const f32* __restrict__ lse, const f32* __restrict__ delta, T* __restrict__ dq,
                 const int4* __restrict__ tiles, int ldq, int ldk, int ldv, int lddo, int lddq, int heads, int kv_heads,
                 int tokens, f32 scale, int window, f32 softcap) {
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
    const u32 q_tile = shared_address(shared), do_tile = q_tile + Q_BYTES, stages = do_tile + Q_BYTES;
    auto load_block = [&](int block) {
        const u32 stage = stages + block % 2 * (2 * KV_BYTES);
        const int first = start + block * BLOCK_N;
        load_tile<BLOCK_N>(stage, k + (long long)first * ldk, ldk, keys - first);
        load_tile<BLOCK_N>(stage + KV_BYTES, v + (long long)first * ldv, ldv, keys - first);
    };
    load_tile<BLOCK_M>(q_tile, q + (long long)tile.x * ldq + head * HEAD_DIM, ldq, rows);
    load_tile<BLOCK_M>(do_tile, d_o + (long long)tile.x * lddo + head * HEAD_DIM, lddo, rows);
    load_block(0);

    f32 lse_log2[M][2], row_delta[M][2];
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = warp_row + m * 16 + half * 8 + lane / 4;
            const long long index = (long long)head * tokens + tile.x + row;
            lse_log2[m][half] = row < rows ? lse[index] * LOG2E : 0.0f;
            row_delta[m][half] = row < rows ? delta[index] : 0.0f;
        }
    f32 acc[M][D8][4] = {};
    const u32 q_fragment = fragment_a(q_tile + warp_row * ROW_BYTES);
    const u32 do_fragment = fragment_a(do_tile + warp_row * ROW_BYTES);

    for (int block = 0; block < blocks; block++) {
        copies_arrived();
        __syncthreads();
        if (block + 1 < blocks) load_block(block + 1);
        // Keys of this block that the warp's first row sees.
        const int seen = tile.w + warp_row + 1 - start - block * BLOCK_N;
        if (seen + 16 * M - 1 <= 0 || (HAS_WINDOW && seen - window >= BLOCK_N)) continue;

        const u32 stage = stages + block % 2 * (2 * KV_BYTES);
        f32 s[M][N8][4], dp[M][N8][4];
        product_rows(s, q_fragment, fragment_b(stage));
        product_rows(dp, do_fragment, fragment_b(stage + KV_BYTES));
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N8; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    const f32 x = score.shaped(s[m][n][e]);
                    const f32 p = exp2_approx(fmaf(x, scale_log2, -lse_log2[m][e / 2]));
                    s[m][n][e] = p * (dp[m][n][e] - row_delta[m][e / 2]);
                    if (HAS_SOFTCAP) s[m][n][e] *= score.slope(x);
                }
        if (seen < BLOCK_N) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n * 8 + lane % 4 * 2 + e % 2 >= seen + m * 16 + e / 2 * 8 + lane / 4) s[m][n][e] = 0.0f;
        }
        if (HAS_WINDOW && seen + 16 * M - 1 > window) {
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int n = 0; n < N8; n++)
#pragma unroll
                    for (int e = 0; e < 4; e++)
                        if (n * 8 + lane % 4 * 2 + e % 2 < seen - window + m * 16 + e / 2 * 8 + lane / 4)
                            s[m][n][e] = 0.0f;
        }
        u32 ds[M][N8 / 2][4];
        round_to_a(ds, s);
        product_columns(acc, ds, fragment_a(stage));
    }

    f32 factor[M][2];
#pragma unroll
    for (int m = 0; m < M; m++) factor[m][0] = factor[m][1] = scale;
    store_rows(dq + (long long)(tile.x + warp_row) * lddq + head * HEAD_DIM, lddq, rows - warp_row,
               shared + warp_row * ROW_BYTES, acc, factor);
}
