// Products of up to 8 rows: y = x·Wᵀ + bias + onto, in the time of reading W once.
//
// A block owns 16 rows of W and its warps share k: warp w has the pieces w, w + WARPS, … of 64 values. W goes from global
// memory into registers, DEPTH pieces at a time. The order of k is that of few_rows.cuh: thread (g, t) reads the values
// 8t … 8t + 7 of every 32.
//
// x [m, k], W [n, k], bias [n] or null, onto [m, n] or null, y [m, n], all T (bf16 or f16) with row strides in elements;
// y may be onto. Sums are f32 and rounded once. Rows of x and W 16-byte aligned, k a multiple of 8.
//
// With `frozen` set, W is read while the kernel before this one still runs, which must not write W.
//
// WARPS 4 or 8. Launch: grid ceil(n / 16), block 32·WARPS, dynamic shared memory 0.
//   few_rows(x, w, bias, onto, y, i32 m, n, k, ldx, ldw, ldonto, ldy, frozen)
//
// The linears of Qwen3-4B, 36 blocks and head (8.0 GB; 1.87 ms at 4.3 TB/s), on an H200, in a CUDA graph, 2026-11-30, beside
// cuBLASLt: 1 row 2.30 ms (2.65), 8 rows 2.41 (2.63); 16 rows, with a second group, 2.86 (2.67), so that cuBLASLt has them.
// Waiting before the first read of W costs 0.7 ms.
//
// With q, k and v, and gate and up, as one product each, a step of the blocks' operations takes 2.66 ms for 1 row, 2.93 for 8
// (2.74 and 3.02 with blocks of 4 warps).
//
// Tried: the norm of x in this kernel, in registers 3.53 ms for that step, in shared memory 2.67 and for 8 rows 4.03; the gated
// activation behind the product 2.64 and 2.88, not worth its own kernel; letting the next kernel begin at once 3.62. Copies
// through shared memory (cp.async, 4 to 6 stages) 2.47 ms for 1 row, tiles of 8 rows of W 2.65.
// No spills from sm_80 to sm_120.

static const int DEPTH = WARPS == 4 ? 4 : 3;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
few_rows(const T* x, const T* __restrict__ w, const T* bias, const T* onto, T* y, int m, int n, int k, int ldx, int ldw,
         int ldonto, int ldy, int frozen) {
    __shared__ Sums sums;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * TILE;
    const T* rows[2]; // g and g + 8, which end with the last row of W
#pragma unroll
    for (int h = 0; h < 2; h++) rows[h] = at(w, min(first + 8 * h + g, n - 1), ldw, 8 * t);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    f32 c[GROUPS][4] = {};
    if (!frozen) wait_for_previous();
    for (int base = warp * 64; base < k; base += 64 * WARPS * DEPTH) {
        uint4 q[DEPTH][2][2];
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int col = base + d * (64 * WARPS) + 32 * j;
#pragma unroll
                for (int h = 0; h < 2; h++) q[d][h][j] = col + 8 * t < k ? stream16(rows[h] + col) : zero;
            }
        if (frozen && base == warp * 64) wait_for_previous();
#pragma unroll
        for (int d = 0; d < DEPTH; d++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const int col = base + d * (64 * WARPS) + 32 * j + 8 * t;
                const uint4 b = col < k && g < m ? *reinterpret_cast<const uint4*>(at(x, g, ldx, col)) : zero;
                const uint4 &low = q[d][0][j], &high = q[d][1][j];
                mma<T>(c[0], {low.x, high.x, low.y, high.y}, b.x, b.y);
                mma<T>(c[0], {low.z, high.z, low.w, high.w}, b.z, b.w);
            }
    }
    if (frozen && warp * 64 >= k) wait_for_previous();
    let_next_begin();
    leave_sums(sums, c);
    __syncthreads();
    write_tile(sums, blockIdx.x, bias, onto, y, m, n, ldonto, ldy);
}
