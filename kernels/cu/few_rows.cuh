// Products of a few rows with a weight on the tensor cores, for few_rows.cu and few_rows_4bit.cu. The loader
// puts it after mma.cuh. It requires T (bf16 or f16), WARPS, and GROUPS: groups of 8 rows of x.
//
// W is the A operand of mma.sync m16n8k16, a tile of 16 rows, and x is the B operand. The order of k within a product is
// free as long as both operands agree, so each thread reads consecutive values of a row: with g = lane / 4 and
// t = lane % 4, thread (g, t) has rows g and g + 8 of W and row g of x, and its values 4i … 4i + 3 stand for
// k = 2t, 2t + 1, 2t + 8, 2t + 9 of product i.

static const int TILE = 16;

// Reads of weights, each once, which need not stay in the cache.
DEVICE uint4 stream16(const void* p) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

// The warps' sums of a tile, [WARPS][GROUPS][8 rows of x][16 rows of W].
typedef f32 Sums[WARPS][GROUPS][8 * TILE];

DEVICE void leave_sums(Sums& sums, const f32 (&c)[GROUPS][4]) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int r = 0; r < GROUPS; r++)
#pragma unroll
        for (int e = 0; e < 4; e++) sums[warp][r][(2 * t + e % 2) * TILE + g + e / 2 * 8] = c[r][e];
}

// y = sums of all warps + bias + onto, rounded once.
DEVICE void write_tile(const Sums& sums, int tile, const T* bias, const T* onto, T* y, int m, int n, int ldonto, int ldy) {
    for (int i = threadIdx.x; i < GROUPS * 8 * TILE; i += 32 * WARPS) {
        const int row = i / TILE, col = tile * TILE + i % TILE;
        if (row >= m || col >= n) continue;
        f32 sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += sums[w][row / 8][row % 8 * TILE + i % TILE];
        if (bias) sum += to_f32(bias[col]);
        if (onto) sum += to_f32(*at(onto, row, ldonto, col));
        *at(y, row, ldy, col) = from_f32<T>(sum);
    }
}
