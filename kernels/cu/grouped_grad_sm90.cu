// Gradients of the matrices of experts, for Hopper; kernels/src/ops/grouped.
//
// grad_e += alpha dy_e^T x_e, with dy_e, x_e the rows offsets[e] .. offsets[e + 1] of dy and x. Sums are f32.
// -DGATHER_DY, -DGATHER_X: row i of that operand is row selections[i] / top_k of it.
//
// Layout: dy [rows, n], x [rows, k] of T, row-major, each with its row stride, 16-byte aligned, strides multiples of 8; any n and
// k. grad f32 [experts * n, k], dense; 8-byte aligned with an even k it is added to in pairs. Rows past an expert's end are read
// and multiplied by zero, so they must be finite.
//
// Compile for sm_90a with -DT=bf16|f16 -DBN=256|64 (64 for k <= 64), and -DCLUSTER=1 for n <= 128 where BN is 256.
// Launch: grid an even number, at most the multiprocessors; block 384; dynamic shared memory STAGES (16,384 + 128 BN + 16)
// + 4 (experts + 1) bytes, STAGES 4 or 8.
//   dy_map, x_map: boxes of 64 rows by 64 columns; f32* grad, const int* offsets, const T* dy, const T* x, const int* selections,
//   int top_k, lddy, ldx (gathers), experts, n, k, f32 alpha
//
// A block is a producer warpgroup and two warpgroups of 64 rows of grad each by BN columns; blocks take tiles of all experts in
// turns. Of a cluster each block loads half of the columns of x for both. An element of grad is added to by one thread, once:
// the result does not depend on timing.
//
// Floor: for adapters the rows of the wide operand, R k 2 or R n 2 bytes at 4.25 TB/s; for whole matrices 2 R n k operations at
// 790 TFLOP/s or 8 experts n k bytes.
// Status, NVIDIA H200, 2026-11-30, 65,536 rows, 128 experts, random split:
//   n = 16, k = 2048: 79 us (3.9 TB/s by the counters), floor 63     n = 1536, k = 16: 90 us with its launch from Python, floor 47
//   n = 16, k = 2048, GATHER_X: 149 us, floor of the gathered rows 63
//   n = 1536, k = 2048: 1725 us, floor 758 (of grad); torch._grouped_mm, which writes bf16 and adds nothing, 928
// 168 registers at entry (232 a consumer thread, 40 a producer one; gathers 216 and 72), no local memory.
// Tests: as grouped_sm90.cu's.
// Left: the additions of whole matrices are not overlapped with products.

#ifndef CLUSTER
#define CLUSTER (BN == 256 ? 2 : 1)
#endif
#define BM 128
#define BK 64
#define PANEL_BYTES (BK * 128)
#define A_BYTES (2 * PANEL_BYTES)
#define PANELS (BN / 64)
#define STAGE_BYTES (A_BYTES + PANELS * PANEL_BYTES)
#define STAGES (BN == 256 ? 4 : 8)
#define CONSUMERS 256
#if defined(GATHER_DY) || defined(GATHER_X)
#define FULL_ARRIVALS (1 + 128)
#define PRODUCER_REGISTERS 72
#define CONSUMER_REGISTERS 216
#else
#define FULL_ARRIVALS 1
#define PRODUCER_REGISTERS 40
#define CONSUMER_REGISTERS 232
#endif
#if defined(GATHER_DY) && defined(GATHER_X)
#define COPIED_BYTES 0
#elif defined(GATHER_DY)
#define COPIED_BYTES (STAGE_BYTES - A_BYTES)
#elif defined(GATHER_X)
#define COPIED_BYTES A_BYTES
#else
#define COPIED_BYTES STAGE_BYTES
#endif

// Shared memory, in bytes from a base aligned to 1024.
#define FULL (STAGES * STAGE_BYTES)
#define EMPTY (FULL + 8 * STAGES)
#define OFFSETS_AT (EMPTY + 8 * STAGES)

// d = aT b (+ d where `add`), both with their columns contiguous.
DEVICE void wgmma(f32 (&d)[128], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %130, 0; " WGMMA(256) ACC128 ", %128, %129, add, 1, 1, 1, 1; }"
                 : REG128("+f", d, 0)
                 : "l"(a), "l"(b), "r"(add));
}
DEVICE void wgmma(f32 (&d)[32], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %34, 0; " WGMMA(64) ACC32 ", %32, %33, add, 1, 1, 1, 1; }"
                 : REG32("+f", d, 0)
                 : "l"(a), "l"(b), "r"(add));
}

// A tile of the gradient of one expert, and the rows it sums over.
struct Item { int expert, begin, end, row, col; };

struct Walk {
    u32 offsets;
    int experts, row_pairs, col_tiles;
    u32 rank;

    DEVICE int items() const { return experts * row_pairs * col_tiles; }
    DEVICE Item item(int i) const {
        const int each = row_pairs * col_tiles, expert = i / each;
        i -= expert * each;
        const int tile = i / row_pairs;
        const int row = ((i - tile * row_pairs) * CLUSTER + (int)rank) * BM;
        return {expert, load_shared_int(offsets + 4 * expert), load_shared_int(offsets + 4 * expert + 4), row, tile * BN};
    }
};

#if FULL_ARRIVALS > 1
// The tokens of the rows that this thread copies, of 64 from row `at` on.
DEVICE void find_rows(int (&rows)[4], const int* selections, int at, int end, int top_k) {
#pragma unroll
    for (int r = 0; r < 4; r++) rows[r] = selections[min(at + (int)threadIdx.x / 8 + 16 * r, end - 1)] / top_k;
}
// Panels of 64 columns of those rows, from column `col` of `width` on.
template <int COUNT> DEVICE void gather_panels(u32 to, const T* from, int ld, const int (&rows)[4], int col, int width) {
    const int piece = threadIdx.x % 8, first = threadIdx.x / 8;
    to += first * 128 + (piece ^ first % 8) * 16;
#pragma unroll
    for (int panel = 0; panel < COUNT; panel++) {
        const int at = col + panel * 64 + piece * 8, bytes = max(0, min(8, width - at)) * 2;
#pragma unroll
        for (int r = 0; r < 4; r++)
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + panel * PANEL_BYTES + r * 2048),
                         "l"(bytes ? from + (u64)rows[r] * ld + at : from), "r"(bytes)
                         : "memory");
    }
}
#endif

// Adds to the first `n` of two neighbours; at once where every pair of them is aligned.
DEVICE void add2(f32* to, f32 x, f32 y, int n, bool pairs) {
    if (pairs && n >= 2) {
        asm volatile("red.relaxed.gpu.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(x), "f"(y) : "memory");
    } else {
        if (n > 0) atomicAdd(to, x);
        if (n > 1) atomicAdd(to + 1, y);
    }
}

extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)
    grouped_grad_sm90(const __grid_constant__ TensorMap dy_map, const __grid_constant__ TensorMap x_map, f32* grad,
                      const int* offsets, const T* dy, const T* x, const int* selections, int top_k,
                      int lddy, int ldx, int experts, int n, int k, f32 alpha) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 rank = cluster_rank<CLUSTER>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(base + FULL + 8 * i, FULL_ARRIVALS);
            // Every consumer warp of the cluster arrives.
            barrier_init(base + EMPTY + 8 * i, CLUSTER * CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    for (int e = threadIdx.x; e <= experts; e += 384) store_shared_int(base + OFFSETS_AT + 4 * e, offsets[e]);
    __syncthreads();
    cluster_sync<CLUSTER>();
    const Walk walk = {base + OFFSETS_AT, experts, (n + BM * CLUSTER - 1) / (BM * CLUSTER), (k + BN - 1) / BN, rank};
    const int items = walk.items(), step = gridDim.x / CLUSTER;

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " STRING(PRODUCER_REGISTERS) ";");
        // Without a gather one warp does everything.
        if (FULL_ARRIVALS > 1 || threadIdx.x < 32) {
            u32 slot = 0, parity = 1;
            for (int i = blockIdx.x / CLUSTER; i < items; i += step) {
                const Item item = walk.item(i);
#if FULL_ARRIVALS > 1
                int next[4];
                find_rows(next, selections, item.begin, item.end, top_k);
#endif
                for (int at = item.begin; at < item.end; at += BK) {
                    const u32 full = base + FULL + 8 * slot, stage = base + slot * STAGE_BYTES;
#if FULL_ARRIVALS > 1
                    int rows[4];
#pragma unroll
                    for (int r = 0; r < 4; r++) rows[r] = next[r];
                    if (at + BK < item.end) find_rows(next, selections, at + BK, item.end, top_k);
#endif
                    barrier_wait(base + EMPTY + 8 * slot, parity);
                    if (threadIdx.x < 32 && elect_one()) {
#ifdef GATHER_DY
                        barrier_expect(full, COPIED_BYTES);
#else
                        // A panel beyond n is nobody's.
                        const bool second = item.row + 64 < n;
                        barrier_expect(full, COPIED_BYTES - (second ? 0 : PANEL_BYTES));
                        load_box(stage, &dy_map, full, at, item.row);
                        if (second) load_box(stage + PANEL_BYTES, &dy_map, full, at, item.row + 64);
#endif
#ifndef GATHER_X
#pragma unroll
                        for (int p = 0; p < PANELS / CLUSTER; p++) {
                            const int panel = (int)rank * (PANELS / CLUSTER) + p;
                            const u32 to = stage + A_BYTES + panel * PANEL_BYTES;
                            if (CLUSTER == 2) load_box_to_both(to, &x_map, full, at, item.col + 64 * panel);
                            else load_box(to, &x_map, full, at, item.col + 64 * panel);
                        }
#endif
                    }
                    __syncwarp();
#ifdef GATHER_DY
                    gather_panels<2>(stage, dy, lddy, rows, item.row, n);
#endif
#ifdef GATHER_X
                    gather_panels<PANELS>(stage + A_BYTES, x, ldx, rows, item.col, k);
#endif
#if FULL_ARRIVALS > 1
                    // Arrives when this thread's copies have.
                    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full) : "memory");
#endif
                    if (++slot == STAGES) slot = 0, parity ^= 1;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " STRING(CONSUMER_REGISTERS) ";");
        const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        u32 slot = 0, parity = 0;
        auto release = [&](u32 s) {
            if (CLUSTER == 1 && lane == 0) barrier_arrive(base + EMPTY + 8 * s);
            if (CLUSTER == 2 && lane < 2) barrier_arrive_at(base + EMPTY + 8 * s, lane);
        };
        for (int i = blockIdx.x / CLUSTER; i < items; i += step) {
            const Item item = walk.item(i);
            const int row = item.row + group * 64;
            if (row >= n) {
                for (int at = item.begin; at < item.end; at += BK) {
                    barrier_wait(base + FULL + 8 * slot, parity);
                    release(slot);
                    if (++slot == STAGES) slot = 0, parity ^= 1;
                }
                continue;
            }
            if (item.begin == item.end) continue;
            f32 acc[BN / 2];
            u32 last = 0;
            for (int at = item.begin; at < item.end; at += BK) {
                barrier_wait(base + FULL + 8 * slot, parity);
#if FULL_ARRIVALS > 1
                // The copies were the producer's, not the copy engine's.
                fence_async();
#endif
                const u32 a = base + slot * STAGE_BYTES + group * PANEL_BYTES;
                const int valid = item.end - at;
                if (valid < BK) {
                    // The next expert's rows have come too; zeros in one factor leave them out.
                    for (int at16 = valid * 8 + threadIdx.x % 128; at16 < BK * 8; at16 += 128)
                        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(a + at16 * 16), "r"(0) : "memory");
                    fence_async();
                    named_sync(1 + group, 128);
                }
                const u64 da = descriptor(a, PANEL_BYTES), db = descriptor(base + slot * STAGE_BYTES + A_BYTES, PANEL_BYTES);
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < BK / 16; s++) wgmma(acc, da + 128 * s, db + 128 * s, at > item.begin || s > 0);
                wgmma_commit();
                if (at > item.begin) {
                    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
                    release(last);
                }
                last = slot;
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
            wgmma_wait<0>(acc);
            release(last);
            // Each sum is one thread's, and nothing else adds to it: the result does not depend on timing.
            f32* out = grad + (u64)item.expert * n * k;
            const bool pairs = ((u64)out | (u64)k * 4) % 8 == 0;
#pragma unroll
            for (int j = 0; j < BN / 8; j++) {
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const int out_row = row + warp * 16 + lane / 4 + 8 * r, col = item.col + 8 * j + 2 * (lane % 4);
                    if (out_row < n) add2(out + (u64)out_row * k + col, alpha * acc[4 * j + 2 * r], alpha * acc[4 * j + 2 * r + 1], k - col, pairs);
                }
            }
        }
    }
    // Nothing may come from the other block into one that has ended.
    cluster_sync<CLUSTER>();
}
