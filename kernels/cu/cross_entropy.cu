// Softmax cross-entropy of a chunk of logits; kernels/src/ops/linear_cross_entropy.
//
// For a row z with target t and weight w: x = z, or softcap·tanh(z / softcap) where SOFTCAP is defined;
// nll = log Σ exp x − x[t]; dlogits = w·(softmax(x) − onehot(t))·∂x/∂z, where ∂x/∂z = 1 or 1 − (x / softcap)².
// For target −100, nll and dlogits are 0 for any logits.
//
// Layout: logits [rows, vocab], row-major, row stride ldl in elements, f32; targets i32 [rows]; weights f32 [rows];
// nll f32 [rows]; statistics f32 [rows, 4]: x[t], max x, s = Σ exp(x − max), Σ exp(x − max)·(x − max), from which
// nll = log s + max − x[t] and the entropy of softmax(x) is log s − Σ exp(x − max)·(x − max) / s; dlogits of T, row
// stride ldd in elements of T. Pointers 16-byte aligned, ldl and ldd multiples of 8, any vocab. dlogits may be
//   - a buffer of its own;
//   - over the logits when T is f32: dlogits = logits, ldd = ldl;
//   - over f32 logits when T has 16 bits: in the second half of each row, dlogits = (T*)logits + ldl, ldd = 2·ldl.
//
// At most two passes over a row: the first keeps a maximum and sums of shifted exponentials a thread, the second, from
// the end of the row backwards, computes the gradient. cross_entropy_bwd takes the sums from `statistics` and has only
// the second; its gradients are those of cross_entropy_fwd_bwd bit for bit.
//
// Launch: grid (rows), block 512, dynamic shared memory 0; softcap is read only where SOFTCAP is defined
//   cross_entropy_fwd(logits, targets, nll, i32 vocab, ldl, f32 softcap)
//   cross_entropy_fwd_bwd(logits, targets, weights, nll, dlogits, i32 vocab, ldl, ldd, f32 softcap)
//   cross_entropy_statistics(logits, targets, statistics, i32 vocab, ldl, f32 softcap)
//   cross_entropy_bwd(logits, targets, weights, statistics, dlogits, i32 vocab, ldl, ldd, f32 softcap)
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches, and measured, 1024 × 151,936, T = bf16, in
// place, 2026-11-30, without and with SOFTCAP; the second reading is counted where L2 cannot have the row:
//   cross_entropy_fwd 622 MB → 146 µs: 165 and 178
//   cross_entropy_statistics 622 MB → 146 µs: 165 and 182
//   cross_entropy_fwd_bwd 1,556 MB → 366 µs: 381 and 395
//   cross_entropy_bwd 933 MB → 220 µs: 260 and 260
// Those of fwd_bwd and bwd are from before the weight of a row was read ahead of its passes.
// FLOPs: an exponential an element and pass, and a tanh with SOFTCAP. No spills from sm_80 to sm_90.
//
// Parity against f64 at 7 … 262,144 columns, in place: 16-bit gradients 1.00 times the error of the true gradient
// rounded to T; f32 losses within 2.5e-7 of the largest logit, f32 gradients within 2e-7 of their norm, entropies within
// 9e-7; memcheck and racecheck clean.
//
// Tried: the second pass forwards: 369 and 240 µs. Clusters of eight blocks a row, so that it finds its row in L2: 403
// and 323 µs, and 231 for the forward, since a row's blocks wait for each other. 1024 threads: 341 and 229, forward
// 158.

const int THREADS = 512;
const int BLOCKS = 2; // an SM
const int AHEAD = 4; // groups of eight columns that a thread fetches at once in the first pass
const int SLAB = 2;  // and in the second
const int IGNORED = -100;
const f32 LOWEST = -3.0e38f; // below every finite logit that matters; −∞ would make −∞ − −∞

// Eight columns as they come from memory.
template <typename L> struct Eight { uint4 raw[8 / Vec<L>::N]; };
template <typename L> DEVICE Eight<L> fetch8(const L* p) {
    Eight<L> e;
#pragma unroll
    for (int i = 0; i < 8 / Vec<L>::N; i++) e.raw[i] = reinterpret_cast<const uint4*>(p)[i];
    return e;
}
template <typename L> DEVICE Eight<L> fetch8(const L* p, int n) {
    Eight<L> e;
#pragma unroll
    for (int i = 0; i < 8 / Vec<L>::N; i++) e.raw[i] = load_part(p + i * Vec<L>::N, n - i * Vec<L>::N);
    return e;
}
template <typename L> DEVICE void values8(const Eight<L>& e, f32* v) {
    const int N = Vec<L>::N;
#pragma unroll
    for (int part = 0; part < 8 / N; part++) {
        f32 some[N];
        unpack16<L>(e.raw[part], some);
#pragma unroll
        for (int i = 0; i < N; i++) v[part * N + i] = some[i];
    }
}

// 16-bit gradients hide the |x − max|·2^-24 that the hardware's exponential loses; f32 takes the exact one.
DEVICE f32 exp_shifted(f32 x, f32 max) {
    if (sizeof(T) == 4) return expf(x - max);
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"((x - max) * 1.44269504f));
    return y;
}

#ifdef SOFTCAP
const bool CAPPED = true;
#else
const bool CAPPED = false;
#endif

// The cap on logits, and its reciprocal.
struct Cap { f32 c, inverse; };
DEVICE Cap cap_of(f32 softcap) { return {softcap, CAPPED ? 1.0f / softcap : 0.0f}; }

// z / c. Gradients of 16 bits hide the rounding of the reciprocal.
DEVICE f32 over(f32 z, Cap cap) { return sizeof(T) == 4 ? z / cap.c : z * cap.inverse; }

// tanh(z / c). As 1 − 2 / (e^2u + 1) it is within 2^-22 of its range of the truth; f32 takes the exact one.
DEVICE f32 tanh_over(f32 z, Cap cap) {
    const f32 u = over(z, cap);
    if (sizeof(T) == 4) return tanhf(u);
    f32 e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(u * (2.0f * 1.44269504f)));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(e + 1.0f));
    return 1.0f - 2.0f * r;
}
DEVICE f32 capped(f32 z, Cap cap) { return CAPPED ? cap.c * tanh_over(z, cap) : z; }

// Eight columns as f32 logits.
template <typename L> DEVICE void logits8(const Eight<L>& e, f32* v, Cap cap) {
    values8(e, v);
    if (CAPPED)
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = capped(v[i], cap);
}

// The largest value so far, Σ exp(x − max) and, for the entropy, Σ exp(x − max)·(x − max).
struct Sums { f32 max, sum, shifted; };

// The same sums about a maximum that is at least theirs.
template <bool ENTROPY> DEVICE Sums about(Sums s, f32 max) {
    const f32 e = exp_shifted(s.max, max);
    // Sums of nothing have the maximum LOWEST, and an infinite difference times 0 is not a number.
    const f32 shifted = ENTROPY ? (s.shifted + fmaxf(s.max - max, -1e30f) * s.sum) * e : 0.0f;
    return {max, s.sum * e, shifted};
}
template <bool ENTROPY> DEVICE Sums merge(Sums a, Sums b) {
    const f32 max = fmaxf(a.max, b.max);
    a = about<ENTROPY>(a, max);
    b = about<ENTROPY>(b, max);
    return {max, a.sum + b.sum, a.shifted + b.shifted};
}

template <bool ENTROPY, int COUNT> DEVICE Sums include(Sums sums, const f32 (&v)[COUNT]) {
    f32 max = sums.max;
#pragma unroll
    for (int i = 0; i < COUNT; i++) max = fmaxf(max, v[i]);
    sums = about<ENTROPY>(sums, max);
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        const f32 e = exp_shifted(v[i], max);
        sums.sum += e;
        // e is 0 below −104.
        if (ENTROPY) sums.shifted += e * fmaxf(v[i] - max, -104.0f);
    }
    return sums;
}

// The block's sums, in every thread, merged in one order.
template <bool ENTROPY> DEVICE Sums block_sums(Sums mine) {
    __shared__ f32 max[THREADS / 32], sum[THREADS / 32], shifted[THREADS / 32];
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const f32 other = ENTROPY ? __shfl_xor_sync(0xffffffffu, mine.shifted, o) : 0.0f;
        mine = merge<ENTROPY>(mine, {__shfl_xor_sync(0xffffffffu, mine.max, o),
                                     __shfl_xor_sync(0xffffffffu, mine.sum, o), other});
    }
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) {
        max[warp] = mine.max, sum[warp] = mine.sum;
        if (ENTROPY) shifted[warp] = mine.shifted;
    }
    __syncthreads();
    Sums all = {max[0], sum[0], ENTROPY ? shifted[0] : 0.0f};
    for (int w = 1; w < THREADS / 32; w++)
        all = merge<ENTROPY>(all, {max[w], sum[w], ENTROPY ? shifted[w] : 0.0f});
    return all;
}

const int STRIDE = THREADS * 8; // columns that the block takes together

// The first pass over a row.
template <bool ENTROPY, typename L> DEVICE Sums row_sums(const L* x, int vocab, Cap cap) {
    Sums sums = {LOWEST, 0.0f, 0.0f};
    int col = threadIdx.x * 8;
    for (; col + (AHEAD - 1) * STRIDE + 8 <= vocab; col += AHEAD * STRIDE) {
        Eight<L> raw[AHEAD];
        f32 v[AHEAD * 8];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) raw[k] = fetch8(x + col + k * STRIDE);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) logits8(raw[k], v + k * 8, cap);
        sums = include<ENTROPY>(sums, v);
    }
    for (; col < vocab; col += STRIDE) {
        f32 v[8];
        logits8(fetch8(x + col, vocab - col), v, cap);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = col + i < vocab ? v[i] : LOWEST;
        sums = include<ENTROPY>(sums, v);
    }
    return block_sums<ENTROPY>(sums);
}

// The second pass over a row, backwards: what was read last is still in L2. Where T is narrower than the logits, the
// gradient may lie in the second half of their row, and a slab has been read by all before any of it is written.
template <typename L>
DEVICE void row_gradient(const L* x, T* dx, int vocab, int target, f32 weight, f32 max, f32 sum, Cap cap) {
    const bool NARROWS = sizeof(L) != sizeof(T);
    const int mine = threadIdx.x * 8;
    const f32 factor = weight / sum;
    const int slabs = (vocab + SLAB * STRIDE - 1) / (SLAB * STRIDE);
    Eight<L> next[SLAB];
#pragma unroll
    for (int k = 0; k < SLAB; k++) {
        const int at_ = ((slabs - 1) * SLAB + k) * STRIDE + mine;
        next[k] = fetch8(x + at_, vocab - at_);
    }
    for (int slab = slabs - 1; slab >= 0; slab--) {
        const int first = slab * SLAB * STRIDE + mine;
        Eight<L> raw[SLAB];
#pragma unroll
        for (int k = 0; k < SLAB; k++) {
            raw[k] = next[k];
            if (slab > 0) next[k] = fetch8(x + first + (k - SLAB) * STRIDE);
        }
        if (NARROWS) __syncthreads();
#pragma unroll
        for (int k = 0; k < SLAB; k++) {
            const int col = first + k * STRIDE;
            f32 v[8];
            values8(raw[k], v);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                // The slope from tanh itself: near 1, a rounded c·tanh would not give 1 − tanh² back.
                const f32 tanh = CAPPED ? tanh_over(v[i], cap) : 0.0f;
                v[i] = exp_shifted(CAPPED ? cap.c * tanh : v[i], max) * factor;
                if (col + i == target) v[i] -= weight;
                if (CAPPED) v[i] *= 1.0f - tanh * tanh;
            }
#pragma unroll
            for (int part = 0; part < 8; part += Vec<T>::N) {
                f32 some[Vec<T>::N];
#pragma unroll
                for (int i = 0; i < Vec<T>::N; i++) some[i] = v[part + i];
                store_part(dx + col + part, vocab - col - part, pack16<T>(some));
            }
        }
    }
}

// The gradient of a row that is left out.
DEVICE void row_zeros(T* dx, int vocab) {
    for (int col = threadIdx.x * 8; col < vocab; col += STRIDE)
#pragma unroll
        for (int i = 0; i < 8; i += Vec<T>::N)
            store_part(dx + col + i, vocab - col - i, make_uint4(0, 0, 0, 0));
}

// The forward of a row, and its backward with GRADIENT.
template <bool GRADIENT>
DEVICE void cross_entropy(const f32* logits, const int* targets, const f32* weights, f32* nll, T* dlogits, int vocab,
                          int ldl, int ldd, f32 softcap) {
    const u32 row = blockIdx.x;
    const int target = targets[row];
    const Cap cap = cap_of(softcap);
    const f32* x = at(logits, row, ldl, 0);
    T* dx = GRADIENT ? at(dlogits, row, ldd, 0) : nullptr;
    if (target == IGNORED) {
        if (threadIdx.x == 0) nll[row] = 0.0f;
        if (GRADIENT) row_zeros(dx, vocab);
        return; // the whole block
    }
    const f32 logit = capped(x[target], cap);
    // Read before the first pass, whose memory traffic hides the latency.
    const f32 weight = GRADIENT ? weights[row] : 0.0f;
    const Sums sums = row_sums<false>(x, vocab, cap);
    if (threadIdx.x == 0) nll[row] = logf(sums.sum) + sums.max - logit;
    if (GRADIENT) row_gradient(x, dx, vocab, target, weight, sums.max, sums.sum, cap);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
cross_entropy_fwd(const f32* logits, const int* targets, f32* nll, int vocab, int ldl, f32 softcap) {
    cross_entropy<false>(logits, targets, nullptr, nll, nullptr, vocab, ldl, 0, softcap);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
cross_entropy_fwd_bwd(const f32* logits, const int* targets, const f32* weights, f32* nll, T* dlogits, int vocab,
                      int ldl, int ldd, f32 softcap) {
    cross_entropy<true>(logits, targets, weights, nll, dlogits, vocab, ldl, ldd, softcap);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
cross_entropy_statistics(const f32* logits, const int* targets, float4* statistics, int vocab, int ldl, f32 softcap) {
    const u32 row = blockIdx.x;
    const int target = targets[row];
    const Cap cap = cap_of(softcap);
    const f32* x = at(logits, row, ldl, 0);
    float4 result = make_float4(0.0f, 0.0f, 1.0f, 0.0f);
    if (target != IGNORED) {
        const f32 logit = capped(x[target], cap);
        const Sums sums = row_sums<true>(x, vocab, cap);
        result = make_float4(logit, sums.max, sums.sum, sums.shifted);
    }
    if (threadIdx.x == 0) statistics[row] = result;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
cross_entropy_bwd(const f32* logits, const int* targets, const f32* weights, const float4* statistics, T* dlogits,
                  int vocab, int ldl, int ldd, f32 softcap) {
    const u32 row = blockIdx.x;
    const int target = targets[row];
    const float4 known = statistics[row];
    const f32 weight = weights[row];
    T* dx = at(dlogits, row, ldd, 0);
    if (target == IGNORED) return row_zeros(dx, vocab); // the whole block
    row_gradient(at(logits, row, ldl, 0), dx, vocab, target, weight, known.y, known.z, cap_of(softcap));
}
