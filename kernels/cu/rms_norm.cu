// Root-mean-square normalization of rows, alone or with a residual addition before or after it; kernels/src/ops/rms_norm.
//
// h = x + delta (rounded to T); rstd = 1/√(mean(h²) + eps); y = g ∘ (h·rstd). GAIN says what g is and what is rounded to T:
//   PLAIN          g = w, h·rstd is rounded before the product and y after it
//   ROUNDED_AFTER  g = w, only y is rounded
//   ONE_PLUS       g = 1 + w, only y is rounded
//   NO_WEIGHT      g = 1; w is null
// Norm before a residual addition: h = residual + g₁ ∘ (x·rstd₁), the norm and h rounded; y = g₂ ∘ (h·rstd₂).
// Backward, ĝ = g ∘ dy: dx = rstd·(ĝ − x·rstd²·mean(ĝ ∘ x)) + residual; dw = Σ_rows dy ∘ x·rstd.
//
// Layout: matrices [rows, width] of T, row-major, each with its row stride in elements; w [width] of T; rstd [rows]
// f32. Pointers to T are 16-byte aligned, strides multiples of 8; width is 1..=16384, with no
// alignment requirement. A row's elements stay in the registers of one block between the reduction and the output, so each is read
// once. Outputs may be the same matrix as any input of the same stride.
//
// Launch (dynamic shared memory 0 everywhere)
//   rms_norm_fwd(x, delta|null, h_out|null, w, y, rstd, i32 rows, width, ldx, ldd, ldh, ldy, f32 eps)
//   rms_norm_add(x, w1, residual, h, rstd1, w2|null, y|null, rstd2|null, i32 rows, width, ldx, ldr, ldh, ldy, f32 eps1, eps2)
//     without y only h and rstd1 are made.
//   rms_norm_recompute(x, w, rstd, y, i32 rows, width, ldx, ldy)
//   rms_norm_bwd(dy, x, w, rstd, residual|null, dx, i32 rows, width, lddy, ldx, ldr, lddx)
//     grid (rows), block round_up(ceil(width / 16), 32), for every T.
//   rms_norm_dw(dy, x, rstd, partial, i32 rows, width, lddy, ldx, chunk)
//     grid (ceil(width / (32·N)), ceil(rows / chunk)), block (32, 8); N = 8 for 16-bit T, 4 for f32; chunk rows a block
//     (64 fills the card). partial f32 [ceil(rows / chunk), width] is then added to dw by `sum_partials` of reduce.cu.
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches, and measured, bf16 8192 × 2560, 2026-11-23:
//   rms_norm_fwd 84 MB → 19.7 µs: 23.1 µs, 86 % (a copy of those bytes: 21.4); with delta 168 MB → 39.5: 43.1, 92 %
//   rms_norm_recompute 84 MB → 19.7: 21.9, 90 %
//   rms_norm_bwd 168 MB → 39.5: 42.8, 92 %
//   rms_norm_dw 84 MB → 19.7: 22.5, 88 %; its sum_partials 1.8
// FLOPs, at most 10 per element, are negligible. No spills from sm_80 to sm_120.
//
// Parity against f64, error at most twice that of the same steps rounded to T: widths 1..=16384 with tails, outputs
// over inputs, columns of wide buffers (rstd: within 2e-7); memcheck and racecheck clean.

// 16-byte vectors of a row in one thread.
const int VECS = sizeof(T) == 4 ? 4 : 2;
const int N = Vec<T>::N;

enum Gain { PLAIN, ROUNDED_AFTER, ONE_PLUS, NO_WEIGHT };
// Left to the compiler (0), f16 on Ampere gets 32 registers and spills with one rounding less.
const int MIN_BLOCKS = GAIN != PLAIN && __CUDA_ARCH__ < 900 ? 1 : 0;

DEVICE uint4 load_weight(const T* w, int col, int width) {
    return GAIN == NO_WEIGHT ? make_uint4(0, 0, 0, 0) : load_part(w + col, width - col);
}
DEVICE f32 gain(f32 w) { return GAIN == ONE_PLUS ? 1.0f + w : GAIN == NO_WEIGHT ? 1.0f : w; }

DEVICE f32 squares(const uint4& raw) {
    f32 v[N], sum = 0.0f;
    unpack16<T>(raw, v);
#pragma unroll
    for (int i = 0; i < N; i++) sum = fmaf(v[i], v[i], sum);
    return sum;
}

// g ∘ (x·rstd), rounded.
DEVICE uint4 normalized(const uint4& x, const uint4& w, f32 rstd) {
    f32 v[N], g[N];
    unpack16<T>(x, v);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] *= rstd;
    if (GAIN == PLAIN) unpack16<T>(pack16<T>(v), v);
    unpack16<T>(w, g);
#pragma unroll
    for (int i = 0; i < N; i++) v[i] *= gain(g[i]);
    return pack16<T>(v);
}

extern "C" __global__ void __launch_bounds__(1024, MIN_BLOCKS)
rms_norm_fwd(const T* x, const T* delta, T* h_out, const T* w, T* y, f32* rstd, int rows, int width, int ldx, int ldd,
             int ldh, int ldy, f32 eps) {
    begin_early();
    __shared__ f32 shared[32];
    const u32 row = blockIdx.x;
    uint4 h[VECS];
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        h[k] = load_part(at(x, row, ldx, col), width - col);
    }
    if (delta) {
#pragma unroll
        for (int k = 0; k < VECS; k++) {
            const int col = (threadIdx.x + k * blockDim.x) * N;
            f32 a[N], b[N];
            unpack16<T>(load_part(at(delta, row, ldd, col), width - col), b);
            unpack16<T>(h[k], a);
#pragma unroll
            for (int i = 0; i < N; i++) a[i] += b[i];
            h[k] = pack16<T>(a);
        }
    }
    f32 sum = 0.0f;
#pragma unroll
    for (int k = 0; k < VECS; k++) sum += squares(h[k]);
    const f32 r = 1.0f / sqrtf(block_sum(sum, shared) / (f32)width + eps);
    if (threadIdx.x == 0) rstd[row] = r;
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        if (h_out) store_part(at(h_out, row, ldh, col), width - col, h[k]);
        store_part(at(y, row, ldy, col), width - col, normalized(h[k], load_weight(w, col, width), r));
    }
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm_add(const T* x, const T* w1, const T* residual, T* h_out, f32* rstd1, const T* w2, T* y, f32* rstd2, int rows,
             int width, int ldx, int ldr, int ldh, int ldy, f32 eps1, f32 eps2) {
    begin_early();
    __shared__ f32 shared[32];
    const u32 row = blockIdx.x;
    uint4 h[VECS];
    f32 sum = 0.0f;
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        h[k] = load_part(at(x, row, ldx, col), width - col);
        sum += squares(h[k]);
    }
    const f32 r1 = 1.0f / sqrtf(block_sum(sum, shared) / (f32)width + eps1);
    if (threadIdx.x == 0) rstd1[row] = r1;
    sum = 0.0f;
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        f32 a[N], b[N];
        unpack16<T>(load_part(at(residual, row, ldr, col), width - col), a);
        unpack16<T>(normalized(h[k], load_weight(w1, col, width), r1), b);
#pragma unroll
        for (int i = 0; i < N; i++) a[i] += b[i];
        h[k] = pack16<T>(a);
        store_part(at(h_out, row, ldh, col), width - col, h[k]);
        sum += squares(h[k]);
    }
    if (!y) return; // the whole block
    const f32 r2 = 1.0f / sqrtf(block_sum(sum, shared) / (f32)width + eps2);
    if (threadIdx.x == 0) rstd2[row] = r2;
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        store_part(at(y, row, ldy, col), width - col, normalized(h[k], load_weight(w2, col, width), r2));
    }
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm_recompute(const T* x, const T* w, const f32* rstd, T* y, int rows, int width, int ldx, int ldy) {
    const u32 row = blockIdx.x;
    uint4 v[VECS];
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        v[k] = load_part(at(x, row, ldx, col), width - col);
    }
    const f32 r = rstd[row];
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        store_part(at(y, row, ldy, col), width - col, normalized(v[k], load_weight(w, col, width), r));
    }
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm_bwd(const T* dy, const T* x, const T* w, const f32* rstd, const T* residual, T* dx, int rows, int width,
             int lddy, int ldx, int ldr, int lddx) {
    // A row of 16384 leaves each thread 64 registers: f32 fetches dy again (from L2) and the residual late.
    const bool KEEP = sizeof(T) == 2;
    __shared__ f32 shared[32];
    const u32 row = blockIdx.x;
    uint4 g[VECS], v[VECS], res[VECS];
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        g[k] = load_part(at(dy, row, lddy, col), width - col);
        v[k] = load_part(at(x, row, ldx, col), width - col);
        if (KEEP && residual) res[k] = load_part(at(residual, row, ldr, col), width - col);
    }
    const f32 r = rstd[row];
    f32 dot = 0.0f;
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        f32 a[N], b[N], c[N];
        unpack16<T>(g[k], a);
        unpack16<T>(v[k], b);
        unpack16<T>(load_weight(w, col, width), c);
#pragma unroll
        for (int i = 0; i < N; i++) dot = fmaf(a[i] * gain(c[i]), b[i], dot);
    }
    const f32 along = r * r * (block_sum(dot, shared) / (f32)width);
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * N;
        const uint4 weight = load_weight(w, col, width);
        if (!KEEP) g[k] = load_part(at(dy, row, lddy, col), width - col);
        f32 a[N], b[N], c[N];
        unpack16<T>(g[k], a);
        unpack16<T>(v[k], b);
        unpack16<T>(weight, c);
#pragma unroll
        for (int i = 0; i < N; i++) a[i] = r * (a[i] * gain(c[i]) - b[i] * along);
        if (residual) {
            if (!KEEP) res[k] = load_part(at(residual, row, ldr, col), width - col);
            unpack16<T>(res[k], b);
#pragma unroll
            for (int i = 0; i < N; i++) a[i] += b[i];
        }
        store_part(at(dx, row, lddx, col), width - col, pack16<T>(a));
    }
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_dw(const T* dy, const T* x, const f32* rstd, f32* partial, int rows, int width, int lddy, int ldx, int chunk) {
    __shared__ f32 sums[8][32 * N];
    const int tile = blockIdx.x * 32 * N, col = tile + threadIdx.x * N;
    const int end = min(rows, ((int)blockIdx.y + 1) * chunk);
    f32 sum[N] = {};
#pragma unroll 4
    for (int row = blockIdx.y * chunk + threadIdx.y; row < end; row += 8) {
        f32 a[N], b[N];
        unpack16<T>(load_part(at(dy, row, lddy, col), width - col), a);
        unpack16<T>(load_part(at(x, row, ldx, col), width - col), b);
        const f32 r = rstd[row];
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] = fmaf(a[i], b[i] * r, sum[i]);
    }
    store_column_sums(sum, sums, tile, width, partial);
}
