// Causal depthwise convolution with SiLU over documents; kernels/src/ops/causal_conv.
//
// p[t, c] = Σ_i w[c, W − 1 − i]·x[t − i, c] over i < W with t − i in the document of t; y = silu(p).
// Backward: dp = dy·silu'(p), dx[t, c] = Σ_i w[c, W − 1 − i]·dp[t + i, c], dw[c, W − 1 − i] = Σ_t dp[t, c]·x[t − i, c].
//
// Layout: matrices [tokens, width] of T, row-major with row strides in elements, rows 16-byte aligned; w [width, W] of T;
// positions u32 [tokens], of a token in its document; past [W − 1, width] of T, the rows before the first one, with null for
// positions, or null. partial f32 [ceil(tokens / 256), width · W] or null. Any width.
//
// Launch: grid (ceil(width / (32·N)), ceil(tokens / 256)), block (32, 8), dynamic shared memory 0; N = 8 for 16-bit T, 4 for f32.
//   causal_conv_fwd(x, w, positions|null, past|null, y, i32 tokens, width, ldx, ldp, ldy)
//   causal_conv_bwd(dy, x, w, positions, dx, partial|null, i32 tokens, width, lddy, ldx, lddx)
//
// Measured on an H200, bf16, 8,192 × 8,192, W = 4, 2026-11-30: fwd 154 µs (floor of the bytes at 4.25 TB/s: 63), bwd 320 (95), with
// partial 346. memcheck clean.

static const int N = Vec<T>::N;
static const int RUN = 32; // tokens of a thread

// 16-bit results hide what the approximate units lose.
DEVICE f32 sigmoid(f32 x) {
    if (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

struct Taps {
    f32 w[W][N];
    DEVICE Taps(const T* weight, int col, int width) {
#pragma unroll
        for (int e = 0; e < N; e++)
#pragma unroll
            for (int i = 0; i < W; i++) w[i][e] = col + e < width ? to_f32(weight[(long long)(col + e) * W + W - 1 - i]) : 0.0f;
    }
};

// The rows x[t], x[t − 1], …; zeros before the first.
struct Window {
    f32 x[W][N];
    DEVICE void read(int i, const T* from, int row, int ld, int col, int width) {
        if (row >= 0) unpack16<T>(load_part(at(from, row, ld, col), width - col), x[i]);
        else
#pragma unroll
            for (int e = 0; e < N; e++) x[i][e] = 0.0f;
    }
    DEVICE void shift() {
#pragma unroll
        for (int i = W - 1; i > 0; i--)
#pragma unroll
            for (int e = 0; e < N; e++) x[i][e] = x[i - 1][e];
    }
    // Zeroes the rows before the document's first, which no later token reads either.
    DEVICE void begin(int position) {
        if (position >= W - 1) return;
#pragma unroll
        for (int i = 1; i < W; i++)
            if (i > position)
#pragma unroll
                for (int e = 0; e < N; e++) x[i][e] = 0.0f;
    }
    DEVICE f32 sum(const Taps& taps, int e) const {
        f32 p = 0.0f;
#pragma unroll
        for (int i = 0; i < W; i++) p = fmaf(taps.w[i][e], x[i][e], p);
        return p;
    }
};

extern "C" __global__ void __launch_bounds__(256)
causal_conv_fwd(const T* x, const T* w, const u32* positions, const T* past, T* y, int tokens, int width, int ldx, int ldp,
                int ldy) {
    const int col = (blockIdx.x * 32 + threadIdx.x) * N, first = (blockIdx.y * 8 + threadIdx.y) * RUN;
    const int end = min(tokens, first + RUN);
    if (col >= width || first >= tokens) return;
    const Taps taps(w, col, width);
    Window window;
#pragma unroll
    for (int i = 0; i < W - 1; i++) {
        const int row = first - 1 - i;
        if (row < 0 && past) window.read(i, past, W - 1 + row, ldp, col, width);
        else window.read(i, x, row, ldx, col, width);
    }
#pragma unroll 4
    for (int t = first; t < end; t++) {
        window.shift();
        window.read(0, x, t, ldx, col, width);
        if (positions) window.begin((int)positions[t]);
        f32 out[N];
#pragma unroll
        for (int e = 0; e < N; e++) {
            const f32 p = window.sum(taps, e);
            out[e] = p * sigmoid(p);
        }
        store_part(at(y, t, ldy, col), width - col, pack16<T>(out));
    }
}

extern "C" __global__ void __launch_bounds__(256)
causal_conv_bwd(const T* dy, const T* x, const T* w, const u32* positions, T* dx, f32* partial, int tokens, int width, int lddy,
                int ldx, int lddx) {
    __shared__ f32 sums[8][32];
    const int col = (blockIdx.x * 32 + threadIdx.x) * N, first = (blockIdx.y * 8 + threadIdx.y) * RUN;
    const int end = min(tokens, first + RUN);
    f32 dw[W][N] = {};
    if (col < width && first < tokens) {
        const Taps taps(w, col, width);
        Window window;
        f32 grad[W][N] = {}; // of x[t], x[t − 1], …
#pragma unroll
        for (int i = 0; i < W - 1; i++) window.read(i, x, first - 1 - i, ldx, col, width);
        for (int t = first; t < end + W - 1; t++) {
#pragma unroll
            for (int i = W - 1; i > 0; i--)
#pragma unroll
                for (int e = 0; e < N; e++) grad[i][e] = grad[i - 1][e];
#pragma unroll
            for (int e = 0; e < N; e++) grad[0][e] = 0.0f;
            if (t < tokens) {
                window.shift();
                window.read(0, x, t, ldx, col, width);
                const int position = (int)positions[t];
                window.begin(position);
                f32 g[N];
                unpack16<T>(load_part(at(dy, t, lddy, col), width - col), g);
#pragma unroll
                for (int e = 0; e < N; e++) {
                    const f32 p = window.sum(taps, e), s = sigmoid(p);
                    const f32 dp = g[e] * s * (1.0f + p * (1.0f - s));
#pragma unroll
                    for (int i = 0; i < W; i++)
                        grad[i][e] = fmaf(i <= position ? taps.w[i][e] : 0.0f, dp, grad[i][e]);
                    if (partial && t < end)
#pragma unroll
                        for (int i = 0; i < W; i++) dw[i][e] = fmaf(dp, window.x[i][e], dw[i][e]);
                }
            }
            const int row = t - (W - 1);
            if (row >= first) store_part(at(dx, row, lddx, col), width - col, pack16<T>(grad[W - 1]));
        }
    }
    if (!partial) return;
#pragma unroll
    for (int i = 0; i < W; i++)
#pragma unroll
        for (int e = 0; e < N; e++) {
            __syncthreads();
            sums[threadIdx.y][threadIdx.x] = dw[i][e];
            __syncthreads();
            if (threadIdx.y == 0 && col + e < width) {
                f32 total = 0.0f;
                for (int r = 0; r < 8; r++) total += sums[r][threadIdx.x];
                partial[((u64)blockIdx.y * width + col + e) * W + W - 1 - i] = total;
            }
        }
}
