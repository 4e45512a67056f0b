// Softmax cross-entropy of a chunk of logits; kernels/src/ops/linear_cross_entropy.
//
// For a row x with target t: nll = log Σ exp x − x[t]; dlogits = grad_scale·(softmax(x) − onehot(t)).
// For target −100, nll and dlogits are 0 for any logits.
//
// Layout: logits [rows, vocab], row-major, row stride ldl in elements, f32; targets i32 [rows]; grad_scale f32 in
// device memory; nll f32 [rows]; dlogits of T, row stride ldd in elements of T. Pointers 16-byte aligned, ldl and ldd
// multiples of 8, any vocab. dlogits may be
//   - a buffer of its own;
//   - over the logits when T is f32: dlogits = logits, ldd = ldl;
//   - over f32 logits when T has 16 bits: in the second half of each row, dlogits = (T*)logits + ldl, ldd = 2·ldl.
//
// Two passes over a row: the first keeps a maximum and a sum of shifted exponentials a thread, the second, from the end
// of the row backwards, computes the gradient.
//
// Launch: grid (rows), block 512, dynamic shared memory 0
//   cross_entropy_fwd(logits, targets, nll, i32 vocab, ldl)
//   cross_entropy_fwd_bwd(logits, targets, grad_scale, nll, dlogits, i32 vocab, ldl, ldd)
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches, and measured, 1024 × 151,936, T = bf16,
// 2026-11-23; the second reading is counted:
//   cross_entropy_fwd 622 MB → 146 µs: 143, 102 %
//   cross_entropy_fwd_bwd 1,556 MB → 366 µs: 354 in place, 103 %
// FLOPs: two exponentials an element. No spills from sm_80 to sm_120.
//
// Parity against f64 at 7 … 151,936 columns, in place and not: 16-bit gradients within twice the error of the same
// steps rounded to T; f32 losses within 5e-7, f32 gradients within 4e-7 of their norm (up to 5 times the error of f32
// sums by halves); memcheck and racecheck clean.
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

// The largest value so far and Σ exp(x − max).
struct Sums { f32 max, sum; };
DEVICE Sums merge(Sums a, Sums b) {
    const f32 max = fmaxf(a.max, b.max);
    return {max, a.sum * exp_shifted(a.max, max) + b.sum * exp_shifted(b.max, max)};
}

template <int COUNT> DEVICE Sums include(Sums sums, const f32 (&v)[COUNT]) {
    f32 max = sums.max;
#pragma unroll
    for (int i = 0; i < COUNT; i++) max = fmaxf(max, v[i]);
    f32 sum = sums.sum * exp_shifted(sums.max, max);
#pragma unroll
    for (int i = 0; i < COUNT; i++) sum += exp_shifted(v[i], max);
    return {max, sum};
}

// The row's sums, in every thread, merged in one order.
DEVICE Sums row_sums(Sums mine) {
    __shared__ f32 max[THREADS / 32], sum[THREADS / 32];
#pragma unroll
    for (int o = 16; o > 0; o >>= 1)
        mine = merge(mine, {__shfl_xor_sync(0xffffffffu, mine.max, o), __shfl_xor_sync(0xffffffffu, mine.sum, o)});
    if (threadIdx.x % 32 == 0) max[threadIdx.x / 32] = mine.max, sum[threadIdx.x / 32] = mine.sum;
    __syncthreads();
    Sums all = {max[0], sum[0]};
    for (int w = 1; w < THREADS / 32; w++) all = merge(all, {max[w], sum[w]});
    return all;
}

template <typename L, bool GRADIENT>
DEVICE void cross_entropy(const L* logits, const int* targets, const f32* grad_scale, f32* nll, T* dlogits, int vocab,
                          int ldl, int ldd) {
    const int STRIDE = THREADS * 8; // columns that the block takes together
    const u32 row = blockIdx.x;
    const int mine = threadIdx.x * 8;
    const int target = targets[row];
    const L* x = at(logits, row, ldl, 0);
    T* dx = GRADIENT ? at(dlogits, row, ldd, 0) : nullptr;
    if (target == IGNORED) {
        if (mine == 0) nll[row] = 0.0f;
        if (GRADIENT)
            for (int col = mine; col < vocab; col += STRIDE)
#pragma unroll
                for (int i = 0; i < 8; i += Vec<T>::N)
                    store_part(dx + col + i, vocab - col - i, make_uint4(0, 0, 0, 0));
        return; // the whole block
    }
    const f32 logit = to_f32(x[target]);
    Sums sums = {LOWEST, 0.0f};
    int col = mine;
    for (; col + (AHEAD - 1) * STRIDE + 8 <= vocab; col += AHEAD * STRIDE) {
        Eight<L> raw[AHEAD];
        f32 v[AHEAD * 8];
#pragma unroll
        for (int k = 0; k < AHEAD; k++) raw[k] = fetch8(x + col + k * STRIDE);
#pragma unroll
        for (int k = 0; k < AHEAD; k++) values8(raw[k], v + k * 8);
        sums = include(sums, v);
    }
    for (; col < vocab; col += STRIDE) {
        f32 v[8];
        values8(fetch8(x + col, vocab - col), v);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = col + i < vocab ? v[i] : LOWEST;
        sums = include(sums, v);
    }
    sums = row_sums(sums);
    if (mine == 0) nll[row] = logf(sums.sum) + sums.max - logit;
    if (GRADIENT) {
        // Backwards: what was read last is still in L2. Where T is narrower than the logits, it may lie in the second
        // half of their row, and a slab has been read by all before any of it is written.
        const bool NARROWS = sizeof(L) != sizeof(T);
        const f32 scale = *grad_scale, factor = scale / sums.sum;
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
                    v[i] = exp_shifted(v[i], sums.max) * factor;
                    if (col + i == target) v[i] -= scale;
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
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
cross_entropy_fwd(const f32* logits, const int* targets, f32* nll, int vocab, int ldl) {
    cross_entropy<f32, false>(logits, targets, nullptr, nll, nullptr, vocab, ldl, 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
cross_entropy_fwd_bwd(const f32* logits, const int* targets, const f32* grad_scale, f32* nll, T* dlogits, int vocab,
                      int ldl, int ldd) {
    cross_entropy<f32, true>(logits, targets, grad_scale, nll, dlogits, vocab, ldl, ldd);
}
