// Products of rows and a frozen weight in e4m3, each row with a scale, and an adapter's low-rank part in the same sums, for
// Hopper; kernels/src/ops/fp8.
//
//   y[t, n] = sx[t] sw[n] sum_k x[t, k] w[n, k]  +  sum_r x2[t, r] w2[n, r]  +  bias[n]  +  onto[t, n]
//
// x and w are e4m3 codes with the summed index contiguous, which is the only form that the fp8 units read; x2 and w2 are of T,
// FORM 0: w2 [n, k2], FORM 1: w2 [k2, n]. Without sw the scale of a column is 1. The first sum is the tensor cores' own; it
// is scaled in registers, and the second one is added to it in f32.
//
// Layout: x [rows, k], w [n, k] in bytes, row-major, 16-byte aligned, row strides multiples of 16; x2, w2, y, onto of T, row
// strides multiples of 8. n a multiple of 8; any rows, k and k2.
//
// Compile for sm_90a with -DT=bf16|f16 -DFORM=0|1.
// Launch: grid an even number, at most the multiprocessors; block 384; dynamic shared memory SHARED_BYTES = 4 x 49,152 + 16,384
// + 64 bytes.
//   x_map: boxes of 64 rows by 128 bytes; w_map: 128 rows by 128 bytes; x2_map: 64 rows by 64 columns; w2_map: FORM 0 128 rows
//   by 64 columns, FORM 1 64 by 64. const f32* sx, sw, const T* bias, onto, T* y, int rows, n, k, k2, ld_onto, ldy
//
// A cluster of two blocks has two neighbouring tiles of 128 rows by 256 columns, and each loads a half of w for both. A block
// is a producer warpgroup and two of 64 rows each. Stages of 128 summed codes (or of 64 of T) pass through mbarriers.
//
// Floor: 2 rows n k operations at the 1,490 TFLOP/s that cuBLASLt reaches with sums of the tensor cores.
// Status, NVIDIA H200, 2026-12-01, bf16, k2 16 to 48, against torch._scaled_mm by rows of PyTorch 2.11 in the same run, which has
// no low-rank part (medians of 12, TFLOP/s; PyTorch's default moves sums to f32 registers, use_fast_accum does not):
//   m x n x k              this kernel   and low-rank part   torch default   torch fast   bf16
//   8192 x 19456 x 2560       1,331            1,288             1,307          1,512       791
//   8192 x 2560 x 9728        1,417            1,329             1,401          1,494       804
//   8192 x 6144 x 2560        1,081            1,037             1,148          1,404       691
//   8192 x 2560 x 4096        1,155            1,130             1,236          1,389       698
//   8192 x 2560 x 19456       1,327            1,187             1,396          1,481       765   (FORM 1 from here on)
//   8192 x 9728 x 2560        1,004              980             1,079          1,320       631
//   8192 x 2560 x 6144        1,155            1,132             1,238          1,358       663
//   8192 x 4096 x 2560        1,095            1,064             1,127          1,361       663
// Error against f64 of the same codes: 1.9e-3 of the result at k = 2560, 2.8e-3 at 9728, 3.8e-3 at 19456, of which 1.7e-3 is the
// rounding to bf16; rounding to codes itself costs 3.7e-2.
// 168 registers at entry (240 a consumer thread, 24 a producer one), no local memory.
// Tests: kernels/tests/cuda.rs.
// Tried: sums moved to f32 registers every 512 codes, with tiles of 128 x 128 (2 warpgroups, 1,117 TFLOP/s at the first shape) and
// 192 x 128 (3 warpgroups, 1,223): error 1.7e-3 everywhere, which nothing shows beside that of the codes. Tiles of 128 x 128 in
// turns between two warpgroups: 797. Groups of 4 and 16 pairs of tiles: no change. Scales loaded before the products: no change.

#define CLUSTER 2
#define BM 128
#define BN 256
#define BK 128
#define A_BYTES (BM * BK)
#define B_BYTES (BN * BK)
#define STAGE_BYTES (A_BYTES + B_BYTES)
#define STAGES 4
#define PANELS (BN / 64)
#define ACC (BN / 2)
#define CONSUMERS 256
#define PRODUCER_REGISTERS 24
#define CONSUMER_REGISTERS 240
// Pairs of tiles of rows whose tiles are neighbours in time: they share w in L2.
#define GROUP 8

// Shared memory, in bytes from a base aligned to 1024.
#define STAGING_AT (STAGES * STAGE_BYTES)
#define FULL (STAGING_AT + 8 * 2048)
#define EMPTY (FULL + 8 * STAGES)

#define WGMMA8(n) "wgmma.mma_async.sync.aligned.m64n" #n "k32.f32.e4m3.e4m3 "

// d = a b (+ d where `add`), both with the summed index contiguous: e4m3 codes.
DEVICE void wgmma_codes(f32 (&d)[128], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred add; setp.ne.b32 add, %130, 0; " WGMMA8(256) ACC128 ", %128, %129, add, 1, 1; }"
                 : REG128("+f", d, 0)
                 : "l"(a), "l"(b), "r"(add));
}
// d += a b of T: a with the summed index contiguous; b too, or (FORM 1) with its columns contiguous.
DEVICE void wgmma_tail(f32 (&d)[128], u64 a, u64 b) {
    asm volatile(WGMMA(256) ACC128 ", %128, %129, 1, 1, 1, 0, %130;" : REG128("+f", d, 0) : "l"(a), "l"(b), "n"(FORM));
}

// Tiles in turns: within GROUP pairs of tiles of rows, the tiles of columns one after another.
struct Walk {
    int rows, n, i;
    DEVICE bool next(int& row, int& col, u32 rank) {
        const int units = (rows + BM * CLUSTER - 1) / (BM * CLUSTER), tiles = (n + BN - 1) / BN;
        if (i >= units * tiles) return false;
        int j = i;
        i += gridDim.x / CLUSTER;
        const int group = j / (GROUP * tiles);
        j -= group * GROUP * tiles;
        const int height = min(GROUP, units - group * GROUP), tile = j / height;
        row = (group * GROUP + j - tile * height) * (BM * CLUSTER) + (int)rank * BM;
        col = tile * BN;
        return true;
    }
};

// The sums in f32 of 64 rows of one warpgroup, multiplied by the scales of rows and columns.
DEVICE void scale(f32 (&acc)[ACC], const f32* sx, const f32* sw, int row, int rows, int col, int n) {
    const int lane = threadIdx.x % 32, r = row + threadIdx.x / 32 % 4 * 16 + lane / 4;
    const f32 s0 = r < rows ? sx[r] : 0.0f, s1 = r + 8 < rows ? sx[r + 8] : 0.0f;
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        const int c = col + 8 * j + lane % 4 * 2;
        float2 s = make_float2(1.0f, 1.0f);
        if (sw && c < n) s = __ldg(reinterpret_cast<const float2*>(sw + c));
        acc[4 * j] *= s0 * s.x;
        acc[4 * j + 1] *= s0 * s.y;
        acc[4 * j + 2] *= s1 * s.x;
        acc[4 * j + 3] *= s1 * s.y;
    }
}

DEVICE void add_pair(f32& a, f32& b, const T* at) {
    const u32 raw = *reinterpret_cast<const u32*>(at);
    const T* pair = reinterpret_cast<const T*>(&raw);
    a += to_f32(pair[0]);
    b += to_f32(pair[1]);
}
DEVICE void add_bias(f32 (&acc)[ACC], const T* bias, int col, int n) {
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        const int c = col + 8 * j + threadIdx.x % 4 * 2;
        if (c < n) {
            add_pair(acc[4 * j], acc[4 * j + 1], bias + c);
            add_pair(acc[4 * j + 2], acc[4 * j + 3], bias + c);
        }
    }
}
DEVICE void add_onto(f32 (&acc)[ACC], const T* onto, int ld, int row, int rows, int col, int n) {
    const int lane = threadIdx.x % 32, r = row + threadIdx.x / 32 % 4 * 16 + lane / 4;
    const T* at = onto + (u64)r * ld + col + lane % 4 * 2;
#pragma unroll
    for (int j = 0; j < BN / 8; j++) {
        if (col + 8 * j < n) {
            if (r < rows) add_pair(acc[4 * j], acc[4 * j + 1], at + 8 * j);
            if (r + 8 < rows) add_pair(acc[4 * j + 2], acc[4 * j + 3], at + (u64)8 * ld + 8 * j);
        }
    }
}

// y, a warp its own 16 rows, through 2 KiB of shared memory, so that rows leave in 128 bytes.
DEVICE void store_tile(T* y, const f32 (&acc)[ACC], u32 staging, int row, int rows, int col, int n, int ldy) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int chunk = 0; chunk < BN / 64; chunk++) {
        const int r = lane % 16;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            u32 x[4];
#pragma unroll
            for (int i = 0; i < 4; i++) x[i] = pack2<T>(acc[32 * chunk + 8 * j + 2 * i], acc[32 * chunk + 8 * j + 2 * i + 1]);
            store_matrices(staging + r * 128 + ((2 * j + lane / 16) ^ r % 8) * 16, x);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int rr = i * 4 + lane / 8, c = lane % 8;
            const u32 at = staging + rr * 128 + (c ^ rr % 8) * 16;
            uint4 v;
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at) : "memory");
            const int column = col + chunk * 64 + c * 8;
            if (row + rr < rows && column < n) *reinterpret_cast<uint4*>(y + (u64)(row + rr) * ldy + column) = v;
        }
        __syncwarp();
    }
}

extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1)
    fp8_linear_sm90(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                    const __grid_constant__ TensorMap x2_map, const __grid_constant__ TensorMap w2_map, const f32* sx,
                    const f32* sw, const T* bias, const T* onto, T* y, int rows, int n, int k, int k2, int ld_onto, int ldy) {
    extern __shared__ __align__(1024) u8 shared[];
    const u32 base = (u32)__cvta_generic_to_shared(shared);
    const u32 rank = cluster_rank<CLUSTER>();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            barrier_init(base + FULL + 8 * i, 1);
            // Every consumer warp of the cluster arrives.
            barrier_init(base + EMPTY + 8 * i, CLUSTER * CONSUMERS / 32);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    cluster_sync<CLUSTER>();
    Walk walk = {rows, n, (int)blockIdx.x / CLUSTER};
    const int blocks1 = (k + BK - 1) / BK, blocks = blocks1 + (k2 + 63) / 64;

    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 " STRING(PRODUCER_REGISTERS) ";");
        if (threadIdx.x < 32) {
            u32 slot = 0, parity = 1;
            for (int row, col; walk.next(row, col, rank);) {
                for (int b = 0; b < blocks; b++) {
                    const u32 full = base + FULL + 8 * slot, to = base + slot * STAGE_BYTES;
                    barrier_wait(base + EMPTY + 8 * slot, parity);
                    if (elect_one()) {
                        const bool tail = b >= blocks1;
                        const int at = tail ? (b - blocks1) * 64 : b * BK;
                        barrier_expect(full, STAGE_BYTES);
#pragma unroll
                        for (int i = 0; i < BM / 64; i++) load_box(to + i * 8192, tail ? &x2_map : &x_map, full, row + 64 * i, at);
                        const u32 w_to = to + A_BYTES + rank * (B_BYTES / 2);
                        if (FORM && tail) {
#pragma unroll
                            for (int i = 0; i < PANELS / 2; i++)
                                load_box_to_both(w_to + i * 8192, &w2_map, full, at, col + ((int)rank * (PANELS / 2) + i) * 64);
                        } else {
                            load_box_to_both(w_to, tail ? &w2_map : &w_map, full, col + (int)rank * (BN / 2), at);
                        }
                    }
                    __syncwarp();
                    if (++slot == STAGES) slot = 0, parity ^= 1;
                }
            }
        }
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 " STRING(CONSUMER_REGISTERS) ";");
        const int group = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0) - 1;
        const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
        const u32 staging = base + STAGING_AT + (threadIdx.x / 32 - 4) * 2048;
        u32 slot = 0, parity = 0;
        auto release = [&](u32 s) {
            if (lane < CLUSTER) barrier_arrive_at(base + EMPTY + 8 * s, lane);
        };
        for (int row, col; walk.next(row, col, rank);) {
            row += group * 64;
            f32 acc[ACC];
            u32 last = 0;
            for (int b = 0; b < blocks1; b++) {
                barrier_wait(base + FULL + 8 * slot, parity);
                const u64 da = descriptor(base + slot * STAGE_BYTES + group * 8192, 0);
                const u64 db = descriptor(base + slot * STAGE_BYTES + A_BYTES, 0);
                wgmma_fence();
#pragma unroll
                for (int s = 0; s < BK / 32; s++) wgmma_codes(acc, da + 2 * s, db + 2 * s, b > 0 || s > 0);
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
            scale(acc, sx, sw, row, rows, col, n);
            for (int b = blocks1; b < blocks; b++) {
                barrier_wait(base + FULL + 8 * slot, parity);
                const u64 da = descriptor(base + slot * STAGE_BYTES + group * 8192, 0);
                const u64 db = descriptor(base + slot * STAGE_BYTES + A_BYTES, 8192);
                const int steps = min(4, (k2 - (b - blocks1) * 64 + 15) / 16);
                // The compiler may not move the scaling behind the fence.
#pragma unroll
                for (int i = 0; i < ACC; i++) asm volatile("" : "+f"(acc[i])::"memory");
                wgmma_fence();
                for (int s = 0; s < steps; s++) wgmma_tail(acc, da + 2 * s, db + (FORM ? 128 : 2) * s);
                wgmma_commit();
                wgmma_wait<0>(acc);
                release(slot);
                if (++slot == STAGES) slot = 0, parity ^= 1;
            }
            if (bias) add_bias(acc, bias, col, n);
            if (onto) add_onto(acc, onto, ld_onto, row, rows, col, n);
            store_tile(y, acc, staging, row + warp * 16, rows, col, n, ldy);
        }
    }
    // Nothing may come from the other block into one that has ended.
    cluster_sync<CLUSTER>();
}
