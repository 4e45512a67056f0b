// Root-mean-square normalization between an f32 residual stream and activations of T, 16 bits; kernels/src/ops/rms_norm.
//
// h = x + delta in f32; rstd = 1/√(mean(h²) + eps); y = g ∘ (h·rstd), rounded to T once, whatever the form of g.
// Backward, ĝ = g ∘ dy: dx = rstd·(ĝ − x·rstd²·mean(ĝ ∘ x)) + residual; dw = Σ_rows dy ∘ x·rstd.
// A norm before the residual addition has x and dx of T, and dy of f32 (the entries with `post`).
//
// Layout: matrices [rows, width], row-major, each with its row stride in elements; x, h, residual, dx f32 and delta, y, dy T
// unless said otherwise; w [width] of T; rstd [rows] f32. Pointers are 16-byte aligned, strides multiples of 8; width is
// 1..=16384. A thread has four groups of four values, so that f32 moves in accesses of 16 bytes and T in 8. Outputs may be the
// same matrix as any input of the same dtype and stride.
//
// Launch (dynamic shared memory 0 everywhere)
//   rms_norm_mixed_fwd(x, delta|null, h_out|null, w, y, rstd, i32 rows, width, ldx, ldd, ldh, ldy, f32 eps)
//   rms_norm_mixed_recompute(x, w, rstd, y, i32 rows, width, ldx, ldy)
//   rms_norm_mixed_bwd(dy, x, w, rstd, residual|null, dx, i32 rows, width, lddy, ldx, ldr, lddx)
//   rms_norm_post_bwd: the same with dy f32, x, residual and dx T
//     grid (rows), block round_up(ceil(width / 16), 32)
//   rms_norm_mixed_dw(dy, x, rstd, partial, i32 rows, width, lddy, ldx, chunk)
//   rms_norm_post_dw: the same with dy f32 and x T
//     grid (ceil(width / 128), ceil(rows / chunk)), block (32, 8); partial as in rms_norm.cu
//
// Bytes a value: fwd 6, with delta 12; recompute 6; bwd 6, with residual 10. No spills from sm_80 to sm_120.

enum Gain { PLAIN, ROUNDED_AFTER, ONE_PLUS, NO_WEIGHT };

const int N = 4, GROUPS = 4;

DEVICE void load4(const f32* p, int n, f32 (&v)[N]) {
    unpack16<f32>(load_part(p, n), v);
}
DEVICE void load4(const T* p, int n, f32 (&v)[N]) {
    T e[N] = {};
    if (n >= N) {
        *reinterpret_cast<uint2*>(e) = *reinterpret_cast<const uint2*>(p);
    } else {
#pragma unroll
        for (int i = 0; i < N; i++)
            if (i < n) e[i] = p[i];
    }
#pragma unroll
    for (int i = 0; i < N; i++) v[i] = to_f32(e[i]);
}
DEVICE void store4(f32* p, int n, const f32 (&v)[N]) { store_part(p, n, pack16<f32>(v)); }
DEVICE void store4(T* p, int n, const f32 (&v)[N]) {
    if (n >= N) {
        *reinterpret_cast<uint2*>(p) = make_uint2(pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3]));
        return;
    }
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < n) p[i] = from_f32<T>(v[i]);
}

DEVICE int column(int k) { return (threadIdx.x + k * blockDim.x) * N; }

// g of some columns.
DEVICE void load_gain(const T* w, int col, int width, f32 (&g)[N]) {
    if (GAIN == NO_WEIGHT) {
#pragma unroll
        for (int i = 0; i < N; i++) g[i] = 1.0f;
        return;
    }
    load4(w + col, width - col, g);
    if (GAIN == ONE_PLUS) {
#pragma unroll
        for (int i = 0; i < N; i++) g[i] += 1.0f;
    }
}

DEVICE void store_normalized(const f32 (&h)[N], const T* w, T* y, u32 row, int col, int width, int ldy, f32 r) {
    f32 g[N];
    load_gain(w, col, width, g);
#pragma unroll
    for (int i = 0; i < N; i++) g[i] *= h[i] * r;
    store4(at(y, row, ldy, col), width - col, g);
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm_mixed_fwd(const f32* x, const T* delta, f32* h_out, const T* w, T* y, f32* rstd, int rows, int width, int ldx,
                   int ldd, int ldh, int ldy, f32 eps) {
    begin_early();
    __shared__ f32 shared[32];
    const u32 row = blockIdx.x;
    f32 h[GROUPS][N], sum = 0.0f;
#pragma unroll
    for (int k = 0; k < GROUPS; k++) load4(at(x, row, ldx, column(k)), width - column(k), h[k]);
    if (delta) {
#pragma unroll
        for (int k = 0; k < GROUPS; k++) {
            f32 d[N];
            load4(at(delta, row, ldd, column(k)), width - column(k), d);
#pragma unroll
            for (int i = 0; i < N; i++) h[k][i] += d[i];
        }
    }
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
#pragma unroll
        for (int i = 0; i < N; i++) sum = fmaf(h[k][i], h[k][i], sum);
    }
    const f32 r = 1.0f / sqrtf(block_sum(sum, shared) / (f32)width + eps);
    if (threadIdx.x == 0) rstd[row] = r;
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        if (h_out) store4(at(h_out, row, ldh, column(k)), width - column(k), h[k]);
        store_normalized(h[k], w, y, row, column(k), width, ldy, r);
    }
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm_mixed_recompute(const f32* x, const T* w, const f32* rstd, T* y, int rows, int width, int ldx, int ldy) {
    const u32 row = blockIdx.x;
    const f32 r = rstd[row];
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        f32 h[N];
        load4(at(x, row, ldx, column(k)), width - column(k), h);
        store_normalized(h, w, y, row, column(k), width, ldy, r);
    }
}

// X is the dtype of x, residual and dx, Y that of dy.
template <typename X, typename Y>
DEVICE void backward(const Y* dy, const X* x, const T* w, const f32* rstd, const X* residual, X* dx, int width, int lddy,
                     int ldx, int ldr, int lddx) {
    __shared__ f32 shared[32];
    const u32 row = blockIdx.x;
    f32 g[GROUPS][N], v[GROUPS][N], dot = 0.0f;
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        load4(at(dy, row, lddy, column(k)), width - column(k), g[k]);
        load4(at(x, row, ldx, column(k)), width - column(k), v[k]);
    }
    const f32 r = rstd[row];
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        f32 c[N];
        load_gain(w, column(k), width, c);
#pragma unroll
        for (int i = 0; i < N; i++) {
            g[k][i] *= c[i];
            dot = fmaf(g[k][i], v[k][i], dot);
        }
    }
    const f32 along = r * r * (block_sum(dot, shared) / (f32)width);
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
#pragma unroll
        for (int i = 0; i < N; i++) g[k][i] = r * (g[k][i] - v[k][i] * along);
        if (residual) {
            f32 more[N];
            load4(at(residual, row, ldr, column(k)), width - column(k), more);
#pragma unroll
            for (int i = 0; i < N; i++) g[k][i] += more[i];
        }
        store4(at(dx, row, lddx, column(k)), width - column(k), g[k]);
    }
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm_mixed_bwd(const T* dy, const f32* x, const T* w, const f32* rstd, const f32* residual, f32* dx, int rows,
                   int width, int lddy, int ldx, int ldr, int lddx) {
    backward<f32, T>(dy, x, w, rstd, residual, dx, width, lddy, ldx, ldr, lddx);
}

extern "C" __global__ void __launch_bounds__(1024)
rms_norm_post_bwd(const f32* dy, const T* x, const T* w, const f32* rstd, const T* residual, T* dx, int rows, int width,
                  int lddy, int ldx, int ldr, int lddx) {
    backward<T, f32>(dy, x, w, rstd, residual, dx, width, lddy, ldx, ldr, lddx);
}

template <typename X, typename Y>
DEVICE void weight_grad(const Y* dy, const X* x, const f32* rstd, f32* partial, int rows, int width, int lddy, int ldx,
                        int chunk) {
    __shared__ f32 sums[8][32 * N];
    const int tile = blockIdx.x * 32 * N, col = tile + threadIdx.x * N;
    const int end = min(rows, ((int)blockIdx.y + 1) * chunk);
    f32 sum[N] = {};
#pragma unroll 4
    for (int row = blockIdx.y * chunk + threadIdx.y; row < end; row += 8) {
        f32 a[N], b[N];
        load4(at(dy, row, lddy, col), width - col, a);
        load4(at(x, row, ldx, col), width - col, b);
        const f32 r = rstd[row];
#pragma unroll
        for (int i = 0; i < N; i++) sum[i] = fmaf(a[i], b[i] * r, sum[i]);
    }
    store_column_sums(sum, sums, tile, width, partial);
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_mixed_dw(const T* dy, const f32* x, const f32* rstd, f32* partial, int rows, int width, int lddy, int ldx,
                  int chunk) {
    weight_grad<f32, T>(dy, x, rstd, partial, rows, width, lddy, ldx, chunk);
}

extern "C" __global__ void __launch_bounds__(256)
rms_norm_post_dw(const f32* dy, const T* x, const f32* rstd, f32* partial, int rows, int width, int lddy, int ldx,
                 int chunk) {
    weight_grad<T, f32>(dy, x, rstd, partial, rows, width, lddy, ldx, chunk);
}
