// Products of rows with the matrices of their experts, for Hopper; kernels/src/ops/grouped.
//
// With x_e the rows offsets[e] .. offsets[e + 1] and W_e one of `experts` matrices below one another:
//   FORM 0: y_e = x_e W_e^T, W_e [n, k];   FORM 1: y_e = x_e W_e, W_e [k, n]
//   and, of k2 > 0, + x2_e W2_e^T or + x2_e W2_e with k2 for k: the low-rank part of an adapter in the same sums.
//   -DADD: y = y + alpha times the sum, which is rounded to T before. -DGATHER: row i of x is row selections[i] / top_k of it.
// Sums are f32.
//
// Layout: matrices of T, row-major, each with its row stride, 16-byte aligned, strides multiples of 8; n a multiple of 8, any k
// and k2. Rows of an expert begin and end anywhere: tiles read past the end (the next expert's rows, which must be finite) and
// write within it.
//
// Compile for sm_90a with -DT=bf16|f16 -DFORM=0|1 -DBN=256|64, and -DADD, -DGATHER. BN 64 is for n <= 64.
// Launch: grid an even number, at most the multiprocessors; block 384; dynamic shared memory STAGES (16,384 + 128 BN + 16) + 16,384
// + 8 (experts + 1) bytes, STAGES 4 or 8: at most 227 KiB, so experts <= 1,300.
//   a_map (x), b_map (W), a2_map (x2), b2_map (W2): boxes of 64 columns by 64 rows; those of W and W2 in FORM 0 by 128 rows,
//   with BN 64 by n. T* y, const int* offsets, const T* x, const int* selections, int top_k, ldx (GATHER), experts, n, k, k2, ldy,
//   f32 alpha
//
// A block is a producer warpgroup and two warpgroups of 64 rows each by BN columns; stages of 64 summed elements pass through
// mbarriers. With BN 256 the two blocks of a cluster work side by side: on 256 rows of one tile of columns, of which each loads
// a half for both; on the last 128 rows or fewer of an expert they have two tiles of columns and share the rows. So a tail of
// up to 64, 128 or 192 rows costs that many. With BN 64 the work is reading x, and every block takes as many rows.
//
// Floor: 2 R n k operations at 790 TFLOP/s; with n <= 64 R k 2 bytes at 4.25 TB/s.
// Status, NVIDIA H200, 2026-11-30, 65,536 rows, against torch._grouped_mm of PyTorch 2.11 in the same run (medians of 10, TFLOP/s;
// the card was at its power limit; on a colder one 690, of a form without clusters, and 644 in the first place):
//                                     rows even            random             zipf-like
//   128 experts, 2048 -> 1536  nt   637  torch 601     587  torch 503     589  torch 506
//                              nn   619        581     586        488     587        497
//   128 experts,  768 -> 2048  nt   603        554     537        441     558        462
//                              nn   655        612     551        497     577        514
//   32 experts,  2880 -> 5760  nt   670        640     612        569     634        586
//                              nn   661        642     611        564     625        582
//   k2 = 16: 2 to 5 % more time; GATHER: 1 to 5 %
//   n = 16, k = 2048: 88 us (3.9 TB/s by the counters), floor 63; nn, k = 1536: 67 us, floor 47
// 168 registers at entry (232 a consumer thread, 40 a producer one; GATHER 216 and 72), no local memory.
// Tests: kernels/tests/cuda.rs; experts of 0, 1, 63 to 65, 127 to 129, 191 to 193, 255 to 257 and 700 rows against float32, poisoned
// outputs; compute-sanitizer memcheck clean.
// Tried:
// - blocks without clusters: 5 % slower on random and skewed rows, equal on even ones;
// - remote arrivals with .release.cluster: a device-wide fence each, 1.5 times slower;
// - the second warpgroup two steps behind the first, to overlap one's stores with the other's products: no change;
// - L2 promotion of 256 bytes for 128: no change.

#define CLUSTER (BN == 256 ? 2 : 1)
#define BM 128
#define BK 64
#define A_BYTES (BM * BK * 2)
#define B_BYTES (BN * BK * 2)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define STAGES (BN == 256 ? 4 : 8)
#define PANELS (BN / 64)
#ifdef GATHER
#define FULL_ARRIVALS (1 + 128)
#define PRODUCER_REGISTERS 72
#define CONSUMER_REGISTERS 216
#else
#define FULL_ARRIVALS 1
#define PRODUCER_REGISTERS 40
#define CONSUMER_REGISTERS 232
#endif
#define CONSUMERS 256
// Units of rows whose tiles are neighbours in time: they share weights in L2.
#define GROUP 8

// Shared memory, in bytes from a base aligned to 1024.
#define STAGING_AT (STAGES * STAGE_BYTES)
#define FULL (STAGING_AT + 8 * 2048)
#define EMPTY (FULL + 8 * STAGES)
#define TABLES_AT (EMPTY + 8 * STAGES)

// d = a b (+ d where `add`): a with the summed index contiguous; b too, or (FORM 1) with its columns contiguous.
DEVICE void wgmma(f32 (&d)[128], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %130, 0; " WGMMA(256) ACC128 ", %128, %129, add, 1, 1, 0, %131; }"
                 : REG128("+f", d, 0)
                 : "l"(a), "l"(b), "r"(add), "n"(FORM));
}
DEVICE void wgmma(f32 (&d)[32], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0; " WGMMA(64) ACC32 ", %32, %33, add, 1, 1, 0, %35; }"
                 : REG32("+f", d, 0)
                 : "l"(a), "l"(b), "r"(add), "n"(FORM));
}

// What a block computes at a time: 128 rows of an expert (fewer at its end) by BN columns. The two blocks of a cluster
// either have the same columns and neighbouring rows, and share b, or the same rows and neighbouring columns, and share a.
struct Item {
    int expert, row, end, col;
    bool shares_b;
};

// Rows of an expert that pairs of blocks take, in pairs; the others (at most 128) are shared by both.
DEVICE int row_units(int rows) { return CLUSTER == 2 ? (rows + 127) / 256 : (rows + 127) / 128; }
DEVICE int count_items(int rows, int tiles) {
    const int units = row_units(rows);
    return units * tiles + (units * (BM * CLUSTER) < rows ? (tiles + 1) / 2 : 0);
}

#if BN == 256
// Tiles in turns: those of one expert are neighbours, and within them those of GROUP units of rows.
struct Walk {
    u32 tables;   // [experts + 1] first items, [experts + 1] first rows
    int experts, tiles, rows;
    u32 rank;
    int expert, i;

    DEVICE int first(int e) const { return load_shared_int(tables + 4 * e); }
    DEVICE int row(int e) const { return load_shared_int(tables + 4 * (experts + 1 + e)); }
    DEVICE void begin() {
        expert = 0;
        i = blockIdx.x / CLUSTER;
    }
    DEVICE bool next(Item& item) {
        if (i >= first(experts)) return false;
        while (i >= first(expert + 1)) expert++;
        int j = i - first(expert);
        i += gridDim.x / CLUSTER;
        const int begin = row(expert), end = row(expert + 1);
        const int units = row_units(end - begin);
        if (j < units * tiles) {
            const int group = j / (GROUP * tiles);
            j -= group * GROUP * tiles;
            const int height = min(GROUP, units - group * GROUP);
            const int tile = j / height, unit = group * GROUP + j - tile * height;
            item = {expert, begin + unit * (BM * CLUSTER) + (int)rank * BM, end, tile * BN, true};
        } else {
            j -= units * tiles;
            item = {expert, begin + units * (BM * CLUSTER), end, (2 * j + (int)rank) * BN, false};
        }
        return true;
    }
};
#else
// One tile of columns: every block has as many rows as the others, whatever experts they are of.
struct Walk {
    u32 tables;   // [experts + 1] first items, [experts + 1] first rows
    int experts, tiles, rows;
    u32 rank;
    int expert, at, end;

    DEVICE int row(int e) const { return load_shared_int(tables + 4 * (experts + 1 + e)); }
    DEVICE void begin() {
        const int share = (rows + gridDim.x - 1) / gridDim.x;
        at = min(rows, (int)blockIdx.x * share);
        end = min(rows, at + share);
        expert = 0;
        // The last expert that begins at that row or before.
        for (int step = 1 << 9; step; step >>= 1)
            if (expert + step < experts && row(expert + step) <= at) expert += step;
    }
    DEVICE bool next(Item& item) {
        if (at >= end) return false;
        while (row(expert + 1) <= at) expert++;
        item = {expert, at, min(end, row(expert + 1)), 0, true};
        at = min(at + BM, item.end);
        return true;
    }
};
#endif

// The table of first items, by warp 0.
DEVICE void make_tables(u32 tables, const int* offsets, int experts, int tiles) {
    int sum = 0;
    for (int first = 0; first <= experts; first += 32) {
        const int e = first + threadIdx.x;
        const int begin = e <= experts ? offsets[e] : 0, end = e < experts ? offsets[e + 1] : begin;
        const int items = e < experts ? count_items(end - begin, tiles) : 0;
        int scan = items;
#pragma unroll
        for (int o = 1; o < 32; o <<= 1) {
            const int below = __shfl_up_sync(0xffffffffu, scan, o);
            if (threadIdx.x >= o) scan += below;
        }
        if (e <= experts) {
            store_shared_int(tables + 4 * e, sum + scan - items);
            store_shared_int(tables + 4 * (experts + 1 + e), begin);
        }
        sum += __shfl_sync(0xffffffffu, scan, 31);
    }
}

// The first `bytes` of 16, and zeros after them.
DEVICE void copy_first_async(u32 to, const void* from, int bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// The second 64 rows of a tile; a block alone leaves them out beyond the end.
DEVICE bool has_second(const Item& item) { return CLUSTER == 2 || item.row + 64 < item.end; }
// Bytes of a stage that the copy engine brings.
DEVICE u32 bytes_of_a(const Item& item) { return has_second(item) ? A_BYTES : A_BYTES / 2; }
DEVICE u32 bytes_of_b(int n) { return BN == 64 && FORM == 0 ? (u32)min(64, (n + 7) / 8 * 8) * 128 : B_BYTES; }

// Loads a tile of a into a stage; and one of b.
DEVICE void load_a(u32 to, const TensorMap* map, u32 bar, const Item& item, u32 rank, int k) {
    if (CLUSTER == 1 || item.shares_b) {
        load_box(to, map, bar, item.row, k);
        if (has_second(item)) load_box(to + 64 * 128, map, bar, item.row + 64, k);
    } else {
        load_box_to_both(to + rank * (64 * 128), map, bar, item.row + (int)rank * 64, k);
    }
}
DEVICE void load_b(u32 to, const TensorMap* map, u32 bar, const Item& item, u32 rank, int height, int k) {
#if FORM == 0
    // Rows of b are columns of the result, in two boxes of 128 or one of those that there are.
    const int row = item.expert * height + item.col;
    if (CLUSTER == 2 && item.shares_b) {
        load_box_to_both(to + rank * (B_BYTES / 2), map, bar, row + (int)rank * (BN / 2), k);
    } else {
        load_box(to, map, bar, row, k);
        if (BN == 256) load_box(to + B_BYTES / 2, map, bar, row + BN / 2, k);
    }
#else
    // Rows of b are summed over; panels of 64 columns.
    const int row = item.expert * height + k;
    if (CLUSTER == 2 && item.shares_b) {
#pragma unroll
        for (int i = 0; i < PANELS / 2; i++) {
            const int panel = (int)rank * (PANELS / 2) + i;
            load_box_to_both(to + panel * 8192, map, bar, row, item.col + panel * 64);
        }
    } else {
#pragma unroll
        for (int i = 0; i < PANELS; i++) load_box(to + i * 8192, map, bar, row, item.col + i * 64);
    }
#endif
}

// y (64 rows of one warpgroup), a warp its own 16 rows, through 2 KiB of shared memory, so that rows leave in 128 bytes.
DEVICE void store_tile(T* y, const f32 (&acc)[BN / 2], u32 staging, int row, int end, int col, int n, int ldy, f32 alpha) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int chunk = 0; chunk < BN / 64; chunk++) {
        const int r = lane % 16;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = pack2<T>(acc[32 * chunk + 8 * j + 2 * i], acc[32 * chunk + 8 * j + 2 * i + 1]);
            const u32 at = staging + r * 128 + ((2 * j + lane / 16) ^ r % 8) * 16;
            store_matrices(at, x);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int rr = i * 4 + lane / 8, c = lane % 8;
            const u32 at = staging + rr * 128 + (c ^ rr % 8) * 16;
            uint4 v;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
            const int column = col + chunk * 64 + c * 8;
            if (row + rr < end && column < n) {
                uint4* to = reinterpret_cast<uint4*>(y + (u64)(row + rr) * ldy + column);
#ifdef ADD
                f32 sum[8], old[8];
                unpack16<T>(v, sum);
                unpack16<T>(*to, old);
#pragma unroll
                for (int e = 0; e < 8; e++) sum[e] = fmaf(alpha, sum[e], old[e]);
                v = pack16<T>(sum);
#endif
                *to = v;
            }
        }
        __syncwarp();
    }
}

extern "C" __global__ void
#if CLUSTER == 2
__cluster_dims__(2, 1, 1)
#endif
__launch_bounds__(384, 1)
    grouped_sm90(const __grid_constant__ TensorMap a_map, const __grid_constant__ TensorMap b_map,
                 const __grid_constant__ TensorMap a2_map, const __grid_constant__ TensorMap b2_map, T* y, const int* offsets,
                 const T* x, const int* selections, int top_k, int ldx, int experts, int n, int k, int k2, int ldy, f32 alpha) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 rank = cluster_rank<CLUSTER>();
    const int tiles = (n + BN - 1) / BN;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(base + FULL + 8 * i, FULL_ARRIVALS);
            // Every consumer warp of the cluster arrives.
            barrier_init(base + EMPTY + 8 * i, CLUSTER * CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (threadIdx.x < 32) make_tables(base + TABLES_AT, offsets, experts, tiles);
    __syncthreads();
    cluster_sync<CLUSTER>();
    Walk walk = {base + TABLES_AT, experts, tiles, load_shared_int(base + TABLES_AT + 4 * (2 * experts + 1)), rank};
    walk.begin();
    const int blocks1 = (k + BK - 1) / BK, blocks = blocks1 + (k2 + BK - 1) / BK;

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " STRING(PRODUCER_REGISTERS) ";");
        u32 slot = 0, parity = 1;
#ifdef GATHER
        const int piece = threadIdx.x % 8, first = threadIdx.x / 8;
        const u32 place = first * 128 + (piece ^ first % 8) * 16;
        for (Item item; walk.next(item);) {
            int rows[BM / 16];
#pragma unroll
            for (int r = 0; r < BM / 16; r++) rows[r] = selections[min(item.row + first + 16 * r, item.end - 1)] / top_k;
            for (int b = 0; b < blocks; b++) {
                const u32 full = base + FULL + 8 * slot, stage = base + slot * STAGE_BYTES;
                barrier_wait(base + EMPTY + 8 * slot, parity);
                if (b < blocks1) {
                    if (threadIdx.x < 32 && elect_one()) {
                        barrier_expect(full, bytes_of_b(n));
                        load_b(stage + A_BYTES, &b_map, full, item, rank, FORM ? k : n, b * BK);
                    }
                    __syncwarp();
                    const int at = b * BK + piece * 8, bytes = max(0, min(8, k - at)) * 2;
#pragma unroll
                    for (int r = 0; r < BM / 16; r++)
                        if (r < BM / 32 || has_second(item)) copy_first_async(stage + place + r * 2048, bytes ? x + (u64)rows[r] * ldx + at : x, bytes);
                } else {
                    if (threadIdx.x < 32 && elect_one()) {
                        barrier_expect(full, bytes_of_a(item) + bytes_of_b(n));
                        load_a(stage, &a2_map, full, item, rank, (b - blocks1) * BK);
                        load_b(stage + A_BYTES, &b2_map, full, item, rank, FORM ? k2 : n, (b - blocks1) * BK);
                    }
                    __syncwarp();
                }
                // Arrives when this thread's copies have.
                asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
        }
#else
        if (threadIdx.x < 32) {
            for (Item item; walk.next(item);) {
                for (int b = 0; b < blocks; b++) {
                    const u32 full = base + FULL + 8 * slot, stage = base + slot * STAGE_BYTES;
                    const bool second = b >= blocks1;
                    const int at = (second ? b - blocks1 : b) * BK;
                    barrier_wait(base + EMPTY + 8 * slot, parity);
                    if (elect_one()) {
                        barrier_expect(full, bytes_of_a(item) + bytes_of_b(n));
                        load_a(stage, second ? &a2_map : &a_map, full, item, rank, at);
                        load_b(stage + A_BYTES, second ? &b2_map : &b_map, full, item, rank, FORM ? (second ? k2 : k) : n, at);
                    }
                    __syncwarp();
                    if (++slot == STAGES) slot = 0, parity ^= 1;
                }
            }
        }
#endif
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " STRING(CONSUMER_REGISTERS) ";");
        const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 staging = base + STAGING_AT + (threadIdx.x / 32 - 4) * 2048;
        u32 slot = 0, parity = 0;
        auto release = [&](u32 s) {
            if (lane < CLUSTER) {
                if (CLUSTER == 1) barrier_arrive(base + EMPTY + 8 * s);
                else barrier_arrive_at(base + EMPTY + 8 * s, lane);
            }
        };
        for (Item item; walk.next(item);) {
            const int row = item.row + group * 64;
            if (row >= item.end || item.col >= n) {
                for (int b = 0; b < blocks; b++) {
                    barrier_wait(base + FULL + 8 * slot, parity);
                    release(slot);
                    if (++slot == STAGES) slot = 0, parity ^= 1;
                }
                continue;
            }
            f32 acc[BN / 2];
            u32 last = 0;
            for (int b = 0; b < blocks; b++) {
                barrier_wait(base + FULL + 8 * slot, parity);
#ifdef GATHER
                // The copies were the producer's, not the copy engine's.
                fence_async();
#endif
                const u64 da = descriptor(base + slot * STAGE_BYTES + group * (64 * 128), 0);
                const u64 db = descriptor(base + slot * STAGE_BYTES + A_BYTES, 8192);
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < BK / 16; s++) wgmma(acc, da + 2 * s, db + (FORM ? 128 : 2) * s, b > 0 || s > 0);
                wgmma_commit();
                if (b > 0) {
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    release(last);
                }
                last = slot;
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
            wgmma_wait<0>(acc);
            release(last);
            store_tile(y, acc, staging, row + warp * 16, item.end, item.col, n, ldy, alpha);
        }
    }
    // Nothing may come from the other block into one that has ended.
    cluster_sync<CLUSTER>();
}
