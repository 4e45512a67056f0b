// SwiGLU of an expert's rows times the router's weight; kernels/src/ops/expert_act.
//
// act = w ∘ silu(gate) ∘ up, w one factor a row: weights[sorted[row]]. Backward, s = σ(gate):
//   dgate = dact ∘ w ∘ up ∘ s·(1 + gate·(1 − s)); dup = dact ∘ w ∘ silu(gate); dweights[sorted[row]] = Σ dact ∘ silu(gate) ∘ up
//
// The clamped form of gpt-oss: g = min(gate + b, limit), u = clamp(up + b, -limit, limit), s = σ(alpha·g); act = w ∘ g·s ∘ (u + 1).
//   dgate = dact ∘ w ∘ (u + 1) ∘ s·(1 + alpha·g·(1 − s)), dup = dact ∘ w ∘ g·s, 0 where the clamp changed the value.
//   Gate and up alternate in a row; b is the bias of the row's expert, found in its first rows `offsets` [experts + 1].
//
// Layout: gate_up [rows, 2·width] of T, a row's gates before its ups; act and dact [rows, width]; row strides in elements. Pointers
// 16-byte aligned, strides multiples of 8, any width. dgate_up may be gate_up and act may be dact: a thread
// reads its elements before it writes.
//
// Launch
//   expert_act_fwd(gate_up, const f32* weights, const i32* sorted, act, i32 rows, width, ldg, lda)
//     grid ceil(rows·ceil(width / N) / 256), block 256; N = 8 for 16-bit T, 4 for f32
//   expert_act_bwd(dact, gate_up, const f32* weights, const i32* sorted, dgate_up, act, f32* dweights, i32 rows, width, ldda, ldg, lddg, lda)
//     grid ceil(rows / 8), block 256: a warp a row
//
//   expert_clamped_fwd(gate_up, bias, const f32* weights, const i32* sorted, const i32* offsets, act, i32 rows, width, experts,
//                      f32 alpha, limit, i32 ldg, ldb, lda)      as expert_act_fwd; bias [experts, 2·width] of T
//   expert_clamped_bwd(dact, gate_up, bias, weights, sorted, offsets, dgate_up, act, dweights, i32 rows, width, experts,
//                      f32 alpha, limit, i32 ldda, ldg, ldb, lddg, lda)      as expert_act_bwd
//
// Bytes -> floor at 4.25 TB/s, and measured with a launch from Python (about 15 us), NVIDIA H200, 2026-11-30, bf16, 65,536 rows x 768:
// forward 302 MB -> 71 us: 89; backward 604 MB -> 142 us: 168. No spills from sm_80 to sm_120.
// Tests: kernels/tests/cuda.rs against f64; tails, outputs over inputs.

const int N = Vec<T>::N;

// 16-bit results hide what the approximate units lose (2^-22); f32 takes the exact functions.
DEVICE f32 sigmoid(f32 x) {
    if (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// load_part and store_part where rows may be shifted: ups begin `width` elements after gates.
DEVICE uint4 load_shifted(const T* p, int n) {
    if ((u64)p % 16 == 0) return load_part(p, n);
    uint4 raw = make_uint4(0, 0, 0, 0);
    T* e = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < n) e[i] = p[i];
    return raw;
}
DEVICE void store_shifted(T* p, int n, const uint4& raw) {
    if ((u64)p % 16 == 0) {
        store_part(p, n, raw);
        return;
    }
    const T* e = reinterpret_cast<const T*>(&raw);
#pragma unroll
    for (int i = 0; i < N; i++)
        if (i < n) p[i] = e[i];
}

extern "C" __global__ void __launch_bounds__(256)
expert_act_fwd(const T* gate_up, const f32* weights, const int* sorted, T* act, int rows, int width, int ldg, int lda) {
    const Place p = place<N>(blockIdx.x * 256 + threadIdx.x, width);
    if (p.row >= (u32)rows) return;
    const f32 w = weights[sorted[p.row]];
    const T* from = at(gate_up, p.row, ldg, p.col);
    f32 g[N], u[N];
    unpack16<T>(load_part(from, p.n), g);
    unpack16<T>(load_shifted(from + width, p.n), u);
#pragma unroll
    for (int e = 0; e < N; e++) g[e] = w * (g[e] * sigmoid(g[e]) * u[e]);
    store_part(at(act, p.row, lda, p.col), p.n, pack16<T>(g));
}

extern "C" __global__ void __launch_bounds__(256)
expert_act_bwd(const T* dact, const T* gate_up, const f32* weights, const int* sorted, T* dgate_up, T* act, f32* dweights, int rows,
               int width, int ldda, int ldg, int lddg, int lda) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    const int selection = sorted[row];
    const f32 w = weights[selection];
    f32 sum = 0.0f;
    for (int col = threadIdx.x % 32 * N; col < width; col += 32 * N) {
        f32 d[N], g[N], u[N], out[N];
        const int n = min(N, width - col);
        unpack16<T>(load_part(at(dact, row, ldda, col), n), d);
        unpack16<T>(load_part(at(gate_up, row, ldg, col), n), g);
        unpack16<T>(load_shifted(at(gate_up, row, ldg, col + width), n), u);
#pragma unroll
        for (int e = 0; e < N; e++) {
            const f32 s = sigmoid(g[e]), silu = g[e] * s, y = silu * u[e];
            sum = fmaf(d[e], y, sum);
            out[e] = w * y;
            const f32 dy = d[e] * w;
            g[e] = dy * u[e] * s * (1.0f + g[e] * (1.0f - s));
            u[e] = dy * silu;
        }
        store_part(at(dgate_up, row, lddg, col), n, pack16<T>(g));
        store_shifted(at(dgate_up, row, lddg, col + width), n, pack16<T>(u));
        store_part(at(act, row, lda, col), n, pack16<T>(out));
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) dweights[selection] = sum;
}

// The largest expert whose first row is not after this one: those without rows begin where the next one does.
DEVICE int expert_of(const int* offsets, int row, int experts) {
    int low = 0, high = experts;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (offsets[middle] <= row) low = middle;
        else high = middle;
    }
    return low;
}

// A gate and an up after bias and clamp; comparisons that keep a NaN.
struct Clamped {
    f32 g, u, sig;
    bool gate_kept, up_kept;
};
DEVICE Clamped clamped(f32 gate, f32 up, f32 alpha, f32 limit) {
    Clamped c;
    c.gate_kept = gate <= limit;
    c.up_kept = up <= limit && up >= -limit;
    c.g = gate > limit ? limit : gate;
    c.u = up > limit ? limit : up < -limit ? -limit : up;
    c.sig = sigmoid(alpha * c.g);
    return c;
}

// N pairs of gate and up with their bias; the last `n` of a row may be fewer.
DEVICE void load_pairs(f32 (&x)[2 * N], const T* from, const T* bias, int n) {
#pragma unroll
    for (int half = 0; half < 2; half++) {
        const int m = min(N, 2 * n - half * N);
        f32 v[N], b[N];
        if (m > 0) {
            unpack16<T>(load_part(from + half * N, m), v);
            unpack16<T>(load_part(bias + half * N, m), b);
        }
#pragma unroll
        for (int e = 0; e < N; e++) x[half * N + e] = e < m ? v[e] + b[e] : 0.0f;
    }
}

extern "C" __global__ void __launch_bounds__(256)
expert_clamped_fwd(const T* gate_up, const T* bias, const f32* weights, const int* sorted, const int* offsets, T* act, int rows,
                   int width, int experts, f32 alpha, f32 limit, int ldg, int ldb, int lda) {
    const Place p = place<N>(blockIdx.x * 256 + threadIdx.x, width);
    if (p.row >= (u32)rows) return;
    const f32 w = weights[sorted[p.row]];
    const int expert = expert_of(offsets, p.row, experts);
    f32 x[2 * N], y[N];
    load_pairs(x, at(gate_up, p.row, ldg, 2 * p.col), at(bias, expert, ldb, 2 * p.col), p.n);
#pragma unroll
    for (int e = 0; e < N; e++) {
        const Clamped c = clamped(x[2 * e], x[2 * e + 1], alpha, limit);
        y[e] = w * (c.g * c.sig * (c.u + 1.0f));
    }
    store_part(at(act, p.row, lda, p.col), p.n, pack16<T>(y));
}

extern "C" __global__ void __launch_bounds__(256)
expert_clamped_bwd(const T* dact, const T* gate_up, const T* bias, const f32* weights, const int* sorted, const int* offsets,
                   T* dgate_up, T* act, f32* dweights, int rows, int width, int experts, f32 alpha, f32 limit, int ldda, int ldg,
                   int ldb, int lddg, int lda) {
    const int row = blockIdx.x * 8 + threadIdx.x / 32;
    if (row >= rows) return;
    const int selection = sorted[row];
    const f32 w = weights[selection];
    const int expert = expert_of(offsets, row, experts);
    f32 sum = 0.0f;
    for (int col = threadIdx.x % 32 * N; col < width; col += 32 * N) {
        const int n = min(N, width - col);
        f32 d[N], x[2 * N], out[N];
        unpack16<T>(load_part(at(dact, row, ldda, col), n), d);
        load_pairs(x, at(gate_up, row, ldg, 2 * col), at(bias, expert, ldb, 2 * col), n);
#pragma unroll
        for (int e = 0; e < N; e++) {
            const Clamped c = clamped(x[2 * e], x[2 * e + 1], alpha, limit);
            const f32 glu = c.g * c.sig, y = glu * (c.u + 1.0f), dy = d[e] * w;
            sum = fmaf(d[e], y, sum);
            out[e] = w * y;
            x[2 * e] = c.gate_kept ? dy * (c.u + 1.0f) * c.sig * (1.0f + alpha * c.g * (1.0f - c.sig)) : 0.0f;
            x[2 * e + 1] = c.up_kept ? dy * glu : 0.0f;
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            f32 v[N];
#pragma unroll
            for (int e = 0; e < N; e++) v[e] = x[half * N + e];
            const int m = min(N, 2 * n - half * N);
            if (m > 0) store_part(at(dgate_up, row, lddg, 2 * col + half * N), m, pack16<T>(v));
        }
        store_part(at(act, row, lda, col), n, pack16<T>(out));
    }
    sum = warp_sum(sum);
    if (threadIdx.x % 32 == 0) dweights[selection] = sum;
}
