// Causal attention over documents of any length, backward, for Hopper and heads of 256 channels. The mathematics, the layout
// and the options are those of attention_bwd_sm90.cu. Its kernel does not fit: dk and dv of 128 keys would take 256 registers
// a thread, and of 64 keys it would spend its time on the f32 sums of dq. So there are two kernels, without atomics and
// without scratch but delta; the same inputs give the same bits.
//
// attention_bwd_dq_256_sm90: a block takes 128 queries of a head, 64 a warpgroup, and walks over their keys, 64 a step.
//   dq stays in registers: s = q·kᵀ, dp = d_o·vᵀ, dq += ds·k.
// attention_bwd_dkdv_256_sm90: a block takes 64 keys of a key head and walks over the queries that see them, of every query
//   head of the group, 64 a step. The first warpgroup computes p = exp(k·qᵀ) and sums dv += p·d_o; it leaves p, rounded
//   to T, in shared memory for the second, which computes v·d_oᵀ and ds and sums dk += ds·q. Each holds one accumulator
//   of 64 × 256.
//
// Compile for sm_90a with -DT=bf16|f16, and WINDOW and SOFTCAP of attention_scores.cuh.
// Launch after attention_delta.cu, in any order; block 384, maps as in attention_fwd_sm90.cu with boxes {64, rows, 4}:
//   attention_bwd_dq_256_sm90: grid n_tiles * heads, dynamic shared memory 229,440 bytes; rows: 128 of q and d_o, 64 of k and v
//     q_map, k_map, v_map, do_map; const f32* lse, const f32* delta; T* dq; const int4* tiles; int tokens, heads, kv_heads,
//     lddq; f32 scale; int window; f32 softcap
//     tiles: as in attention_fwd_sm90.cu
//   attention_bwd_dkdv_256_sm90: grid n_tiles * kv_heads, dynamic shared memory 214,120 bytes; rows: 64
//     q_map, k_map, v_map, do_map; const f32* lse, const f32* delta; T* dk, T* dv; const int4* tiles; int tokens, heads,
//     kv_heads, lddk, lddv; f32 scale; int window; f32 softcap
//     tiles: one for each 64 keys of each document: {first row, document's start, document's end, 0}, sorted by falling
//     end - row
//
// Floor, 4 x 2048 tokens, 8/4 heads x 256: 2.5 times the forward's operations, 172 GFLOP at 790 TFLOP/s = 217 us; these kernels
// make seven products instead of five, 240 GFLOP = 304 us.
// Status, delta and both kernels and the clearing of their results, NVIDIA H200, 2026-11-30, in CUDA graphs; TFLOP/s count 2.5
// times the forward; the peers through PyTorch 2.11 in the same run:
//   4 x 2048, 8/4 x 256                 510 us  337 TFLOP/s    cuDNN   849 us  202    FA2 1157 us
//   1 x 8192, 8/4 x 256                1780 us  386 TFLOP/s    cuDNN  1893 us  363    FA2 3184 us
//   4 x 2048, 8/4 x 256, window 1024    430 us  300 TFLOP/s    flex_attention 1537 us
//   the mma.sync kernels: 952 us, 3425 us, 765 us
// 168 registers at entry (240 a consumer thread, 24 a producer one), no local memory.
// Tests: dq, dk and dv against f64, at most 0.45 of twice the naive bf16 or f16 error plus one rounding: lengths 1 to 1500,
// windows 1 to 501, softcaps, groups of 2 and 8, slices of one buffer, poisoned outputs, repeated runs bit-equal.
// Did not help: descriptors of shared memory that the compiler keeps through the loop (95 registers spilled).

static_assert(HEAD_DIM == 256, "the sizes below are those of 256 channels");

#define KEYS 64
#define TILE_BYTES (64 * HEAD_DIM * 2)   // 64 rows
#define STAGES 2

// d = a bT, or d += a bT, both operands in shared memory with the summed index contiguous.
DEVICE void wgmma_set(f32 (&d)[32], u64 a, u64 b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 0, 0; " WGMMA(64) ACC32 ", %32, %33, add, 1, 1, 0, 0; }"
                 : REG32("=f", d, 0)
                 : "l"(a), "l"(b));
}
DEVICE void wgmma(f32 (&d)[32], u64 a, u64 b) {
    asm volatile(WGMMA(64) ACC32 ", %32, %33, 1, 1, 1, 0, 0;" : REG32("+f", d, 0) : "l"(a), "l"(b));
}

// [64, 64] = rows of `a` times rows of `b`, over the channels; panels of 64 columns are A_ROWS and 64 rows high.
template <int A_ROWS> DEVICE void multiply_rows(f32 (&d)[32], u64 a, u64 b) {
    // Otherwise the compiler keeps all the descriptors of a loop in registers.
    asm volatile("" : "+l"(a), "+l"(b));
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) {
        const u64 at = a + ((i / 4 * (A_ROWS * 128) + i % 4 * 32) >> 4), bt = b + ((i / 4 * (64 * 128) + i % 4 * 32) >> 4);
        if (i == 0) wgmma_set(d, at, bt);
        else wgmma(d, at, bt);
    }
    wgmma_commit();
}
// [64, HEAD_DIM] += x [64, 64] times 64 rows.
DEVICE void add_rows(f32 (&d)[128], const u32 (&x)[16], u64 rows) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; i++) wgmma(d, x + 4 * i, rows + (i * 2048 >> 4));
    wgmma_commit();
}
DEVICE void pack(u32 (&p)[16], const f32 (&s)[32]) {
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

// A warp writes its 16 rows of an accumulator, those before `end`, through `stage`, panels of ROWS rows in shared memory that
// nothing else uses any more, so that they leave in 16-byte pieces. `row` is the row in the matrix of the panels' first.
template <int ROWS>
DEVICE void store_rows(T* out, const f32 (&acc)[128], f32 factor, u32 stage, int row_in_tile, int row, int end, int ld) {
    const int lane = threadIdx.x % 32, r = row_in_tile + lane % 16;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 16; j++) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = pack2<T>(acc[8 * j + 2 * i] * factor, acc[8 * j + 2 * i + 1] * factor);
        const int chunk = 2 * j + lane / 16;
        store_matrices(stage + chunk / 8 * (ROWS * 128) + r * 128 + (chunk % 8 ^ r % 8) * 16, x);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int rr = row_in_tile + i;
        const u32 at = stage + lane / 8 * (ROWS * 128) + rr * 128 + (lane % 8 ^ rr % 8) * 16;
        uint4 x;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
        if (row + rr < end) *reinterpret_cast<uint4*>(out + (u64)(row + rr) * ld + lane * 8) = x;
    }
}

// The gradient of queries. Shared memory, in bytes from a base aligned to 1024; tiles as in attention_fwd_sm90.cu.
namespace by_queries {
static const int ROWS = 128;
static const u32 Q_AT = 0, DO_AT = 2 * TILE_BYTES, K_AT = 4 * TILE_BYTES, V_AT = K_AT + STAGES * TILE_BYTES;
static const u32 BARRIERS = V_AT + TILE_BYTES;
static const u32 QUERIES_FULL = BARRIERS, V_FULL = BARRIERS + 8, V_EMPTY = BARRIERS + 16, K_FULL = BARRIERS + 24, K_EMPTY = BARRIERS + 40;
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_dq_256_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                              const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap do_map, const f32* lse,
                              const f32* delta, T* dq, const int4* tiles, int tokens, int heads, int kv_heads, int lddq,
                              f32 scale, int window, f32 softcap) {
    using namespace by_queries;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    if (threadIdx.x == 0) {
        barrier_init(base + QUERIES_FULL, 1);
        barrier_init(base + V_FULL, 1);
        barrier_init(base + V_EMPTY, 8);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(base + K_FULL + 8 * i, 1);
            barrier_init(base + K_EMPTY + 8 * i, 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int4 tile = tiles[blockIdx.x / heads];
    const int head = blockIdx.x % heads;
    // The first key that any of the queries sees, and the number of steps.
    const int first = tile.y + first_key(tile.x - tile.y, window);
    const int steps = (min(tile.x + ROWS, tile.z) - first + KEYS - 1) / KEYS;

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) {
            const int panel = head / (heads / kv_heads) * (HEAD_DIM / 64);
            barrier_expect(base + QUERIES_FULL, 4 * TILE_BYTES);
            tma_load(base + Q_AT, &q_map, base + QUERIES_FULL, tile.x, head * (HEAD_DIM / 64));
            tma_load(base + DO_AT, &do_map, base + QUERIES_FULL, tile.x, head * (HEAD_DIM / 64));
            for (u32 j = 0; j < steps; j++) {
                const u32 slot = j % STAGES;
                barrier_wait(base + K_EMPTY + 8 * slot, j / STAGES % 2 ^ 1);
                barrier_expect(base + K_FULL + 8 * slot, TILE_BYTES);
                tma_load(base + K_AT + slot * TILE_BYTES, &k_map, base + K_FULL + 8 * slot, first + j * KEYS, panel);
                barrier_wait(base + V_EMPTY, j % 2 ^ 1);
                barrier_expect(base + V_FULL, TILE_BYTES);
                tma_load(base + V_AT, &v_map, base + V_FULL, first + j * KEYS, panel);
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const int row_in_tile = group * 64 + warp * 16;
        const ScoreScale score(scale, softcap);
        const f32 scale_log2 = score.factor * LOG2E;
        const u64 q = descriptor(base + Q_AT + group * 64 * 128, 0), d_o = descriptor(base + DO_AT + group * 64 * 128, 0);
        auto k_at = [&](u32 j) { return base + K_AT + j % STAGES * TILE_BYTES; };
        auto wait_k = [&](u32 j) { barrier_wait(base + K_FULL + 8 * (j % STAGES), j / STAGES % 2); };

        f32 lse_log2[2], row_delta[2];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const int row = tile.x + row_in_tile + lane / 4 + 8 * r;
            const u64 at = (u64)head * tokens + row;
            // An infinite one makes the probabilities of a row past the document's end zero.
            lse_log2[r] = row < tile.z ? lse[at] * LOG2E : __int_as_float(0x7f800000);
            row_delta[r] = row < tile.z ? delta[at] : 0.0f;
        }
        f32 acc[128], s[32], dp[32];
        u32 ds[16];
#pragma unroll
        for (int i = 0; i < 128; i++) acc[i] = 0.0f;

        // s and dp of step j to ds in T, with what waits between them.
        auto probabilities = [&](u32 j) {
            // How far the tile's first query is from the step's first key.
            const int distance = tile.x - first - (int)j * KEYS;
#pragma unroll
            for (int i = 0; i < 32; i++) {
                const f32 x = score.shaped(s[i]);
                s[i] = exp2_approx(fmaf(x, scale_log2, -lse_log2[i / 2 % 2]));
                if (HAS_SOFTCAP) s[i] *= score.slope(x);
            }
            if (distance < KEYS - 1 || (HAS_WINDOW && distance + ROWS > window)) {
#pragma unroll
                for (int i = 0; i < 32; i++) {
                    const int key = i / 4 * 8 + lane % 4 * 2 + i % 2, query = distance + row_in_tile + lane / 4 + i / 2 % 2 * 8;
                    if (key > query || (HAS_WINDOW && query - key >= window)) s[i] = 0.0f;
                }
            }
        };
        auto gradients = [&]() {
            if (lane == 0) barrier_arrive(base + V_EMPTY);
#pragma unroll
            for (int i = 0; i < 32; i++) dp[i] = s[i] * (dp[i] - row_delta[i / 2 % 2]);
            pack(ds, dp);
        };
        barrier_wait(base + QUERIES_FULL, 0);
        wait_k(0);
        multiply_rows<ROWS>(s, q, descriptor(k_at(0), 0));
        barrier_wait(base + V_FULL, 0);
        multiply_rows<ROWS>(dp, d_o, descriptor(base + V_AT, 0));
        wgmma_wait<1>(s);
        probabilities(0);
        wgmma_wait<0>(dp);
        gradients();
        for (u32 j = 0; j + 1 < steps; j++) {
            wait_k(j + 1);
            multiply_rows<ROWS>(s, q, descriptor(k_at(j + 1), 0));
            add_rows(acc, ds, descriptor(k_at(j), 64 * 128));
            barrier_wait(base + V_FULL, (j + 1) % 2);
            multiply_rows<ROWS>(dp, d_o, descriptor(base + V_AT, 0));
            wgmma_wait<2>(s);
            probabilities(j + 1);
            wgmma_wait<1>(acc);
            if (lane == 0) barrier_arrive(base + K_EMPTY + 8 * (j % STAGES));
            wgmma_wait<0>(dp);
            gradients();
        }
        add_rows(acc, ds, descriptor(k_at(steps - 1), 64 * 128));
        wgmma_wait<0>(acc);
        store_rows<ROWS>(dq + head * HEAD_DIM, acc, scale, base + Q_AT, row_in_tile, tile.x, tile.z, lddq);
    }
}

// The gradients of keys and values. Shared memory as above; p passes from a thread of one warpgroup to the same thread of the
// other, four values of 16 bytes each.
namespace by_keys {
static const int QUERIES = 64;
static const u32 P_BYTES = 128 * 64, STATS_BYTES = 2 * QUERIES * 4;
static const u32 K_AT = 0, V_AT = TILE_BYTES, Q_AT = 2 * TILE_BYTES, DO_AT = Q_AT + STAGES * TILE_BYTES;
static const u32 P_AT = DO_AT + STAGES * TILE_BYTES, STATS_AT = P_AT + STAGES * P_BYTES;
static const u32 BARRIERS = STATS_AT + STAGES * STATS_BYTES;
static const u32 KV_FULL = BARRIERS, Q_FULL = BARRIERS + 8, Q_EMPTY = BARRIERS + 24, DO_FULL = BARRIERS + 40;
static const u32 DO_EMPTY = BARRIERS + 56, P_FULL = BARRIERS + 72, P_EMPTY = BARRIERS + 88;

// What every role walks through: for each query head of the group, the tiles of queries from the diagonal on.
struct Step {
    int head, row, last_head, first_row, end;
    DEVICE bool more() const { return head <= last_head; }
    DEVICE void next() {
        row += QUERIES;
        if (row >= end) {
            row = first_row;
            head++;
        }
    }
};
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_dkdv_256_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                                const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap do_map, const f32* lse,
                                const f32* delta, T* dk, T* dv, const int4* tiles, int tokens, int heads, int kv_heads, int lddk,
                                int lddv, f32 scale, int window, f32 softcap) {
    using namespace by_keys;
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    if (threadIdx.x == 0) {
        barrier_init(base + KV_FULL, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(base + Q_FULL + 8 * i, 1 + 32);   // the copy and the lanes of the warp with the statistics
            barrier_init(base + DO_FULL + 8 * i, 1);
            barrier_init(base + Q_EMPTY + 8 * i, 8);
            barrier_init(base + DO_EMPTY + 8 * i, 8);
            barrier_init(base + P_FULL + 8 * i, 128);
            barrier_init(base + P_EMPTY + 8 * i, 128);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    const int4 tile = tiles[blockIdx.x / kv_heads];
    const int kv_head = blockIdx.x % kv_heads, group_heads = heads / kv_heads;
    // The end of the queries that see any of the keys.
    const int end = HAS_WINDOW ? min(tile.z, tile.x + KEYS - 1 + window) : tile.z;
    Step step = {kv_head * group_heads, tile.x, kv_head * group_heads + group_heads - 1, tile.x, end};

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        if (threadIdx.x == 0) {
            barrier_expect(base + KV_FULL, 2 * TILE_BYTES);
            tma_load(base + K_AT, &k_map, base + KV_FULL, tile.x, kv_head * (HEAD_DIM / 64));
            tma_load(base + V_AT, &v_map, base + KV_FULL, tile.x, kv_head * (HEAD_DIM / 64));
            for (u32 i = 0; step.more(); step.next(), i++) {
                const u32 slot = i % STAGES, parity = i / STAGES % 2 ^ 1;
                barrier_wait(base + Q_EMPTY + 8 * slot, parity);
                barrier_expect(base + Q_FULL + 8 * slot, TILE_BYTES);
                tma_load(base + Q_AT + slot * TILE_BYTES, &q_map, base + Q_FULL + 8 * slot, step.row, step.head * (HEAD_DIM / 64));
                barrier_wait(base + DO_EMPTY + 8 * slot, parity);
                barrier_expect(base + DO_FULL + 8 * slot, TILE_BYTES);
                tma_load(base + DO_AT + slot * TILE_BYTES, &do_map, base + DO_FULL + 8 * slot, step.row, step.head * (HEAD_DIM / 64));
            }
        } else if (warp == 2) {
            for (u32 i = 0; step.more(); step.next(), i++) {
                f32 l[2], d[2];
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = step.row + lane + 32 * h;
                    const u64 at = (u64)step.head * tokens + row;
                    // An infinite one makes the probabilities of a row past the end zero.
                    l[h] = row < step.end ? lse[at] * LOG2E : __int_as_float(0x7f800000);
                    d[h] = row < step.end ? delta[at] : 0.0f;
                }
                const u32 slot = i % STAGES, stats = base + STATS_AT + slot * STATS_BYTES;
                barrier_wait(base + Q_EMPTY + 8 * slot, i / STAGES % 2 ^ 1);
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    store_shared(stats + 4 * (lane + 32 * h), l[h]);
                    store_shared(stats + 4 * (QUERIES + lane + 32 * h), d[h]);
                }
                barrier_arrive(base + Q_FULL + 8 * slot);
            }
        }
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    const bool makes_p = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) == 1;
    const int lane = threadIdx.x % 32, row_in_tile = threadIdx.x / 32 % 4 * 16;
    const ScoreScale score(scale, softcap);
    const f32 scale_log2 = score.factor * LOG2E;
    const u32 space = base + P_AT + threadIdx.x % 128 * 16;
    auto q_at = [&](u32 i) { return base + Q_AT + i % STAGES * TILE_BYTES; };
    auto do_at = [&](u32 i) { return base + DO_AT + i % STAGES * TILE_BYTES; };
    auto stats_at = [&](u32 i) { return base + STATS_AT + i % STAGES * STATS_BYTES + lane % 4 * 8; };
    auto wait_full = [&](u32 full, u32 i) { barrier_wait(base + full + 8 * (i % STAGES), i / STAGES % 2); };
    auto release = [&](u32 empty, u32 i) {
        if (lane == 0) barrier_arrive(base + empty + 8 * (i % STAGES));
    };
    f32 acc[128], s[32];
    u32 p[16];
#pragma unroll
    for (int i = 0; i < 128; i++) acc[i] = 0.0f;
    barrier_wait(base + KV_FULL, 0);

    // Element 4j + 2r + c of a thread is key lane/4 + 8r of the warp's 16, query 8j + 2(lane%4) + c.
    if (makes_p) {
        const u64 k = descriptor(base + K_AT, 0);
        auto probabilities = [&](u32 i) {
            const u32 stats = stats_at(i);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 lse2 = load_shared(stats + 32 * j);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    f32 &a = s[4 * j + 2 * r], &b = s[4 * j + 2 * r + 1];
                    a = exp2_approx(fmaf(score.shaped(a), scale_log2, -lse2.x));
                    b = exp2_approx(fmaf(score.shaped(b), scale_log2, -lse2.y));
                }
            }
            if (step.row < tile.x + KEYS || (HAS_WINDOW && step.row + QUERIES - tile.x > window)) {
#pragma unroll
                for (int e = 0; e < 32; e++) {
                    const int query = step.row + e / 4 * 8 + lane % 4 * 2 + e % 2;
                    const int key = tile.x + row_in_tile + lane / 4 + e / 2 % 2 * 8;
                    if (key > query || (HAS_WINDOW && query - key >= window)) s[e] = 0.0f;
                }
            }
            release(Q_EMPTY, i);
        };
        auto leave = [&](u32 i) {
            pack(p, s);
            barrier_wait(base + P_EMPTY + 8 * (i % STAGES), i / STAGES % 2 ^ 1);
#pragma unroll
            for (int j = 0; j < 4; j++)
                asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(space + i % STAGES * P_BYTES + j * 2048), "r"(p[4 * j]),
                             "r"(p[4 * j + 1]), "r"(p[4 * j + 2]), "r"(p[4 * j + 3])
                             : "memory");
            barrier_arrive(base + P_FULL + 8 * (i % STAGES));
            step.next();
        };
        wait_full(Q_FULL, 0);
        multiply_rows<KEYS>(s, k, descriptor(q_at(0), 0));
        wgmma_wait<0>(s);
        probabilities(0);
        leave(0);
        u32 i = 0;
        for (; step.more(); i++) {
            wait_full(Q_FULL, i + 1);
            multiply_rows<KEYS>(s, k, descriptor(q_at(i + 1), 0));
            wait_full(DO_FULL, i);
            add_rows(acc, p, descriptor(do_at(i), 64 * 128));
            wgmma_wait<1>(s);
            probabilities(i + 1);
            wgmma_wait<0>(acc);
            release(DO_EMPTY, i);
            leave(i + 1);
        }
        wait_full(DO_FULL, i);
        add_rows(acc, p, descriptor(do_at(i), 64 * 128));
        wgmma_wait<0>(acc);
        store_rows<KEYS>(dv + kv_head * HEAD_DIM, acc, 1.0f, base + K_AT, row_in_tile, tile.x, tile.z, lddv);
    } else {
        const u64 v = descriptor(base + V_AT, 0);
        auto gradients = [&](u32 i) {
            release(DO_EMPTY, i);
            wait_full(Q_FULL, i);
            wait_full(P_FULL, i);
            const u32 stats = stats_at(i);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 x[4];
                asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                             : "r"(space + i % STAGES * P_BYTES + j * 2048)
                             : "memory");
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    // Word 4j + e has elements 8j + 2e and the next, of queries 16j + e / 2 · 8 + 2(lane%4) and the next.
                    const float2 delta2 = load_shared(stats + QUERIES * 4 + 64 * j + e / 2 * 32);
                    f32 &a = s[8 * j + 2 * e], &b = s[8 * j + 2 * e + 1];
                    const f32 pa = to_f32(T{(u16)x[e]}), pb = to_f32(T{(u16)(x[e] >> 16)});
                    a = pa * (a - delta2.x);
                    b = pb * (b - delta2.y);
                    if (HAS_SOFTCAP) {
                        const float2 lse2 = load_shared(stats + 64 * j + e / 2 * 32);
                        a *= score.slope_at(pa, lse2.x);
                        b *= score.slope_at(pb, lse2.y);
                    }
                }
            }
            barrier_arrive(base + P_EMPTY + 8 * (i % STAGES));
            step.next();
        };
        wait_full(DO_FULL, 0);
        multiply_rows<KEYS>(s, v, descriptor(do_at(0), 0));
        wgmma_wait<0>(s);
        gradients(0);
        pack(p, s);
        u32 i = 0;
        for (; step.more(); i++) {
            wait_full(DO_FULL, i + 1);
            multiply_rows<KEYS>(s, v, descriptor(do_at(i + 1), 0));
            add_rows(acc, p, descriptor(q_at(i), 64 * 128));
            wgmma_wait<1>(s);
            gradients(i + 1);
            wgmma_wait<0>(acc);
            release(Q_EMPTY, i);
            pack(p, s);
        }
        add_rows(acc, p, descriptor(q_at(i), 64 * 128));
        wgmma_wait<0>(acc);
        store_rows<KEYS>(dk + kv_head * HEAD_DIM, acc, scale, base + V_AT, row_in_tile, tile.x, tile.z, lddk);
    }
}
