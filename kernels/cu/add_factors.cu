// The part of an adapter of a product of up to 64 rows: y = y + x'·Sᵀ + bias + onto.
//
// A warp has 16 rows of S, a block 128. The order of k is that of few_rows.cuh.
//
// x' [m, rank], S [n, rank], bias [n] or null, onto [m, n] or null, y [m, n], all T (bf16 or f16) with row strides in
// elements; x' may lie in the same rows as y, behind them. y is read as it is, and the sum is rounded once more. Rows of x',
// S, y and onto, and bias, 16-byte aligned, rank and n multiples of 8.
//
// S is read while the kernel before this one still runs, which must not write it.
//
// WARPS 8, GROUPS 1, 2, 4 or 8, m <= 8·GROUPS. Launch: grid ceil(n / 128), block 256, dynamic shared memory 0.
//   add_factors(xa, s, bias, onto, y, i32 m, n, rank, ldxa, lds, ldonto, ldy)
//
// The linears of the 36 blocks of Qwen3-4B with rank 16 in groups, on an H200, in a CUDA graph, 2026-12-01: products with A
// as rows below W and this kernel, 1 row 2.46 ms (2.14 without an adapter), 8 rows 2.67 (2.32), 16 rows 2.92 (2.56), 32 rows
// 3.09 (2.59), 64 rows 3.57 (2.60). A product x·Aᵀ before one with [W, S]: 2.57, 2.73, 3.29, 3.89 and 3.86 by narrow.cu, 2.83 for 1
// row by few_rows.cu, 3.89 for 32 by cuBLAS.
//
// Tried: A, W and S in one launch whose blocks of W wait for those of A, 2.57 ms for 1 row and 2.81 for 8.
// No spills from sm_80 to sm_120.

static const int COLUMNS = WARPS * TILE;
static const int PITCH = COLUMNS + 4;

extern "C" __global__ void __launch_bounds__(32 * WARPS)
add_factors(const T* xa, const T* __restrict__ s, const T* __restrict__ bias, const T* onto, T* y, int m, int n, int rank,
            int ldxa, int lds, int ldonto, int ldy) {
    __shared__ f32 sums[8 * GROUPS][PITCH];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * COLUMNS;
    let_next_begin();
    const T* rows[2];
#pragma unroll
    for (int h = 0; h < 2; h++) rows[h] = at(s, min(first + warp * TILE + 8 * h + g, n - 1), lds, 8 * t);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    uint4 q[2][2];
    auto read_s = [&](int base) {
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                q[h][j] = base + 32 * j + 8 * t < rank ? *reinterpret_cast<const uint4*>(rows[h] + base + 32 * j) : zero;
    };
    f32 c[GROUPS][4] = {};
    read_s(0);
    wait_for_previous();
    for (int base = 0; base < rank; base += 64) {
        if (base > 0) read_s(base);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int col = base + 32 * j + 8 * t;
            const uint4 &low = q[0][j], &high = q[1][j];
#pragma unroll
            for (int r = 0; r < GROUPS; r++) {
                const uint4 b = col < rank && 8 * r + g < m ? *reinterpret_cast<const uint4*>(at(xa, 8 * r + g, ldxa, col)) : zero;
                mma<T>(c[r], {low.x, high.x, low.y, high.y}, b.x, b.y);
                mma<T>(c[r], {low.z, high.z, low.w, high.w}, b.z, b.w);
            }
        }
    }
#pragma unroll
    for (int r = 0; r < GROUPS; r++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[8 * r + 2 * t + e % 2][warp * TILE + g + e / 2 * 8] = c[r][e];
    __syncthreads();
    for (int i = threadIdx.x; i < m * (COLUMNS / 8); i += 32 * WARPS) {
        const int row = i / (COLUMNS / 8), part = i % (COLUMNS / 8) * 8, col = first + part;
        if (col >= n) continue;
        f32 sum[8], more[8];
        load16(at(y, row, ldy, col), sum);
#pragma unroll
        for (int j = 0; j < 8; j++) sum[j] += sums[row][part + j];
        if (bias) {
            load16(bias + col, more);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += more[j];
        }
        if (onto) {
            load16(at(onto, row, ldonto, col), more);
#pragma unroll
            for (int j = 0; j < 8; j++) sum[j] += more[j];
        }
        store16(at(y, row, ldy, col), sum);
    }
}
