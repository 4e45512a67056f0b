// Rows of a weight scaled to magnitudes (DoRA): norms of rows, gains, and results with a gain for each column.
//
// Row j of W + S·A has the norm n_j: n² = |w|² + Σ_i s_i·(2·wa_i + Σ_k gram[k][i]·s_k) with wa = W·Aᵀ and gram = A·Aᵀ;
// gain = m / n and reciprocal = 1 / n, both 0 where n is 0.
// Forward: y = onto + beside + gain ∘ z + bias. Backward: dz = gain ∘ dy; partial[c] = Σ_rows dy ∘ z / n, for chunks of rows.
//
// Layout: matrices of T, row-major, each with its row stride in elements, rows 16-byte aligned, any width. norms, gain,
// reciprocal, magnitude f32 and bias T are vectors; gain, reciprocal and bias 16-byte aligned. wa f32 [rows, r], gram f32
// [r, r], s T [rows, r], with any strides. partial f32 [ceil(rows / chunk), width], contiguous. y may be onto, dz may be dy.
//
// Launch (dynamic shared memory 0); N = 8 for 16-bit T, 4 for f32
//   row_norms(w, norms, i32 rows, width, ldw): the squares |w|²; grid ceil(rows / 8), block 256
//   magnitude_gain(norms, wa, gram, s, magnitude, gain, reciprocal, i32 rows, r, ldwa, ldgram, lds)
//     grid ceil(rows / 8), block 256
//   magnitude_fwd(z, gain, bias or null, onto or null, beside or null, y, i32 rows, width, ldz, ldonto, ldbeside, ldy)
//     grid ceil(rows·ceil(width / N) / 256), block 256
//   magnitude_bwd(dy, z, gain, reciprocal, dz, partial, i32 rows, width, lddy, ldz, lddz, chunk)
//     grid (ceil(width / (32·N)), ceil(rows / chunk)), block (32, 8)
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches, bf16: magnitude_fwd 8192 × 19,456 637 MB → 150 µs;
// magnitude_bwd 956 MB → 225 µs.

const int N = Vec<T>::N;

// Up to N values of a vector.
DEVICE void load_vector(const f32* p, int n, f32 (&v)[N]) {
#pragma unroll
    for (int part = 0; part < N; part += 4) {
        f32 some[4];
        unpack16<f32>(load_part(p + part, n - part), some);
#pragma unroll
        for (int i = 0; i < 4; i++) v[part + i] = some[i];
    }
}

extern "C" __global__ void __launch_bounds__(256) row_norms(const T* w, f32* norms, int rows, int width, int ldw) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    f32 sum = 0.0f;
    for (int col = lane * N; col < width; col += 32 * N) {
        f32 v[N];
        unpack16<T>(load_part(at(w, row, ldw, col), width - col), v);
#pragma unroll
        for (int i = 0; i < N; i++) sum += v[i] * v[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) norms[row] = sum;
}

extern "C" __global__ void __launch_bounds__(256)
magnitude_gain(const f32* norms, const f32* wa, const f32* gram, const T* s, const f32* magnitude, f32* gain,
               f32* reciprocal, int rows, int r, int ldwa, int ldgram, int lds) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (row >= rows) return;
    const T* mine = at(s, row, lds, 0);
    f32 sum = 0.0f;
    for (int i = lane; i < r; i += 32) {
        f32 term = 2.0f * *at(wa, row, ldwa, i);
        for (int k = 0; k < r; k++) term += *at(gram, k, ldgram, i) * to_f32(mine[k]);
        sum += to_f32(mine[i]) * term;
    }
    sum = warp_sum(sum);
    if (lane != 0) return;
    // Rounding can push the norm of a row that the adapter cancels below zero.
    const f32 square = fmaxf(norms[row] + sum, 0.0f);
    const f32 inverse = square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
    reciprocal[row] = inverse;
    gain[row] = magnitude[row] * inverse;
}

extern "C" __global__ void __launch_bounds__(256)
magnitude_fwd(const T* z, const f32* gain, const T* bias, const T* onto, const T* beside, T* y, int rows, int width,
              int ldz, int ldonto, int ldbeside, int ldy) {
    const Place p = place<N>(blockIdx.x * 256 + threadIdx.x, width);
    if (p.row >= (u32)rows) return;
    f32 v[N], g[N];
    unpack16<T>(load_part(at(z, p.row, ldz, p.col), p.n), v);
    load_vector(gain + p.col, p.n, g);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] *= g[i];
    auto add = [&](const T* from) {
        f32 w[N];
        unpack16<T>(load_part(from, p.n), w);
#pragma unroll
        for (int i = 0; i < N; i++) v[i] += w[i];
    };
    if (bias) add(bias + p.col);
    if (beside) add(at(beside, p.row, ldbeside, p.col));
    if (onto) add(at(onto, p.row, ldonto, p.col));
    store_part(at(y, p.row, ldy, p.col), p.n, pack16<T>(v));
}

extern "C" __global__ void __launch_bounds__(256)
magnitude_bwd(const T* dy, const T* z, const f32* gain, const f32* reciprocal, T* dz, f32* partial, int rows, int width,
              int lddy, int ldz, int lddz, int chunk) {
    __shared__ f32 sums[8][32 * N];
    const int tile = blockIdx.x * 32 * N, col = tile + threadIdx.x * N, n = width - col;
    const int end = min(rows, ((int)blockIdx.y + 1) * chunk);
    f32 sum[N] = {}, g[N], inverse[N];
    load_vector(gain + col, n, g);
    load_vector(reciprocal + col, n, inverse);
#pragma unroll 4
    for (int row = blockIdx.y * chunk + threadIdx.y; row < end; row += 8) {
        f32 d[N], v[N];
        unpack16<T>(load_part(at(dy, row, lddy, col), n), d);
        unpack16<T>(load_part(at(z, row, ldz, col), n), v);
#pragma unroll
        for (int i = 0; i < N; i++) {
            sum[i] += d[i] * v[i];
            d[i] *= g[i];
        }
        store_part(at(dz, row, lddz, col), n, pack16<T>(d));
    }
#pragma unroll
    for (int i = 0; i < N; i++) sum[i] *= inverse[i];
    store_column_sums(sum, sums, tile, width, partial);
}
