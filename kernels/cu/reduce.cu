// Column sums (bias gradients, the last stage of weight gradients), sums of matrices, strided copies.
//
// Layout: matrices [rows, width] of T, row-major, each with its row stride in elements; pointers 16-byte aligned,
// strides multiples of 8, any width. partial f32 [chunks, width], contiguous. Sums have a fixed order, so they
// are deterministic. Outputs of add and add_row_bias may be their inputs.
//
// Launch (dynamic shared memory 0); N = 8 for 16-bit T, 4 for f32
//   column_sums(x, partial, i32 rows, width, ldx, chunk)
//     grid (ceil(width / (32·N)), ceil(rows / chunk)), block (32, 8): partial[c] = Σ rows [c·chunk, (c + 1)·chunk)
//   sum_partials(partial, out, i32 chunks, width): out f32 [width] += Σ_c partial[c]
//     grid ceil(width / 32), block (32, 8)
//   add(a, b, y, i32 rows, width, lda, ldb, ldy): y = a + b
//   add_row_bias(y, bias, i32 rows, width, ldy): y += bias, [width] of T
//   copy_2d(x, y, i32 rows, width, ldx, ldy)
//     grid ceil(rows·ceil(width / N) / 256), block 256
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches, and measured, bf16, 2026-11-23:
//   column_sums 8192 × 9728, 159 MB → 37.5 µs: 42.2, 89 %; sum_partials 128 × 2560: 1.8
//   add 8192 × 2560, 126 MB → 29.6: 30.6, 97 %; copy_2d 84 MB → 19.7: 21.4, 92 %
// No spills from sm_80 to sm_120.
//
// add, add_row_bias, copy_2d bit-exact; sums within twice the error of f32 sums in order; rows beyond
// 2^31 elements; memcheck and racecheck clean.

const int N = Vec<T>::N;

extern "C" __global__ void __launch_bounds__(256)
column_sums(const T* x, f32* partial, int rows, int width, int ldx, int chunk) {
    __shared__ f32 sums[8][32 * N];
    const int tile = blockIdx.x * 32 * N, col = tile + threadIdx.x * N;
    const int end = min(rows, ((int)blockIdx.y + 1) * chunk);
    f32 sum[N] = {};
#pragma unroll 8
    for (int row = blockIdx.y * chunk + threadIdx.y; row < end; row += 8) {
        f32 v[N];
        unpack16<T>(load_part(at(x, row, ldx, col), width - col), v);
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] += v[i];
    }
    store_column_sums(sum, sums, tile, width, partial);
}

extern "C" __global__ void __launch_bounds__(256)
sum_partials(const f32* partial, f32* out, int chunks, int width) {
    __shared__ f32 sums[8][32];
    const int col = blockIdx.x * 32 + threadIdx.x;
    f32 sum = 0.0f;
    if (col < width) {
#pragma unroll 8
        for (int c = threadIdx.y; c < chunks; c += 8) sum += partial[(u64)c * width + col];
    }
    sums[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && col < width) {
        f32 total = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++) total += sums[k][threadIdx.x];
        out[col] += total;
    }
}

// One vector of y = a + b, or of y = a. A stride of 0 is a row that all share.
template <bool SUM>
DEVICE void elementwise(const T* a, const T* b, T* y, int rows, int width, int lda, int ldb, int ldy) {
    const Place p = place<N>(blockIdx.x * 256 + threadIdx.x, width);
    if (p.row >= (u32)rows) return;
    uint4 raw = load_part(at(a, p.row, lda, p.col), p.n);
    if (SUM) {
        const uint4 other = load_part(at(b, p.row, ldb, p.col), p.n);
        f32 v[N], w[N];
        unpack16<T>(raw, v);
        unpack16<T>(other, w);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] += w[i];
        raw = pack16<T>(v);
    }
    store_part(at(y, p.row, ldy, p.col), p.n, raw);
}

extern "C" __global__ void __launch_bounds__(256)
add(const T* a, const T* b, T* y, int rows, int width, int lda, int ldb, int ldy) {
    elementwise<true>(a, b, y, rows, width, lda, ldb, ldy);
}

extern "C" __global__ void __launch_bounds__(256) add_row_bias(T* y, const T* bias, int rows, int width, int ldy) {
    elementwise<true>(y, bias, y, rows, width, ldy, 0, ldy);
}

extern "C" __global__ void __launch_bounds__(256)
copy_2d(const T* x, T* y, int rows, int width, int ldx, int ldy) {
    elementwise<false>(x, nullptr, y, rows, width, ldx, 0, ldy);
}
