// Causal attention over documents of any length, forward, for Hopper: FlashAttention-3's scheme (arXiv:2407.08608).
//
// Math, for query row i of a document and query head h, which reads key and value head h / (heads / kv_heads):
//   s[j] = scale q[i] . k[j] for j <= i in the same document;  lse[i] = ln sum_j exp s[j];  o[i] = sum_j exp(s[j] - lse[i]) v[j]
// Scores, softmax and sums are f32 (exp2, with log2 e folded into the scale; scale > 0); probabilities are rounded to T for the
// second product, sums are not.
//
// Layout: q [tokens, heads * HEAD_DIM], k and v [tokens, kv_heads * HEAD_DIM], o like q, each with its own row stride, which is a
// multiple of 8 elements; pointers on 16 bytes; lse f32 [heads, tokens]. Documents are concatenated. Tiles reach past a
// document's end into its neighbour: what is read there is masked and nothing is written there, but it must be finite.
//
// Compile for sm_90a with -DT=bf16|f16 -DHEAD_DIM=64|128|256, and the options of attention_scores.cuh: with a window a query
// sees its last `window` keys, and tiles of keys before it are not loaded.
// Launch attention_fwd_sm90: grid min(multiprocessors, n_tiles * heads), block 384, dynamic shared memory
// 6 * 128 * HEAD_DIM * 2 + 128 bytes (196,736 or 98,432; raise the limit first), with 256 channels 229,504. Arguments:
//   q_map, k_map, v_map  CUtensorMap by value, from cuTensorMapEncodeTiled with BFLOAT16 or FLOAT16, rank 3, the slice's base,
//                        dims {64, tokens, its heads * HEAD_DIM / 64}, byte strides {row stride * 2, 128},
//                        box {64, 128, HEAD_DIM / 64}, with 256 channels {64, 80, 4} for k and v, element strides {1, 1, 1}, INTERLEAVE_NONE, SWIZZLE_128B,
//                        L2_PROMOTION_L2_128B, FLOAT_OOB_FILL_NONE
//   T* o, f32* lse
//   const int4* tiles    one for each 128 query rows of each document: {first row, document's start, document's end, 0};
//                        for start, end in cu_seqlens: for row in (start..end).step_by(128); sorted by start - row, so that
//                        the longest work comes first
//   u32* tickets         two, zero before the first launch; every launch leaves them zero. Launches that may overlap need
//                        tickets of their own
//   int tokens, heads, kv_heads, ldo, n_tiles, f32 scale, int window, f32 softcap, const T* sinks
// A block is a producer warp and two warpgroups of 64 query rows each; blocks draw (tile, head) items from the tickets. The same
// inputs give the same bits.
//
// Floor, 4 x 2048 tokens, 32/8 heads x 128: 4 * 4 * 32 * 2048^2 * 128 / 2 = 137 GFLOP at 790 TFLOP/s = 174 us; 169 MB at
// 4.3 TB/s = 39 us.
// Status, NVIDIA H200, 2026-11-23, against cuDNN through PyTorch 2.11 in the same run (medians of 30):
//   4 x 2048, 32/8 x 128    228 us  602 TFLOP/s  76% of the floor    cuDNN   261 us  527
//   1 x 8192, 32/8 x 128    783 us  702 TFLOP/s  89%                 cuDNN   929 us  592
//   1 x 32768, 32/8 x 128 14314 us  615 TFLOP/s  78%                 cuDNN 15026 us  585
//   2 x 512, 16/8 x 128      26 us (the launch from Python in it)    cuDNN    35 us
//   4 x 2048, 32/8 x 64     171 us  403 TFLOP/s  51%                 cuDNN   181 us  379
// 2026-11-30, in CUDA graphs; cuDNN and flex_attention through PyTorch 2.11 in the same run:
//   4 x 2048, 8/4 x 256                   114 us  601 TFLOP/s  76%    cuDNN   161 us  426
//   1 x 8192, 8/4 x 256                   369 us  746 TFLOP/s  94%    cuDNN   517 us  532
//   4 x 2048, 8/4 x 256, window 1024      104 us  496 TFLOP/s         flex_attention 331 us
//   4 x 2048, 64/8 x 64                   333 us  413 TFLOP/s         cuDNN   385 us  357
//   4 x 2048, 64/8 x 64, window 128, sinks 119 us 140 TFLOP/s of the scores seen, a half of those computed
//   4 x 2048, 32/8 x 128, softcap         275 us  499 TFLOP/s
// 168 registers at entry (240 a consumer thread, 24 a producer one), no local memory.
// Tests: o and lse against float32 on fresh random data, at most 0.83 (bf16, 128), 0.64 (bf16, 64) and 0.73 (f16) of the naive
// computation's error; lengths 1 to 2048 with every tail, 50 documents of length 1, groups of 1, 2, 4 and 7, slices of one buffer,
// poisoned outputs, repeated runs bit-equal; compute-sanitizer memcheck clean.
// Tried: nothing else; this is the first form measured.

#define TILE 128    // query rows of a work item
// Keys of a step. The accumulators of 256 columns leave registers for 80 scores a row, and shared memory has no space for
// a second tile of queries.
#if HEAD_DIM == 256
#define KEYS 80
#define Q_STAGES 1
#define WGMMA_SCORES WGMMA(80) ACC40
#define REG_SCORES REG40
#else
#define KEYS TILE
#define Q_STAGES 2
#define WGMMA_SCORES WGMMA(128) ACC64
#define REG_SCORES REG64
#endif
#define STAGES 2
#define HALVES (HEAD_DIM / 64)
#define SCORES (KEYS / 2)   // of a thread
#define Q_BYTES (TILE * HEAD_DIM * 2)
#define KV_BYTES (KEYS * HEAD_DIM * 2)
#define CONSUMERS 256

// Shared memory, in bytes from a base aligned to 1024. Each tile is HALVES panels of [rows][64 columns] of 16 bits, its
// 16-byte chunks swizzled over 128 bytes as TMA and wgmma agree on.
#define Q_AT 0
#define K_AT (Q_AT + Q_STAGES * Q_BYTES)
#define V_AT (K_AT + STAGES * KV_BYTES)
#define BARRIERS_AT (V_AT + STAGES * KV_BYTES)
#define Q_FULL (BARRIERS_AT)
#define Q_EMPTY (BARRIERS_AT + 16)
#define K_FULL (BARRIERS_AT + 32)
#define K_EMPTY (BARRIERS_AT + 48)
#define V_FULL (BARRIERS_AT + 64)
#define V_EMPTY (BARRIERS_AT + 80)
#define ITEMS (BARRIERS_AT + 96)

DEVICE void named_arrive(int id, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// A stage of a ring of SLOTS and the parity to wait for.
template <int SLOTS> struct Ring {
    u32 count;
    DEVICE u32 slot() const { return count % SLOTS; }
    DEVICE u32 parity() const { return count / SLOTS % 2; }
};

// d = a bT (+ d where `add`), both operands with the summed index contiguous.
#if HEAD_DIM == 256
#define AFTER_SCORES ", %40, %41, add, 1, 1, 0, 0; }"
#define ADD "%42"
#else
#define AFTER_SCORES ", %64, %65, add, 1, 1, 0, 0; }"
#define ADD "%66"
#endif
DEVICE void wgmma(f32 (&d)[SCORES], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, " ADD ", 0; " WGMMA_SCORES AFTER_SCORES
                 : REG_SCORES("+f", d, 0)
                 : "l"(a), "l"(b), "r"(add));
}

// The scores of 64 queries (one warpgroup's) and a tile of keys.
DEVICE void scores(f32 (&s)[SCORES], u64 q, u64 k) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < HEAD_DIM / 16; i++) {
        const u32 q_step = (i / 4 * (TILE * 128) + i % 4 * 32) >> 4, k_step = (i / 4 * (KEYS * 128) + i % 4 * 32) >> 4;
        wgmma(s, q + q_step, k + k_step, i > 0);
    }
    wgmma_commit();
}
DEVICE void shape(f32 (&s)[SCORES], const ScoreScale& score) {
    if (HAS_SOFTCAP) {
#pragma unroll
        for (int i = 0; i < SCORES; i++) s[i] = score.shaped(s[i]);
    }
}
// Hides the keys that queries do not see; `distance` is how far the tile's first query is from the first key.
DEVICE void mask(f32 (&s)[SCORES], int row_in_tile, int distance, int window) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < SCORES; i++) {
        const int key = i / 4 * 8 + lane % 4 * 2 + i % 2, query = distance + row_in_tile + lane / 4 + i / 2 % 2 * 8;
        if (key > query || (HAS_WINDOW && query - key >= window)) s[i] = -__int_as_float(0x7f800000);
    }
}
DEVICE void add_values(f32 (&o)[HEAD_DIM / 2], const u32 (&p)[SCORES / 2], u64 v) {
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < KEYS / 16; i++) wgmma(o, p + 4 * i, v + (i * 2048 >> 4));
    wgmma_commit();
}

// Replaces scores by their exponentials against the running maximum, and carries maximum and sum; `correction` is what
// earlier sums and outputs are to be multiplied by. Element 4j + 2r + c of a thread is row lane/4 + 8r, key 8j + 2(lane%4) + c.
template <bool FIRST> DEVICE void softmax(f32 (&s)[SCORES], f32 (&m)[2], f32 (&l)[2], f32 (&correction)[2], f32 scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        f32 a = fmaxf(s[2 * r], s[2 * r + 1]), b = fmaxf(s[2 * r + 4], s[2 * r + 5]);
#pragma unroll
        for (int j = 2; j < KEYS / 8; j += 2) {
            a = fmaxf(a, fmaxf(s[4 * j + 2 * r], s[4 * j + 2 * r + 1]));
            b = fmaxf(b, fmaxf(s[4 * j + 2 * r + 4], s[4 * j + 2 * r + 5]));
        }
        a = fmaxf(a, b);
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 1));
        a = fmaxf(a, __shfl_xor_sync(0xffffffffu, a, 2));
        // Where tiles of keys do not end with tiles of queries, a row may see none of the first one's.
        if (FIRST && KEYS != TILE) a = fmaxf(a, -1e30f);
        if (!FIRST) {
            a = fmaxf(a, m[r]);
            correction[r] = exp2_approx((m[r] - a) * scale_log2);
        }
        m[r] = a;
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const f32 shift = m[r] * scale_log2;
        f32 sum[2] = {0.0f, 0.0f};
#pragma unroll
        for (int j = 0; j < KEYS / 8; j++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                f32& x = s[4 * j + 2 * r + c];
                x = exp2_approx(fmaf(x, scale_log2, -shift));
                sum[c] += x;
            }
        }
        l[r] = FIRST ? sum[0] + sum[1] : fmaf(l[r], correction[r], sum[0] + sum[1]);
    }
}
DEVICE void pack(u32 (&p)[SCORES / 2], const f32 (&s)[SCORES]) {
#pragma unroll
    for (int i = 0; i < SCORES / 2; i++) p[i] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

// The tiles of keys of a tile of queries: `first` to `last`, of KEYS rows from row `row` on. They end with the queries
// where both are as long; otherwise they begin with the first key seen.
struct KeyTiles {
    int row, first, last;
    DEVICE KeyTiles(const int4& tile, int window) {
        const int key = first_key(tile.x - tile.y, window);
        row = KEYS == TILE ? tile.y : tile.y + key;
        first = KEYS == TILE ? key / TILE : 0;
        last = KEYS == TILE ? (tile.x - tile.y) / TILE : (min(tile.x + TILE, tile.z) - row - 1) / KEYS;
    }
};

// Loads tiles in the order the consumers take them, always as far ahead as the rings allow.
DEVICE void produce(u32 base, const TensorMap* q_map, const TensorMap* k_map, const TensorMap* v_map, const int4* tiles,
                    u32* tickets, int heads, int kv_heads, int items, int window) {
    Ring<Q_STAGES> q_ring = {0};
    Ring<STAGES> k_ring = {0}, v_ring = {0};
    int item = blockIdx.x;
    for (;; q_ring.count++) {
        const u32 q_slot = q_ring.slot();
        if (item >= items) {
            barrier_wait(base + Q_EMPTY + 8 * q_slot, q_ring.parity() ^ 1);
            asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + ITEMS + 4 * q_slot), "r"(-1) : "memory");
            barrier_arrive(base + Q_FULL + 8 * q_slot);
            break;
        }
        const int next = gridDim.x + atomicAdd(&tickets[0], 1);
        const int4 tile = tiles[item / heads];
        const int head = item % heads;
        const int kv_panel = head / (heads / kv_heads) * HALVES;
        const KeyTiles keys(tile, window);

        auto load = [&](Ring<STAGES>& ring, const TensorMap* map, u32 at, u32 full, u32 empty, int j) {
            const u32 slot = ring.slot();
            barrier_wait(base + empty + 8 * slot, ring.parity() ^ 1);
            barrier_expect(base + full + 8 * slot, KV_BYTES);
            tma_load(base + at + slot * KV_BYTES, map, base + full + 8 * slot, keys.row + j * KEYS, kv_panel);
            ring.count++;
        };
        load(k_ring, k_map, K_AT, K_FULL, K_EMPTY, keys.last);
        barrier_wait(base + Q_EMPTY + 8 * q_slot, q_ring.parity() ^ 1);
        asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + ITEMS + 4 * q_slot), "r"(item) : "memory");
        barrier_expect(base + Q_FULL + 8 * q_slot, Q_BYTES);
        tma_load(base + Q_AT + q_slot * Q_BYTES, q_map, base + Q_FULL + 8 * q_slot, tile.x, head * HALVES);
        for (int j = keys.last; j >= keys.first; j--) {
            if (j > keys.first) load(k_ring, k_map, K_AT, K_FULL, K_EMPTY, j - 1);
            load(v_ring, v_map, V_AT, V_FULL, V_EMPTY, j);
        }
        item = next;
    }
    // The last block to finish leaves the tickets as the next launch needs them.
    __threadfence();
    if (atomicAdd(&tickets[1], 1) == gridDim.x - 1) {
        tickets[0] = 0;
        tickets[1] = 0;
    }
}

// o (64 rows of one warpgroup) over its row sums, through the query tile's shared memory, so that rows leave in 16-byte pieces.
DEVICE void store_output(T* o, const f32 (&acc)[HEAD_DIM / 2], const f32 (&inverse)[2], u32 stage, int row_in_tile, int row,
                         int end, int column, int ldo) {
    const int lane = threadIdx.x % 32;
    const int r = row_in_tile + lane % 16;
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 16; j++) {
        u32 x[4];
#pragma unroll
        for (int i = 0; i < 4; i++) x[i] = pack2<T>(acc[8 * j + 2 * i] * inverse[i % 2], acc[8 * j + 2 * i + 1] * inverse[i % 2]);
        const int chunk = 2 * j + lane / 16;
        const u32 at = stage + chunk / 8 * (TILE * 128) + r * 128 + (chunk % 8 ^ r % 8) * 16;
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]),
                     "r"(x[3])
                     : "memory");
    }
    __syncwarp();
    const int chunks = HEAD_DIM / 8;
#pragma unroll
    for (int i = 0; i < chunks / 2; i++) {
        const int rr = row_in_tile + i * (32 / chunks) + lane / chunks, chunk = lane % chunks;
        const u32 at = stage + chunk / 8 * (TILE * 128) + rr * 128 + (chunk % 8 ^ rr % 8) * 16;
        uint4 x;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(at) : "memory");
        if (row + rr < end) *reinterpret_cast<uint4*>(o + (u64)(row + rr) * ldo + column + chunk * 8) = x;
    }
}

extern "C" __global__ void __launch_bounds__(384, 1)
    attention_fwd_sm90(const __grid_constant__ TensorMap q_map, const __grid_constant__ TensorMap k_map,
                       const __grid_constant__ TensorMap v_map, T* o, f32* lse, const int4* tiles, u32* tickets, int tokens,
                       int heads, int kv_heads, int ldo, int n_tiles, f32 scale, int window, f32 softcap, const T* sinks) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            // Queries may use the first alone.
            barrier_init(base + Q_FULL + 8 * i, 1);
            barrier_init(base + K_FULL + 8 * i, 1);
            barrier_init(base + V_FULL + 8 * i, 1);
            // A warp arrives when its own part of the products is done.
            barrier_init(base + Q_EMPTY + 8 * i, CONSUMERS / 32);
            barrier_init(base + K_EMPTY + 8 * i, CONSUMERS / 32);
            barrier_init(base + V_EMPTY + 8 * i, CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) produce(base, &q_map, &k_map, &v_map, tiles, tickets, heads, kv_heads, n_tiles * heads, window);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const int row_in_tile = group * 64 + warp * 16;
        const ScoreScale score(scale, softcap);
        const f32 scale_log2 = score.factor * LOG2E;
        Ring<Q_STAGES> q_ring = {0};
        Ring<STAGES> k_ring = {0}, v_ring = {0};
        // Turns: a warpgroup issues its products while the other one computes exponentials. Group 0 begins.
        if (group == 1) named_arrive(1, CONSUMERS);

        for (;; q_ring.count++) {
            const u32 q_slot = q_ring.slot();
            barrier_wait(base + Q_FULL + 8 * q_slot, q_ring.parity());
            int item;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(item) : "r"(base + ITEMS + 4 * q_slot) : "memory");
            if (item < 0) break;
            const int4 tile = tiles[item / heads];
            const int head = item % heads;
            const u64 q = descriptor(base + Q_AT + q_slot * Q_BYTES + group * 64 * 128, 0);

            auto k_slot = [&]() { return descriptor(base + K_AT + k_ring.slot() * KV_BYTES, 0); };
            auto v_slot = [&]() { return descriptor(base + V_AT + v_ring.slot() * KV_BYTES, KEYS * 128); };
            auto wait_full = [&](const Ring<STAGES>& ring, u32 full) { barrier_wait(base + full + 8 * ring.slot(), ring.parity()); };
            auto release = [&](Ring<STAGES>& ring, u32 empty) {
                if (lane == 0) barrier_arrive(base + empty + 8 * ring.slot());
                ring.count++;
            };

            f32 acc[HEAD_DIM / 2], s[SCORES], m[2], l[2], correction[2];
            u32 p[SCORES / 2];
#pragma unroll
            for (int i = 0; i < HEAD_DIM / 2; i++) acc[i] = 0.0f;

            const KeyTiles keys(tile, window);
            // The last tile. Keys past the document's end are past every valid query too, so one mask does for both.
            wait_full(k_ring, K_FULL);
            scores(s, q, k_slot());
            wgmma_wait<0>(s);
            release(k_ring, K_EMPTY);
            shape(s, score);
            mask(s, row_in_tile, KEYS == TILE ? 0 : tile.x - keys.row - keys.last * KEYS, window);
            softmax<true>(s, m, l, correction, scale_log2);
            pack(p, s);

            for (int j = keys.last; j > keys.first; j--) {
                wait_full(k_ring, K_FULL);
                named_sync(1 + group, CONSUMERS);
                scores(s, q, k_slot());
                wait_full(v_ring, V_FULL);
                add_values(acc, p, v_slot());
                named_arrive(2 - group, CONSUMERS);
                wgmma_wait<1>(s);
                release(k_ring, K_EMPTY);
                shape(s, score);
                // How far the tile's first query is from the first key.
                const int distance = tile.x - keys.row - (j - 1) * KEYS;
                if ((KEYS != TILE && distance < KEYS - 1) || (HAS_WINDOW && distance + TILE > window))
                    mask(s, row_in_tile, distance, window);
                softmax<false>(s, m, l, correction, scale_log2);
                wgmma_wait<0>(acc);
                release(v_ring, V_EMPTY);
                pack(p, s);
#pragma unroll
                for (int i = 0; i < HEAD_DIM / 2; i++) acc[i] *= correction[i / 2 % 2];
            }
            wait_full(v_ring, V_FULL);
            add_values(acc, p, v_slot());
            f32 inverse[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                l[r] += __shfl_xor_sync(0xffffffffu, l[r], 1);
                l[r] += __shfl_xor_sync(0xffffffffu, l[r], 2);
                const SoftmaxEnd end(m[r] * score.factor, l[r], sinks, head);
                inverse[r] = end.inverse;
                const int row = tile.x + row_in_tile + lane / 4 + 8 * r;
                if (lane % 4 == 0 && row < tile.z) lse[(u64)head * tokens + row] = end.lse;
            }
            wgmma_wait<0>(acc);
            release(v_ring, V_EMPTY);
            store_output(o, acc, inverse, base + Q_AT + q_slot * Q_BYTES, row_in_tile, tile.x, tile.z, head * HEAD_DIM, ldo);
            // The next tile of queries comes through the asynchronous proxy into what was just written and read.
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            if (lane == 0) barrier_arrive(base + Q_EMPTY + 8 * q_slot);
        }
    }
}
