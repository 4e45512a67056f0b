// Causal attention over documents of any length, backward, for Hopper, after FlashAttention-3 (arXiv:2407.08608).
//
// Math, with p[i, j] = exp(scale q[i] . k[j] - lse[i]) for j <= i in the same document, else 0:
//   delta[i] = d_o[i] . o[i];  dv[j] = sum_i p[i, j] d_o[i];  ds[i, j] = p[i, j] (d_o[i] . v[j] - delta[i])
//   dq[i] = scale sum_j ds[i, j] k[j];  dk[j] = scale sum_i ds[i, j] q[i]
// dk and dv are summed over the query heads of a key head too. Scores, exponentials and every sum are f32; p and ds are rounded to
// T as factors of the products.
//
// Layout: as attention_fwd_sm90.cu; d_o and dq like q, dk and dv like k, each with its own row stride. Rows past a document's end
// are read (and multiplied by zero), so they must be finite.
// Scratch: delta f32 [heads, tokens]; dq_sum f32 [heads, HEAD_DIM / 64, tokens, 64], heads * HEAD_DIM * tokens * 4 bytes, on 16
// bytes; with -DDETERMINISTIC also turns u32 [heads, tokens], else null. None needs to be zeroed: the first kernel does it.
//
// Compile for sm_90a with -DT=bf16|f16 -DHEAD_DIM=64|128, -DDETERMINISTIC for a bit-equal dq (dk and dv always are), and WINDOW
// and SOFTCAP of attention_scores.cuh.
// Launch three kernels, in this order on one stream:
// 1. attention_bwd_delta_sm90: grid ceil(tokens * heads * HEAD_DIM / 8 / 256), block 256, no dynamic shared memory.
//    const T* o, const T* d_o, f32* delta, f32* dq_sum, u32* turns, int tokens, heads, ldo, lddo
// 2. attention_bwd_sm90: grid n_tiles * kv_heads, block 384, dynamic shared memory 1,024 * HEAD_DIM + 66,688 bytes (197,760 or
//    132,224: raise the limit first).
//    q_map, k_map, v_map, do_map as in attention_fwd_sm90.cu, but the boxes of q_map and do_map are {64, 64, HEAD_DIM / 64};
//    const f32* lse, const f32* delta, f32* dq_sum, u32* turns, T* dk, T* dv, const int4* tiles, int tokens, heads, kv_heads,
//    lddk, lddv, f32 scale, int window, f32 softcap
//    tiles: one for each 128 keys of each document: {first row, document's start, document's end, 0}, the documents sorted by
//    falling length, the rows of one rising (so the longest work of a document comes first, and what runs at one time shares
//    one document's queries and dq in L2). DETERMINISTIC relies on the rows' order: a block waits for blocks before it.
// 3. attention_bwd_dq_sm90: grid and block as 1.
//    const f32* dq_sum, T* dq, int tokens, heads, lddq, f32 scale
// Each launch of 2 needs a launch of 1 before it: with turns left over from an earlier launch it would wait forever.
//
// A block holds 128 keys of one key head and walks over the queries of every query head of the group, 64 a step: warp 0 copies
// tiles, warp 1 adds dq to global memory, warp 2 fetches lse and delta, two warpgroups compute.
//
// Floor, 4 x 2048 tokens, 32/8 heads x 128: 2.5 times the forward's operations, 344 GFLOP at 790 TFLOP/s = 435 us; 336 MB of
// operands at 4.3 TB/s = 78 us. Kernels 1 and 3 move 470 MB more for delta and dq's f32 sums: 109 us at that rate.
// Status, all three kernels, NVIDIA H200, 2026-11-23, against cuDNN through PyTorch 2.11 in the same run (medians of 20):
//   4 x 2048, 32/8 x 128    776 us  443 TFLOP/s  56% of the floor (73 + 650 + 51 us)   cuDNN   864 us  398
//   1 x 8192, 32/8 x 128   2511 us  547 TFLOP/s  69%                                   cuDNN  2600 us  529
//   1 x 32768, 32/8 x 128 41643 us  528 TFLOP/s  67%                                   cuDNN 41129 us  535
//   2 x 512, 16/8 x 128      57 us (launches from Python in it)                        cuDNN   100 us
//   4 x 2048, 32/8 x 64     534 us  322 TFLOP/s  41%                                   cuDNN   568 us  303
//   DETERMINISTIC, 4 x 2048, 32/8 x 128: 1326 us, 259 TFLOP/s
// 168 registers at entry (240 a consumer thread, 24 a producer one), no local memory. The second kernel's shared memory is busy
// about three quarters of the time: products of two shared operands of 64 columns read all that it delivers.
// Tests: dq, dk and dv against float32 on fresh random data, at most 1.24 (bf16) and 0.87 (f16) of the naive computation's error;
// shapes as the forward's, poisoned scratch and outputs; dk and dv of repeated runs bit-equal, with DETERMINISTIC dq too;
// compute-sanitizer memcheck clean.
//
// Tried, the second kernel at 4 x 2048, 32/8 x 128, where the form below takes 647 us:
// - tiles sorted by work across documents: 725 us. Sums of dq then go through device memory several times;
// - dq added from registers (red.global.add.v4.f32) instead of by bulk copies: 733 us;
// - without the next step's scores in flight: 5% slower;
// - probabilities of the next step made beside this step's dq and dk, p kept in T: 649 us, at 1 x 8192 9% slower
//   (2567 us for 2351); HEAD_DIM 64 gains from it (426 us for 479) but would need a second form;
// - three slots instead of two for q and d_o: 656 us; 2 or 4 rows a thread in flight in kernels 1 and 3: no change.
// Left out, adding dq costs 50 us of the 647, the exponentials nothing, the barrier between the warpgroups 6.

#define KEYS 128     // keys of a block, 64 a warpgroup
#define QUERIES 64   // queries of a step
#define STAGES 2
#define HALVES (HEAD_DIM / 64)
#define KEY_BYTES (KEYS * HEAD_DIM * 2)
#define QUERY_BYTES (QUERIES * HEAD_DIM * 2)
#define DS_BYTES (KEYS * QUERIES * 2)
#define DQ_BYTES (QUERIES * 64 * 4)
#define STATS_BYTES (2 * QUERIES * 4)
#define CONSUMERS 256
// The turns of a window's tiles take more registers.
#if defined(DETERMINISTIC) && defined(WINDOW)
#define PRODUCER_REGISTERS 40
#define CONSUMER_REGISTERS 232
#else
#define PRODUCER_REGISTERS 24
#define CONSUMER_REGISTERS 240
#endif
#define DQ_KEYS (HALVES == 2 ? KEYS : 64)   // keys that one warpgroup's share of dq sums over

// Shared memory, in bytes from a base aligned to 1024. A tile of 16-bit values is panels of [rows][64 columns], its 16-byte
// chunks swizzled over 128 bytes as TMA and wgmma agree on; ds is [keys][queries], dq two panels of f32.
#define K_AT 0
#define V_AT (K_AT + KEY_BYTES)
#define Q_AT (V_AT + KEY_BYTES)
#define DO_AT (Q_AT + STAGES * QUERY_BYTES)
#define DS_AT (DO_AT + STAGES * QUERY_BYTES)
#define DQ_AT (DS_AT + 2 * DS_BYTES)
#define STATS_AT (DQ_AT + 2 * DQ_BYTES)
#define BARRIERS_AT (STATS_AT + STAGES * STATS_BYTES)
#define KV_FULL (BARRIERS_AT)
#define Q_FULL (BARRIERS_AT + 16)
#define Q_EMPTY (BARRIERS_AT + 32)
#define DO_FULL (BARRIERS_AT + 48)
#define DO_EMPTY (BARRIERS_AT + 64)
#define DQ_FULL (BARRIERS_AT + 80)
#define DQ_EMPTY (BARRIERS_AT + 96)

DEVICE void bulk_add(f32* to, u32 from, u32 bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from), "r"(bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// d = a b or d += a b, both in shared memory; TRANSPOSED: both with the summed index running over rows. The first form only
// writes d, so that its registers serve other ends until then.
template <int TRANSPOSED> DEVICE void wgmma_set(f32 (&d)[32], u64 a, u64 b) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, 0, 0; " WGMMA(64) ACC32 ", %32, %33, add, 1, 1, %34, %34; }"
                 : REG32("=f", d, 0)
                 : "l"(a), "l"(b), "n"(TRANSPOSED));
}
template <int TRANSPOSED> DEVICE void wgmma(f32 (&d)[32], u64 a, u64 b) {
    asm volatile(WGMMA(64) ACC32 ", %32, %33, 1, 1, 1, %34, %34;" : REG32("+f", d, 0) : "l"(a), "l"(b), "n"(TRANSPOSED));
}

// [64 keys of the warpgroup, 64 queries] = keys (k or v) x queries (q or d_o), transposed.
DEVICE void multiply_keys_queries(f32 (&d)[32], u64 keys, u64 queries) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) {
        const u64 a = keys + ((i / 4 * (KEYS * 128) + i % 4 * 32) >> 4), b = queries + ((i / 4 * (QUERIES * 128) + i % 4 * 32) >> 4);
        if (i == 0) wgmma_set<0>(d, a, b);
        else wgmma<0>(d, a, b);
    }
    wgmma_commit();
}
// dk or dv [64 keys, HEAD_DIM] += x [64 keys, 64 queries] x (q or d_o).
DEVICE void add_to_keys(f32 (&d)[HEAD_DIM / 2], const u32 (&x)[16], u64 queries) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < QUERIES / 16; i++) wgmma(d, x + 4 * i, queries + (i * 2048 >> 4));
    wgmma_commit();
}
DEVICE void multiply_ds_keys(f32 (&d)[32], u64 ds, u64 keys) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < DQ_KEYS / 16; i++) {
        const u64 a = ds + (i * 2048 >> 4), b = keys + (i * 2048 >> 4);
        if (i == 0) wgmma_set<1>(d, a, b);
        else wgmma<1>(d, a, b);
    }
    wgmma_commit();
}
DEVICE void pack(u32 (&p)[16], const f32 (&s)[32]) {
#pragma unroll
    for (int i = 0; i < 16; i++) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

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

DEVICE void produce(u32 base, Step step, const int4& tile, int kv_head, const TensorMap* q_map, const TensorMap* k_map,
                    const TensorMap* v_map, const TensorMap* do_map) {
    barrier_expect(base + KV_FULL, 2 * KEY_BYTES);
    tma_load(base + K_AT, k_map, base + KV_FULL, tile.x, kv_head * HALVES);
    tma_load(base + V_AT, v_map, base + KV_FULL, tile.x, kv_head * HALVES);
    for (u32 i = 0; step.more(); step.next(), i++) {
        const u32 slot = i % STAGES, parity = i / STAGES % 2 ^ 1;
        barrier_wait(base + Q_EMPTY + 8 * slot, parity);
        barrier_expect(base + Q_FULL + 8 * slot, QUERY_BYTES);
        tma_load(base + Q_AT + slot * QUERY_BYTES, q_map, base + Q_FULL + 8 * slot, step.row, step.head * HALVES);
        barrier_wait(base + DO_EMPTY + 8 * slot, parity);
        barrier_expect(base + DO_FULL + 8 * slot, QUERY_BYTES);
        tma_load(base + DO_AT + slot * QUERY_BYTES, do_map, base + DO_FULL + 8 * slot, step.row, step.head * HALVES);
    }
}

// The log-sum-exps (in powers of two) and deltas of a step's queries. An infinite one makes the probabilities of a row past
// the document's end zero.
DEVICE void produce_stats(u32 base, Step step, const f32* lse, const f32* delta, int tokens) {
    const int lane = threadIdx.x % 32;
    for (u32 i = 0; step.more(); step.next(), i++) {
        f32 l[2], d[2];
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int row = step.row + lane + 32 * h;
            const u64 at = (u64)step.head * tokens + row;
            l[h] = row < step.end ? lse[at] * 1.4426950408889634f : __int_as_float(0x7f800000);
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

// Adds each step's dq to its sums in global memory. DETERMINISTIC: in the order of the document's key tiles; blocks start in the
// order of the table, so the tile waited for is always running already.
DEVICE void reduce_dq(u32 base, Step step, f32* dq_sum, int tokens, u32* turns, const int4* tile, int window) {
#ifdef DETERMINISTIC
    const u32 before = step.first_row - tile->y;
#endif
    for (u32 parity = 0; step.more(); step.next(), parity ^= 1) {
        const u32 bytes = min(QUERIES, step.end - step.row) * 64 * 4;
#ifdef DETERMINISTIC
        u32* const now = turns + (u64)step.head * tokens + step.row;
        // Tiles whose keys lie before the window of all these queries have no turn.
        const int outside = HAS_WINDOW ? max(0, step.row - step.first_row + (int)before + 1 - window) : 0;
        const u32 turn = before / KEYS - (u32)outside / KEYS;
        u32 seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(now) : "memory");
        } while (seen != turn);
#endif
#pragma unroll
        for (int g = 0; g < 2; g++) {
            barrier_wait(base + DQ_FULL + 8 * g, parity);
            bulk_add(dq_sum + ((u64)(step.head * HALVES + g % HALVES) * tokens + step.row) * 64, base + DQ_AT + g * DQ_BYTES, bytes);
#ifdef DETERMINISTIC
            // With one panel both warpgroups' shares go to the same place.
            if (HALVES == 1) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#endif
        }
        asm volatile("cp.async.bulk.wait_group.read 1;" ::: "memory");
        barrier_arrive(base + DQ_EMPTY);
        asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        barrier_arrive(base + DQ_EMPTY + 8);
#ifdef DETERMINISTIC
        asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
        __threadfence();
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(now), "r"(turn + 1) : "memory");
#endif
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// One warpgroup's 64 rows of dk or dv, through its rows of v's shared memory, so that they leave in 16-byte pieces.
DEVICE void store_keys(T* out, const f32 (&acc)[HEAD_DIM / 2], f32 factor, u32 stage, int row_in_tile, const int4& tile, int column,
                       int ld) {
    const int lane = threadIdx.x % 32, r = row_in_tile + lane % 16;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 16; j++) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = pack2<T>(acc[8 * j + 2 * i] * factor, acc[8 * j + 2 * i + 1] * factor);
        const int chunk = 2 * j + lane / 16;
        store_matrices(stage + chunk / 8 * (KEYS * 128) + r * 128 + (chunk % 8 ^ r % 8) * 16, x);
    }
    __syncwarp();
    const int chunks = HEAD_DIM / 8;
#pragma unroll
    for (int i = 0; i < chunks / 2; i++) {
        const int rr = row_in_tile + i * (32 / chunks) + lane / chunks, chunk = lane % chunks;
        const u32 at = stage + chunk / 8 * (KEYS * 128) + rr * 128 + (chunk % 8 ^ rr % 8) * 16;
        uint4 x;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
        if (tile.x + rr < tile.z) *reinterpret_cast<uint4*>(out + (u64)(tile.x + rr) * ld + column + chunk * 8) = x;
    }
    __syncwarp();
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_bwd_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                       const __grid_constant__ TensorMap v_map, const __grid_constant__ TensorMap do_map, const f32* lse,
                       const f32* delta, f32* dq_sum, u32* turns, T* dk, T* dv, const int4* tiles, int tokens, int heads,
                       int kv_heads, int lddk, int lddv, f32 scale, int window, f32 softcap) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    if (threadIdx.x == 0) {
        barrier_init(base + KV_FULL, 1);
        for (int i = 0; i < STAGES; i++) {
            barrier_init(base + Q_FULL + 8 * i, 1 + 32);   // the copy and the lanes of the stats warp
            barrier_init(base + DO_FULL + 8 * i, 1);
            barrier_init(base + Q_EMPTY + 8 * i, CONSUMERS / 32);
            barrier_init(base + DO_EMPTY + 8 * i, CONSUMERS / 32);
        }
        for (int i = 0; i < 2; i++) {
            barrier_init(base + DQ_FULL + 8 * i, 4);
            barrier_init(base + DQ_EMPTY + 8 * i, 1);
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
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " STRING(PRODUCER_REGISTERS) ";");
        const int warp = threadIdx.x / 32;
        if (threadIdx.x == 0) {
            produce(base, step, tile, kv_head, &q_map, &k_map, &v_map, &do_map);
        } else if (threadIdx.x == 32) {
            reduce_dq(base, step, dq_sum, tokens, turns, tiles + blockIdx.x / kv_heads, window);
        } else if (warp == 2) {
            produce_stats(base, step, lse, delta, tokens);
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " STRING(CONSUMER_REGISTERS) ";");
        const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const int row_in_tile = group * 64 + warp * 16;
        const ScoreScale score(scale, softcap);
        const f32 scale_log2 = score.factor * LOG2E;
        const u64 k = descriptor(base + K_AT + group * 64 * 128, 0), v = descriptor(base + V_AT + group * 64 * 128, 0);
        // With two panels a warpgroup takes one panel of dq over all keys, with one its own keys' share of dq.
        const u64 k_columns = descriptor(base + K_AT + group * (HALVES == 2 ? KEYS * 128 : 64 * 128), KEYS * 128);
        const u32 ds_row = (row_in_tile + lane % 16) * 128;
        auto q_at = [&](u32 slot) { return base + Q_AT + slot * QUERY_BYTES; };

        f32 acc_k[HEAD_DIM / 2], acc_v[HEAD_DIM / 2], s[32], dp[32];
#pragma unroll
        for (int i = 0; i < HEAD_DIM / 2; i++) acc_k[i] = acc_v[i] = 0.0f;

        barrier_wait(base + KV_FULL, 0);
        barrier_wait(base + Q_FULL, 0);
        multiply_keys_queries(s, k, descriptor(q_at(0), 0));
        wgmma_wait<0>(s);
        for (u32 i = 0; step.more(); i++) {
            const u32 slot = i % STAGES, parity = i / STAGES % 2;
            const u32 stats = base + STATS_AT + slot * STATS_BYTES + lane % 4 * 8;
            const u32 do_at = base + DO_AT + slot * QUERY_BYTES;
            const u32 ds_at = base + DS_AT + i % 2 * DS_BYTES;
            const int row = step.row;
            u32 p[16], ds[16];
            barrier_wait(base + DO_FULL + 8 * slot, parity);
            multiply_keys_queries(dp, v, descriptor(do_at, 0));

            // Element 4j + 2r + c of a thread is key lane/4 + 8r of the warp's 16, query 8j + 2(lane%4) + c.
            if (HAS_SOFTCAP) {
#pragma unroll
                for (int e = 0; e < 32; e++) s[e] = score.shaped(s[e]);
            }
            if (row < tile.x + KEYS) {
#pragma unroll
                for (int e = 0; e < 32; e++) {
                    const int query = row + e / 4 * 8 + lane % 4 * 2 + e % 2;
                    const int key = tile.x + row_in_tile + lane / 4 + e / 2 % 2 * 8;
                    if (key > query) s[e] = -__int_as_float(0x7f800000);
                }
            }
            if (HAS_WINDOW && row + QUERIES - tile.x > window) {
#pragma unroll
                for (int e = 0; e < 32; e++) {
                    const int query = row + e / 4 * 8 + lane % 4 * 2 + e % 2;
                    const int key = tile.x + row_in_tile + lane / 4 + e / 2 % 2 * 8;
                    if (query - key >= window) s[e] = -__int_as_float(0x7f800000);
                }
            }
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 lse2 = load_shared(stats + 32 * j);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    s[4 * j + 2 * r] = exp2_approx(fmaf(s[4 * j + 2 * r], scale_log2, -lse2.x));
                    s[4 * j + 2 * r + 1] = exp2_approx(fmaf(s[4 * j + 2 * r + 1], scale_log2, -lse2.y));
                }
            }
            pack(p, s);
            add_to_keys(acc_v, p, descriptor(do_at, QUERIES * 128));

            wgmma_wait<1>(dp);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float2 delta2 = load_shared(stats + QUERIES * 4 + 32 * j);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    dp[4 * j + 2 * r] = s[4 * j + 2 * r] * (dp[4 * j + 2 * r] - delta2.x);
                    dp[4 * j + 2 * r + 1] = s[4 * j + 2 * r + 1] * (dp[4 * j + 2 * r + 1] - delta2.y);
                    if (HAS_SOFTCAP) {
                        const float2 lse2 = load_shared(stats + 32 * j);
                        dp[4 * j + 2 * r] *= score.slope_at(s[4 * j + 2 * r], lse2.x);
                        dp[4 * j + 2 * r + 1] *= score.slope_at(s[4 * j + 2 * r + 1], lse2.y);
                    }
                }
            }
            pack(ds, dp);
#pragma unroll
            for (int j = 0; j < 4; j++) store_matrices(ds_at + ds_row + ((2 * j + lane / 16) ^ lane % 8) * 16, ds + 4 * j);
            fence_async();
            // Both warpgroups' ds are read next; where each reads its own, it waits for itself alone.
            if (HALVES == 2) named_sync(1, CONSUMERS);
            else named_sync(1 + group, CONSUMERS / 2);

            f32 dq[32];
            multiply_ds_keys(dq, descriptor(ds_at + (HALVES == 2 ? 0 : group * 64 * 128), 0), k_columns);
            add_to_keys(acc_k, ds, descriptor(q_at(slot), QUERIES * 128));
            wgmma_wait<2>(acc_v);
            if (lane == 0) barrier_arrive(base + DO_EMPTY + 8 * slot);
            // The next step's scores run while dq is written out. After the last step this repeats that step's, unused.
            step.next();
            const u32 following = step.more() ? i + 1 : i;
            barrier_wait(base + Q_FULL + 8 * (following % STAGES), following / STAGES % 2);
            multiply_keys_queries(s, k, descriptor(q_at(following % STAGES), 0));

            wgmma_wait<2>(dq);
            barrier_wait(base + DQ_EMPTY + 8 * group, i % 2 ^ 1);
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int dq_row = warp * 16 + lane / 4 + 8 * r;
                const u32 at = base + DQ_AT + group * DQ_BYTES + dq_row * 256 + lane % 4 * 8;
#pragma unroll
                for (int j = 0; j < 8; j++)
                    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at + (j ^ (row + dq_row) % 4) * 32), "f"(dq[4 * j + 2 * r]),
                                 "f"(dq[4 * j + 2 * r + 1])
                                 : "memory");
            }
            fence_async();
            __syncwarp();
            if (lane == 0) barrier_arrive(base + DQ_FULL + 8 * group);
            wgmma_wait<1>(acc_k);
            if (lane == 0) barrier_arrive(base + Q_EMPTY + 8 * slot);
            wgmma_wait<0>(s);
        }
        // kv_head again, from what the loop keeps in registers anyway.
        const int column = step.last_head * kv_heads / heads * HEAD_DIM;
        store_keys(dv, acc_v, 1.0f, base + V_AT, row_in_tile, tile, column, lddv);
        store_keys(dk, acc_k, scale, base + V_AT, row_in_tile, tile, column, lddk);
    }
}

// delta = rowsum(d_o * o), and zeros where the sums of dq (and the turns) begin. HEAD_DIM / 8 lanes take a row of a head.
extern "C" __global__ void __launch_bounds__(256)
    attention_bwd_delta_sm90(const T* o, const T* d_o, f32* delta, f32* dq_sum, u32* turns, int tokens, int heads, int ldo, int lddo) {
    const u32 lanes = HEAD_DIM / 8, lane = threadIdx.x % lanes;
    const u32 index = (blockIdx.x * 256 + threadIdx.x) / lanes, head = index % heads, token = index / heads;
    const bool valid = token < tokens;
    f32 sum = 0.0f;
    if (valid) {
        f32 x[8], y[8];
        load16(o + (u64)token * ldo + head * HEAD_DIM + lane * 8, x);
        load16(d_o + (u64)token * lddo + head * HEAD_DIM + lane * 8, y);
#pragma unroll
        for (int i = 0; i < 8; i++) sum = fmaf(x[i], y[i], sum);
    }
#pragma unroll
    for (int i = lanes / 2; i > 0; i /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, i);
    if (!valid) return;
    if (lane == 0) delta[(u64)head * tokens + token] = sum;
#ifdef DETERMINISTIC
    if (lane == 0) turns[(u64)head * tokens + token] = 0;
#endif
    float4* const to = reinterpret_cast<float4*>(dq_sum + ((u64)(head * HALVES + lane / 8) * tokens + token) * 64) + lane % 8;
    to[0] = to[8] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

// dq = scale * its f32 sums, in whose rows the kernel above exchanged groups of 8 columns by the row's last two bits.
extern "C" __global__ void __launch_bounds__(256)
    attention_bwd_dq_sm90(const f32* dq_sum, T* dq, int tokens, int heads, int lddq, f32 scale) {
    const u32 lanes = HEAD_DIM / 8, lane = threadIdx.x % lanes;
    const u32 index = (blockIdx.x * 256 + threadIdx.x) / lanes, head = index % heads, token = index / heads;
    if (token >= tokens) return;
    f32 x[8];
    const float4* const from = reinterpret_cast<const float4*>(dq_sum + ((u64)(head * HALVES + lane / 8) * tokens + token) * 64) +
                               (lane % 8 ^ token % 4) * 2;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float4 y = from[i];
        x[4 * i] = y.x * scale;
        x[4 * i + 1] = y.y * scale;
        x[4 * i + 2] = y.z * scale;
        x[4 * i + 3] = y.w * scale;
    }
    store16(dq + (u64)token * lddq + head * HEAD_DIM + lane * 8, x);
}
