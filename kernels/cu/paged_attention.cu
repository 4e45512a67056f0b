// Causal grouped-query attention over pages of keys and values, on mma.sync: every GPU from sm_80 up.
// kernels/src/ops/paged_attention.
//
// The query at position i of its sequence sees the keys j <= i, with the options of attention_scores.cuh:
// o = Σ_j p_j·v_j, p = softmax(scale·q·k_j). Scores and sums are f32; probabilities are rounded to T before the product
// with v. The query heads that share a key/value head are rows of one tile, so keys and values are read once for them.
//
// paged_decode: one query a sequence. It also writes the query's own key and value into the page that ends there. Warps
// take the pages of a sequence in turn, each with copies of its own on the way (STAGES - 1 pages), and their softmaxes are
// merged at the end. With splits > 1 several blocks share a sequence; the last of them to end merges what all left in
// `partial` and `stats`, in the order of the splits, so the bits do not depend on which one it is.
// paged_chunk: the next queries of a sequence whose keys and values are in the pages already. A block takes up to 16·WARPS
// rows, whole queries, and walks over their keys BLOCK_N at a time.
//
// Layout: q, o [tokens, heads·HEAD_DIM], k, v [tokens, kv_heads·HEAD_DIM], pools [pages·16, kv_heads·HEAD_DIM] of T (bf16
// or f16), row-major with row strides in elements; pointers 16-byte aligned, strides multiples of 8. Key j is row
// tables[z + j / 16]·16 + j % 16 of the pools, z the start of the sequence's block table. scale > 0. Query head h reads
// key/value head h / (heads / kv_heads).
// tokens int4, one a sequence: x its row of q, k, v and o, y its position, z the start of its block table
// tiles int4: x the tile's first row of q, y its queries, at most 16·WARPS / (heads / kv_heads), z the position of the first,
//   w the start of the block table
// partial f32 [sequences, head tiles, splits, 16, HEAD_DIM], stats float2 [sequences, head tiles, splits, 16]: a head tile is up
//   to 16 of the heads that share a key/value head. counters u32 [sequences, head tiles], 0 before and after a launch. With one
//   split none of the three is accessed.
//
// Source: prelude.cuh, attention_scores.cuh, mma_sync.cuh, this file. Defines: the options, T, HEAD_DIM = 64 | 128 | 256,
// WARPS, STAGES, BLOCK_N.
// Launch: block (32·WARPS)
//   paged_decode(q, k, v, k_pool, v_pool, o, partial, stats, counters, tokens, tables, i32 ldq, ldk, ldv, ldo, ldp, heads,
//     kv_heads, splits, f32 scale, i32 window, f32 softcap, sinks|null), grid (head tiles, sequences, splits), dynamic shared memory
//     (16 + 32·WARPS·STAGES)·HEAD_DIM·2 bytes
//   paged_chunk(q, k_pool, v_pool, o, tiles, tables, i32 ldq, ldo, ldp, heads, kv_heads, f32 scale, i32 window, f32 softcap,
//     sinks|null), grid (tiles·kv_heads), dynamic shared memory (16·WARPS + 4·BLOCK_N)·HEAD_DIM·2 bytes
//
// Floor: the bytes of keys and values, 4 KiB a token with 8 heads of 128 in bf16, at the 4.3 TB/s of an H200.
// Status (H200, 2026-11-30, paged_decode, bf16, 32/8 heads of 128, in a CUDA graph, pages in random order; us and GB/s of keys
// and values):
//   sequences    128 tokens      640             1,024           4,096
//   1            4.0    130      6.2    424      6.4    656      9.9    1,690
//   8            4.3    966      10.0   2,101    13.3   2,515    37.1   3,621
//   32           8.0    2,089    24.0   3,494    35.3   3,807    125.1  4,290
//   64           14.6   2,301    45.1   3,723    67.3   3,989    247.4  4,340
//   256          45.4   2,954    161.7  4,149    250.9  4,280
// Tests: kernels/tests/common/paged_attention.rs: within 2 × the error of the same dtype with materialized scores.
// Did not help: splits for more than one block a multiprocessor (8 × 640: 14.5 us; 1 × 4,096: 17.9), 8 warps with two stages
// (256 × 640: 170), 4 stages (171).

static const int PAGE = 16;
static const int PAGE_BYTES = PAGE * ROW_BYTES; // of the keys or the values of one head
static const int ROWS = 16 * WARPS;             // of a tile of paged_chunk
static const int CHANNELS4 = HEAD_DIM / 4;
// Below every score; finite, so that a row without keys so far is harmless.
static const f32 LOWEST = -1e30f;

// The scores that a warp's rows do not see become -inf: `seen`: keys of the tile up to the row's own; `from`: the first
// one in its window.
template <int N8> DEVICE void mask(f32 (&s)[1][N8][4], int seen, int from, int half) {
#pragma unroll
    for (int n = 0; n < N8; n++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int key = n * 8 + threadIdx.x % 4 * 2 + e;
            if (key >= seen || (HAS_WINDOW && key < from)) s[0][n][half * 2 + e] = __int_as_float(0xff800000);
        }
}

DEVICE void store4(T* to, const f32 (&x)[4]) {
    *reinterpret_cast<uint2*>(to) = make_uint2(pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]));
}

// Σ_i weight_i·x_i over softmaxes of the same row, relative to their common maximum.
struct Merged {
    f32 top, total, x[4];
    f32 scale_log2;
    DEVICE Merged(f32 scale_log2) : top(LOWEST), total(0.0f), x{}, scale_log2(scale_log2) {}
    DEVICE void add(f32 other_top, f32 other_total, const float4& y) {
        const f32 next = fmaxf(top, other_top);
        const f32 mine = exp2_approx((top - next) * scale_log2), other = exp2_approx((other_top - next) * scale_log2);
        top = next;
        total = total * mine + other_total * other;
        x[0] = x[0] * mine + y.x * other;
        x[1] = x[1] * mine + y.y * other;
        x[2] = x[2] * mine + y.z * other;
        x[3] = x[3] * mine + y.w * other;
    }
    DEVICE void store(T* to, f32 factor, const T* sinks, int head) {
        const SoftmaxEnd end(top * factor, total, sinks, head);
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] *= end.inverse;
        store4(to, x);
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 2)
paged_decode(const T* q, const T* k, const T* v, T* k_pool, T* v_pool,
             T* __restrict__ o, f32* partial, float2* stats, u32* counters, const int4* tokens,
             const u32* tables, int ldq, int ldk, int ldv, int ldo, int ldp, int heads, int kv_heads,
             int splits, f32 scale, int window, f32 softcap, const T* __restrict__ sinks) {
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ float2 warp_stats[WARPS][16];
    __shared__ bool is_last;
    begin_early();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int4 token = tokens[blockIdx.y];
    const int first_page = first_key(token.y, window) / PAGE, pages = token.y / PAGE + 1 - first_page;
    // A split has a page for every warp at least.
    const int share = max((pages + splits - 1) / splits, WARPS), used = (pages + share - 1) / share;
    if ((int)blockIdx.z >= used) return;
    const int begin = first_page + blockIdx.z * share, end = min(begin + share, first_page + pages);
    const int group = heads / kv_heads, tiles = (group + 15) / 16, kv_head = blockIdx.x / tiles;
    const int head = kv_head * group + blockIdx.x % tiles * 16, rows = min(16, (kv_head + 1) * group - head);
    const ScoreScale score(scale, softcap);
    const f32 scale_log2 = score.factor * LOG2E;
    q += (long long)token.x * ldq + head * HEAD_DIM;
    o += (long long)token.x * ldo + head * HEAD_DIM;
    tables += token.z;

    const u32 q_tile = shared_address(shared), stages = q_tile + PAGE_BYTES + warp * (STAGES * 2 * PAGE_BYTES);
    for (int i = threadIdx.x; i < 16 * PIECES; i += THREADS) {
        const int row = i / PIECES, piece = i % PIECES;
        copy16_async(q_tile + row * ROW_BYTES + ((piece ^ (row % 8)) << 4), q + (row < rows ? row : 0) * HEAD_DIM + piece * 8,
                     row < rows);
    }
    commit_copies();

    // Block table entries of the warp's next 32 pages, one a lane.
    u32 entries = 0;
    const int mine = begin + warp, count = max(0, (end - mine + WARPS - 1) / WARPS);
    const int piece = lane % PIECES;
    auto load_page = [&](int i) {
        if (i < count) {
            if (i % 32 == 0) entries = i + lane < count ? tables[mine + (i + lane) * WARPS] : 0;
            const u32 page = __shfl_sync(0xffffffffu, entries, i % 32);
            // Rows from the new token's own on are zeros: nothing has been written there yet.
            const int valid = token.y - (mine + i * WARPS) * PAGE;
            const u32 stage = stages + i % STAGES * (2 * PAGE_BYTES);
            const long long from = (long long)page * PAGE * ldp + kv_head * HEAD_DIM + piece * 8;
#pragma unroll
            for (int j = 0; j < PAGE * PIECES / 32; j++) {
                const int row = lane / PIECES + j * (32 / PIECES);
                const u32 to = stage + row * ROW_BYTES + ((piece ^ (row % 8)) << 4);
                const long long at = from + (row < valid ? row : 0) * ldp;
                copy16_async(to, k_pool + at, row < valid);
                copy16_async(to + PAGE_BYTES, v_pool + at, row < valid);
            }
        }
        commit_copies();
    };
    f32 acc[1][D8][4] = {}, top[1][2] = {{LOWEST, LOWEST}}, sum[1][2] = {};
    const u32 q_fragment = fragment_a(q_tile);
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) load_page(i);
    copies_left<STAGES - 1>();
    __syncthreads();
    for (int i = 0; i < count; i++) {
        __syncwarp();
        load_page(i + STAGES - 1);
        copies_left<STAGES - 1>();
        __syncwarp();
        const int page = mine + i * WARPS, seen = token.y + 1 - page * PAGE;
        const u32 stage = stages + i % STAGES * (2 * PAGE_BYTES);
        if (seen <= PAGE) {
            // The page of the new token, whose key and value are in no page yet.
            u8* tile = shared + (stage - q_tile);
            const long long slot = (long long)tables[page] * PAGE + seen - 1;
            for (int j = lane; j < 2 * PIECES; j += 32) {
                const int at = j % PIECES, channel = kv_head * HEAD_DIM + at * 8;
                const bool is_k = j < PIECES;
                const uint4 x = *reinterpret_cast<const uint4*>(
                    is_k ? k + (long long)token.x * ldk + channel : v + (long long)token.x * ldv + channel);
                *reinterpret_cast<uint4*>(tile + (is_k ? 0 : PAGE_BYTES) + (seen - 1) * ROW_BYTES +
                                          ((at ^ ((seen - 1) % 8)) << 4)) = x;
                *reinterpret_cast<uint4*>((is_k ? k_pool : v_pool) + slot * ldp + channel) = x;
            }
            __syncwarp();
        }
        f32 s[1][PAGE / 8][4];
        product_rows(s, q_fragment, fragment_b(stage));
        shape_scores(s, score);
        const int from = token.y + 1 - window - page * PAGE;
        if (seen < PAGE || (HAS_WINDOW && from > 0)) {
            mask(s, seen, from, 0);
            mask(s, seen, from, 1);
        }
        softmax_step(s, acc, top, sum, scale_log2);
        u32 p[1][1][4];
        round_to_a(p, s);
        product_columns(acc, p, fragment_a(stage + PAGE_BYTES));
    }

    // Every copy has arrived, and a warp's first stage is only its own.
    __syncwarp();
    f32* sums = reinterpret_cast<f32*>(shared + PAGE_BYTES + warp * (STAGES * 2 * PAGE_BYTES));
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int row = half * 8 + lane / 4;
        f32 total = sum[0][half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (row >= rows) continue;
        if (lane % 4 == 0) warp_stats[warp][row] = make_float2(top[0][half], total);
#pragma unroll
        for (int n = 0; n < D8; n++)
            *reinterpret_cast<float2*>(sums + row * HEAD_DIM + n * 8 + lane % 4 * 2) =
                make_float2(acc[0][n][half * 2], acc[0][n][half * 2 + 1]);
    }
    __syncthreads();
    const long long tile = (long long)blockIdx.y * gridDim.x + blockIdx.x;
    for (int i = threadIdx.x; i < rows * CHANNELS4; i += THREADS) {
        const int row = i / CHANNELS4, channel = i % CHANNELS4 * 4;
        Merged merged(scale_log2);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float2 s = warp_stats[w][row];
            merged.add(s.x, s.y, *reinterpret_cast<const float4*>(shared + PAGE_BYTES + w * (STAGES * 2 * PAGE_BYTES) +
                                                                  (row * HEAD_DIM + channel) * 4));
        }
        if (used == 1) {
            merged.store(o + row * HEAD_DIM + channel, score.factor, sinks, head + row);
            continue;
        }
        const long long at = (tile * splits + blockIdx.z) * 16 + row;
        *reinterpret_cast<float4*>(partial + at * HEAD_DIM + channel) =
            make_float4(merged.x[0], merged.x[1], merged.x[2], merged.x[3]);
        if (channel == 0) stats[at] = make_float2(merged.top, merged.total);
    }
    if (used == 1) return;

    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        is_last = atomicAdd(&counters[tile], 1u) == (u32)used - 1;
        if (is_last) counters[tile] = 0;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    for (int i = threadIdx.x; i < rows * CHANNELS4; i += THREADS) {
        const int row = i / CHANNELS4, channel = i % CHANNELS4 * 4;
        Merged merged(scale_log2);
#pragma unroll 4
        for (int split = 0; split < used; split++) {
            const long long at = (tile * splits + split) * 16 + row;
            const float2 s = __ldcg(&stats[at]);
            merged.add(s.x, s.y, __ldcg(reinterpret_cast<const float4*>(partial + at * HEAD_DIM + channel)));
        }
        merged.store(o + row * HEAD_DIM + channel, score.factor, sinks, head + row);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
paged_chunk(const T* __restrict__ q, const T* __restrict__ k_pool, const T* __restrict__ v_pool, T* __restrict__ o,
            const int4* __restrict__ tiles, const u32* __restrict__ tables, int ldq, int ldo, int ldp, int heads,
            int kv_heads, f32 scale, int window, f32 softcap, const T* __restrict__ sinks) {
    extern __shared__ __align__(1024) u8 shared[];
    const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
    const int group = heads / kv_heads, kv_head = blockIdx.x % kv_heads;
    const int4 tile = tiles[blockIdx.x / kv_heads];
    const int rows = tile.y * group, keys = tile.z + tile.y;
    const int start = first_key(tile.z, window) / PAGE * PAGE, blocks = (keys - start + BLOCK_N - 1) / BLOCK_N;
    const ScoreScale score(scale, softcap);
    const f32 scale_log2 = score.factor * LOG2E;
    // Row r of the tile is a head of a query.
    q += (long long)tile.x * ldq + kv_head * group * HEAD_DIM;
    o += (long long)tile.x * ldo + kv_head * group * HEAD_DIM;
    tables += tile.w;

    const u32 q_tile = shared_address(shared), stages = q_tile + ROWS * ROW_BYTES;
    const int piece = threadIdx.x % PIECES;
    for (int row = threadIdx.x / PIECES; row < ROWS; row += THREADS / PIECES)
        copy16_async(q_tile + row * ROW_BYTES + ((piece ^ (row % 8)) << 4),
                     q + (row < rows ? (long long)(row / group) * ldq + row % group * HEAD_DIM : 0) + piece * 8, row < rows);
    auto load_block = [&](int block) {
        const u32 stage = stages + block % 2 * (2 * BLOCK_N * ROW_BYTES);
#pragma unroll
        for (int i = 0; i < BLOCK_N * PIECES / THREADS; i++) {
            const int row = threadIdx.x / PIECES + i * (THREADS / PIECES), key = start + block * BLOCK_N + row;
            const bool valid = key < keys;
            const long long at =
                valid ? ((long long)tables[key / PAGE] * PAGE + key % PAGE) * ldp + kv_head * HEAD_DIM + piece * 8 : 0;
            const u32 to = stage + row * ROW_BYTES + ((piece ^ (row % 8)) << 4);
            copy16_async(to, k_pool + at, valid);
            copy16_async(to + BLOCK_N * ROW_BYTES, v_pool + at, valid);
        }
    };
    load_block(0);

    f32 acc[1][D8][4] = {}, top[1][2] = {{LOWEST, LOWEST}}, sum[1][2] = {};
    const u32 q_fragment = fragment_a(q_tile + warp_row * ROW_BYTES);
    // Rows past the end stand for the last query.
    const int last = tile.y - 1;
    const int positions[2] = {tile.z + min(last, (warp_row + lane / 4) / group),
                              tile.z + min(last, (warp_row + 8 + lane / 4) / group)};
    const int lowest = tile.z + min(last, warp_row / group), highest = tile.z + min(last, (warp_row + 15) / group);
    for (int block = 0; block < blocks; block++) {
        copies_arrived();
        __syncthreads();
        if (block + 1 < blocks) load_block(block + 1);
        const int first = start + block * BLOCK_N;
        if (first > highest || (HAS_WINDOW && first + BLOCK_N <= lowest + 1 - window)) continue;

        const u32 stage = stages + block % 2 * (2 * BLOCK_N * ROW_BYTES);
        f32 s[1][BLOCK_N / 8][4];
        product_rows(s, q_fragment, fragment_b(stage));
        shape_scores(s, score);
        if (first + BLOCK_N > lowest + 1 || (HAS_WINDOW && first < highest + 1 - window))
#pragma unroll
            for (int half = 0; half < 2; half++)
                mask(s, positions[half] + 1 - first, positions[half] + 1 - window - first, half);
        softmax_step(s, acc, top, sum, scale_log2);
        u32 p[1][BLOCK_N / 16][4];
        round_to_a(p, s);
        product_columns(acc, p, fragment_a(stage + BLOCK_N * ROW_BYTES));
    }

    u8* warp_rows = shared + warp_row * ROW_BYTES;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; half++) {
        f32 total = sum[0][half];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        const int row = half * 8 + lane / 4;
        const SoftmaxEnd end(top[0][half] * score.factor, total, sinks, kv_head * group + (warp_row + row) % group);
#pragma unroll
        for (int n = 0; n < D8; n++)
            *reinterpret_cast<u32*>(warp_rows + row * ROW_BYTES + ((n ^ (row % 8)) << 4) + lane % 4 * 4) =
                pack2<T>(acc[0][n][half * 2] * end.inverse, acc[0][n][half * 2 + 1] * end.inverse);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16 * PIECES / 32; i++) {
        const int row = lane / PIECES + i * (32 / PIECES), at = lane % PIECES, of = warp_row + row;
        if (of < rows)
            *reinterpret_cast<uint4*>(o + (long long)(of / group) * ldo + of % group * HEAD_DIM + at * 8) =
                *reinterpret_cast<const uint4*>(warp_rows + row * ROW_BYTES + ((at ^ (row % 8)) << 4));
    }
}
