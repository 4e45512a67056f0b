// Gated activations; kernels/src/ops/gated_activation.
//
// act = g·σ(z(g)) ∘ u. ACTIVATION says what z, g and u are:
//   SILU            z = g; g, u = gate, up
//   GELU_TANH       z = 2·√(2/π)·(g + 0.044715·g³), which is PyTorch's gelu(approximate="tanh"); g, u = gate, up
//   CLAMPED_SWIGLU  z = alpha·g; g = min(gate, limit), u = clamp(up, ±limit) + 1
// Backward: dup = dact ∘ g·σ(z); dgate = dact ∘ u ∘ σ(z)·(1 + g·z'·(1 − σ(z))); 0 for what is clamped.
//
// Layout: matrices [rows, width] of T, row-major, each with its row stride in elements (gate and up may be column
// slices of one buffer). Pointers 16-byte aligned, strides multiples of 8, any width, fewer than 2^32 vectors of 16
// bytes. Every output may be the same matrix as any input of the same stride: a thread reads its elements before it
// writes.
//
// Launch: grid (ceil(rows·ceil(width / N) / 256)), block (256), dynamic shared memory 0; N = 8 for 16-bit T, 4 for f32.
//   gated_activation_fwd(gate, up, act, i32 rows, width, ldg, ldu, lda, f32 alpha, limit)
//   gated_activation_bwd(dact, gate, up, dgate, dup, act|null, i32 rows, width, ldda, ldg, ldu, lddg, lddu, lda,
//                        f32 alpha, limit)
//     act: the forward's result again, for the gradient of down_proj's adapter. Only CLAMPED_SWIGLU reads alpha and limit.
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches, and measured, bf16 8192 × 9728, gate and up
// slices of one buffer, in place, SILU, 2026-11-23:
//   fwd 478 MB → 112.5 µs: 110.8, 102 %
//   bwd 797 MB → 187.5: 186.0, 101 %; with act 956 MB → 225.0: 229.2, 98 %
// FLOPs: one exponential and one reciprocal an element. No spills from sm_80 to sm_120.
//
// Parity against f64, error at most twice that of the same steps rounded to T; tails, all outputs over inputs;
// memcheck and racecheck clean.
//
// Tried: two and four vectors a thread instead of one: 1–2 % slower.

extern "C" __global__ void __launch_bounds__(256)
gated_activation_fwd(const T* gate, const T* up, T* act, int rows, int width, int ldg, int ldu, int lda, f32 alpha,
                     f32 limit) {
    begin_early();
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    const Place p = place<N>(i, width);
    if (p.row >= (u32)rows) return;
    f32 g[N], u[N];
    const uint4 raw_g = load_part(at(gate, p.row, ldg, p.col), p.n), raw_u = load_part(at(up, p.row, ldu, p.col), p.n);
    unpack16<T>(raw_g, g);
    unpack16<T>(raw_u, u);
#pragma unroll
    for (int e = 0; e < N; e++) {
        const Gate v = gated(g[e], alpha, limit);
        g[e] = v.g * v.s * clamped_up(u[e], limit);
    }
    store_part(at(act, p.row, lda, p.col), p.n, pack16<T>(g));
}

extern "C" __global__ void __launch_bounds__(256)
gated_activation_bwd(const T* dact, const T* gate, const T* up, T* dgate, T* dup, T* act, int rows, int width, int ldda,
                     int ldg, int ldu, int lddg, int lddu, int lda, f32 alpha, f32 limit) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    const Place p = place<N>(i, width);
    if (p.row >= (u32)rows) return;
    const uint4 raw_d = load_part(at(dact, p.row, ldda, p.col), p.n);
    const uint4 raw_g = load_part(at(gate, p.row, ldg, p.col), p.n), raw_u = load_part(at(up, p.row, ldu, p.col), p.n);
    f32 d[N], g[N], u[N], out[N];
    unpack16<T>(raw_d, d);
    unpack16<T>(raw_g, g);
    unpack16<T>(raw_u, u);
#pragma unroll
    for (int e = 0; e < N; e++) {
        const GateGrads grads = gate_grads(d[e], g[e], u[e], alpha, limit);
        out[e] = grads.act;
        g[e] = grads.gate;
        d[e] = grads.up;
    }
    store_part(at(dgate, p.row, lddg, p.col), p.n, pack16<T>(g));
    store_part(at(dup, p.row, lddu, p.col), p.n, pack16<T>(d));
    if (act) store_part(at(act, p.row, lda, p.col), p.n, pack16<T>(out));
}
