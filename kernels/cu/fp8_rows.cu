// Rows as e4m3 codes with a scale each, and codes transposed, for products of fp8; kernels/src/ops/fp8.
//
//   fp8_rows       v = x[t, c] by[c] (1 without `by`), in f32; scale[t] = max(max_c |v|, 2^-100) / 448;
//                  codes[t, c] = e4m3(v / scale[t]), to the nearest, ties to even. A row of zeros has codes 0.
//   fp8_transpose  to[c, r] = from[r, c]
//
// Layout: x [rows, width] of T of 16 bits, row-major, 16-byte aligned, row stride a multiple of 8, any width; codes [rows, width] in bytes,
// 16-byte aligned, row stride a multiple of 16, of which what is beyond the width is written as 0.
//
// Compile fp8_rows with -DT=bf16|f16 for sm_89 and newer. Launch:
//   fp8_rows(x, by|null, codes, scales, i32 rows, width, ldx, ldc)
//     grid (rows), block round_up(ceil(width / (8 VECS)), 32) with VECS 2, 4, 8 or 16, at most 512 threads for 8 and 16, so widths up to 65,536 of 16 bits.
//   fp8_transpose(from, to, i32 rows, cols, ld_from, ld_to)
//     grid (ceil(cols / 128), ceil(rows / 128)), block 256. rows and strides multiples of 16, cols of 16.
//
// Floor: 3 bytes an element of 16 bits, 2 of a transposition.

#ifndef VECS
#define VECS 2
#endif

extern "C" __global__ void __launch_bounds__(VECS >= 8 ? 512 : 1024, 1)
fp8_rows(const T* x, const f32* by, u8* codes, f32* scales, int rows, int width, int ldx, int ldc) {
    __shared__ f32 shared[32];
    const u32 row = blockIdx.x;
    uint4 raw[VECS];
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * 8;
        raw[k] = load_part(at(x, row, ldx, col), width - col);
    }
    f32 largest = 0.0f;
#pragma unroll
    for (int k = 0; k < VECS; k++) largest = fmaxf(largest, largest_of(raw[k], by, (threadIdx.x + k * blockDim.x) * 8, width));
    const f32 inverse = row_scale(largest, shared, scales + row);
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * 8;
        if (col < ldc) store_codes(codes + (u64)row * ldc + col, raw[k], by, col, width, inverse);
    }
}

// A thread reads 4 rows of 4 codes four times and exchanges them, so that shared memory is written and read by words.
extern "C" __global__ void __launch_bounds__(256)
fp8_transpose(const u8* from, u8* to, int rows, int cols, int ld_from, int ld_to) {
    // Column 4 j + e of the tile is at [e][j], as words of 4 rows.
    __shared__ u32 tile[4][32][33];
    const int row0 = blockIdx.y * 128, col0 = blockIdx.x * 128, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int r = (warp * 4 + i) * 4, col = col0 + lane * 4;
        u32 w[4];
#pragma unroll
        for (int e = 0; e < 4; e++)
            w[e] = row0 + r + e < rows && col < cols ? *reinterpret_cast<const u32*>(from + (u64)(row0 + r + e) * ld_from + col) : 0;
        const u32 a = __byte_perm(w[0], w[1], 0x5140), b = __byte_perm(w[0], w[1], 0x7362);
        const u32 c = __byte_perm(w[2], w[3], 0x5140), d = __byte_perm(w[2], w[3], 0x7362);
        tile[0][lane][warp * 4 + i] = __byte_perm(a, c, 0x5410);
        tile[1][lane][warp * 4 + i] = __byte_perm(a, c, 0x7632);
        tile[2][lane][warp * 4 + i] = __byte_perm(b, d, 0x5410);
        tile[3][lane][warp * 4 + i] = __byte_perm(b, d, 0x7632);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 16; i++) {
        const int c = warp * 16 + i, row = row0 + lane * 4;
        if (col0 + c < cols && row < rows) *reinterpret_cast<u32*>(to + (u64)(col0 + c) * ld_to + row) = tile[c % 4][c / 4][lane];
    }
}
