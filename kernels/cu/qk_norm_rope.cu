// Per-head RMSNorm (if weights are given) and rotary embedding of q and k in one launch; kernels/src/ops/rope.
//
// For a head x of a token at position p: n = g ∘ (x·rstd), rstd = 1/√(mean(x²) + eps); with c, s = cos[p], sin[p] and
// the first rotary_dim channels split in a, b: a' = a·c − b·s, b' = b·c + a·s; channels from rotary_dim on pass.
// Rounded to T once, at the end. Backward: dn rotated by the negative angle, then dx = rstd·(ĝ − x·rstd²·mean(ĝ ∘ x)),
// ĝ = g ∘ dn; dw = Σ dn ∘ x·rstd over tokens and heads.
// GAIN is PLAIN (g = w) or ONE_PLUS (g = 1 + w); PAIRS is HALVES (a, b are the halves) or INTERLEAVED (the even and the
// odd channels).
//
// Layout: q [tokens, q_heads·head_dim], k [tokens, k_heads·head_dim] of T, row-major, each with its row stride in
// elements (column slices of one wide buffer, say); cos, sin [max_pos, rotary_dim / 2] f32, contiguous; positions
// [tokens] u32; w [head_dim] of T; rstd [tokens, heads] f32, contiguous. Pointers 16-byte aligned, strides multiples
// of 8. Outputs may be the same matrices as any inputs of the same stride.
//
// The norm is applied if its weight is given. With wq, wk null there is only rotation, and rstd (and x in the backward)
// is not accessed. k_heads may be 0. With rotary_dim 0 there is only the norm, and cos, sin and positions are not accessed.
//
// Launch (dynamic shared memory 0)
//   qk_norm_rope_fwd*(q, k, wq|null, wk|null, cos, sin, positions, q_out, k_out, rstd_q|null, rstd_k|null,
//     i32 tokens, q_heads, k_heads, head_dim, rotary_dim, ldq, ldk, ldqo, ldko, f32 eps)
//   qk_norm_rope_bwd*(dq, dk, q|null, k|null, wq|null, wk|null, rstd_q|null, rstd_k|null, cos, sin, positions, dq_out,
//     dk_out, i32 tokens, q_heads, k_heads, head_dim, rotary_dim, lddq, lddk, ldq, ldk, lddqo, lddko)
//   qk_norm_rope_dw*(dq, dk, q, k, rstd_q, rstd_k, cos, sin, positions, partial_q, partial_k, i32 tokens, q_heads,
//     k_heads, head_dim, rotary_dim, lddq, lddk, ldq, ldk, chunk): before a backward in place; dq, dk are the incoming
//     gradients, not yet rotated. partial_q, partial_k f32 [ceil(tokens / chunk), head_dim], added to dw by
//     `sum_partials` of reduce.cu. chunk: 32 fills the card at 8192 tokens.
// `*` is _64, _128 or _256 when head_dim = rotary_dim = that number; otherwise `*` is empty: head_dim and rotary_dim
// even, at most 256. heads = q_heads + k_heads.
//   fwd, bwd: block 256, grid (ceil(tokens / 8), ceil(heads / 16)); without suffix grid ceil(tokens·heads / 8)
//   dw:       block 256, grid (ceil(tokens / chunk), 2); y = 0 is q, 1 is k
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches, and measured, bf16 8192 tokens, 32 + 8 heads of
// 128, slices of a buffer of 48, 2026-11-23:
//   qk_norm_rope_fwd_128 168 MB → 39.5 µs: 46.1, 86 %; rotation alone 45.5, 87 %
//   qk_norm_rope_bwd_128, in place, 252 MB → 59.2: 65.2, 91 %
//   qk_norm_rope_dw_128 168 MB → 39.5: 52.5, 75 %
// FLOPs, about 10 per element, are negligible. No spills from sm_80 to sm_120.
//
// Parity against f64, error at most twice that of the same steps rounded to T: head_dim 10 to 256, part of a head
// rotated, with and without norms, in place and not, column slices; memcheck and racecheck clean.
//
// Tried: a thread for two heads of a token, each looking its angles up: 59.2 and 87.6 µs. Four heads at once in the
// forward: 57.4; two in the backward: 78.3; five blocks an SM, which spill: 54.3 and 94.0.

enum Gain { PLAIN, ONE_PLUS };
enum Pairs { HALVES, INTERLEAVED };

const int N = Vec<T>::N;
const int AHEAD = 2;     // heads that a lane fetches at once in the forward;
const int AHEAD_BWD = 1; // in the backward, which reads twice as much a head
const int BLOCKS = __CUDA_ARCH__ == 900 ? 4 : 3; // an SM; four spill elsewhere

DEVICE f32 gain(f32 w) { return GAIN == ONE_PLUS ? 1.0f + w : w; }

// One head of a token; not live past the end.
struct Head { u32 token; int index; bool is_q, live; };
DEVICE Head head_at(u32 token, int head, int end, int q_heads) {
    const bool is_q = head < q_heads;
    return {token, is_q ? head : head - q_heads, is_q, head < end};
}

template <int LANES> DEVICE f32 lanes_sum(f32 x) {
#pragma unroll
    for (int o = LANES / 2; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

// N values of a table, 16 bytes at a time.
DEVICE void load_angles(const f32* p, f32 (&out)[N]) {
#pragma unroll
    for (int j = 0; j < N; j += 4) {
        const float4 v = *reinterpret_cast<const float4*>(p + j);
        out[j] = v.x, out[j + 1] = v.y, out[j + 2] = v.z, out[j + 3] = v.w;
    }
}

// Where a lane finds its N pairs of channels: 16 bytes at `first`, and as many SECOND channels later.
template <int DIM> struct Lane {
    static const int SECOND = PAIRS == INTERLEAVED ? N : DIM / 2;
    DEVICE static int first(int pair) { return PAIRS == INTERLEAVED ? 2 * pair : pair; }
};

// A warp's work: LANES lanes a head, each with N pairs of channels from pair `col` on, some of the heads of one token.
template <int DIM> struct Warp {
    static const int HALF = DIM / 2, LANES = HALF / N, HEADS = 32 / LANES, SECOND = Lane<DIM>::SECOND;
    u32 token;
    int col, channel, lane_head, begin, end;
    DEVICE Warp(int heads) {
        token = blockIdx.x * 8 + threadIdx.x / 32;
        col = threadIdx.x % LANES * N;
        channel = Lane<DIM>::first(col);
        lane_head = threadIdx.x % 32 / LANES;
        const int some = (heads + gridDim.y - 1) / gridDim.y, share = (some + HEADS - 1) / HEADS * HEADS;
        begin = blockIdx.y * share;
        end = min(heads, begin + share);
    }
};

// The pairs of one head in a lane, in memory order.
struct Raw { uint4 lo, hi; };
DEVICE Raw fetch(const T* p, int second, bool live) {
    const uint4 zero = make_uint4(0, 0, 0, 0);
    if (!live) return {zero, zero};
    return {*reinterpret_cast<const uint4*>(p), *reinterpret_cast<const uint4*>(p + second)};
}

// The members a and b of N pairs, and back.
DEVICE void split(const Raw& raw, f32 (&a)[N], f32 (&b)[N]) {
    unpack16<T>(raw.lo, a);
    unpack16<T>(raw.hi, b);
    if (PAIRS == INTERLEAVED) {
        f32 both[2 * N];
#pragma unroll
        for (int i = 0; i < N; i++) both[i] = a[i], both[N + i] = b[i];
#pragma unroll
        for (int i = 0; i < N; i++) a[i] = both[2 * i], b[i] = both[2 * i + 1];
    }
}
DEVICE void join(T* p, int second, const f32 (&a)[N], const f32 (&b)[N]) {
    if constexpr (PAIRS == HALVES) {
        store16(p, a);
        store16(p + second, b);
    } else {
        f32 lo[N], hi[N];
#pragma unroll
        for (int i = 0; i < N / 2; i++) {
            lo[2 * i] = a[i], lo[2 * i + 1] = b[i];
            hi[2 * i] = a[N / 2 + i], hi[2 * i + 1] = b[N / 2 + i];
        }
        store16(p, lo);
        store16(p + second, hi);
    }
}

template <int DIM>
DEVICE void forward(const T* q, const T* k, const T* wq, const T* wk, const f32* cos, const f32* sin,
                    const u32* positions, T* q_out, T* k_out, f32* rstd_q, f32* rstd_k, int tokens, int q_heads,
                    int k_heads, int ldq, int ldk, int ldqo, int ldko, f32 eps) {
    begin_early();
    const Warp<DIM> warp(q_heads + k_heads);
    const int HALF = Warp<DIM>::HALF, HEADS = Warp<DIM>::HEADS, SECOND = Warp<DIM>::SECOND;
    const int col = warp.col, channel = warp.channel;
    if (warp.token >= (u32)tokens) return;
    f32 c[N], s[N];
    const u64 angle = (u64)positions[warp.token] * HALF + col;
    load_angles(cos + angle, c);
    load_angles(sin + angle, s);
    for (int first = warp.begin + warp.lane_head; first - warp.lane_head < warp.end; first += AHEAD * HEADS) {
        Raw raw[AHEAD];
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const Head h = head_at(warp.token, first + j * HEADS, warp.end, q_heads);
            raw[j] = fetch(at(h.is_q ? q : k, h.token, h.is_q ? ldq : ldk, h.index * DIM + channel), SECOND, h.live);
        }
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const Head h = head_at(warp.token, first + j * HEADS, warp.end, q_heads);
            const T* w = h.is_q ? wq : wk;
            f32 a[N], b[N], ya[N], yb[N];
            split(raw[j], a, b);
            if (wq || wk) {
                const Raw weight = fetch(w + channel, SECOND, h.live && w);
                f32 sum = 0.0f;
#pragma unroll
                for (int i = 0; i < N; i++) sum = fmaf(a[i], a[i], fmaf(b[i], b[i], sum));
                const f32 r = rsqrtf(lanes_sum<Warp<DIM>::LANES>(sum) / (f32)DIM + eps);
                if (h.live && w) {
                    if (col == 0) (h.is_q ? rstd_q : rstd_k)[(u64)h.token * (h.is_q ? q_heads : k_heads) + h.index] = r;
                    split(weight, ya, yb);
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        a[i] *= r * gain(ya[i]);
                        b[i] *= r * gain(yb[i]);
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < N; i++) {
                ya[i] = a[i] * c[i] - b[i] * s[i];
                yb[i] = b[i] * c[i] + a[i] * s[i];
            }
            T* y = at(h.is_q ? q_out : k_out, h.token, h.is_q ? ldqo : ldko, h.index * DIM + channel);
            if (h.live) join(y, SECOND, ya, yb);
        }
    }
}

template <int DIM>
DEVICE void backward(const T* dq, const T* dk, const T* q, const T* k, const T* wq, const T* wk, const f32* rstd_q,
                     const f32* rstd_k, const f32* cos, const f32* sin, const u32* positions, T* dq_out, T* dk_out,
                     int tokens, int q_heads, int k_heads, int lddq, int lddk, int ldq, int ldk, int lddqo, int lddko) {
    const Warp<DIM> warp(q_heads + k_heads);
    const int HALF = Warp<DIM>::HALF, HEADS = Warp<DIM>::HEADS, SECOND = Warp<DIM>::SECOND;
    const int col = warp.col, channel = warp.channel;
    if (warp.token >= (u32)tokens) return;
    f32 c[N], s[N];
    const u64 angle = (u64)positions[warp.token] * HALF + col;
    load_angles(cos + angle, c);
    load_angles(sin + angle, s);
    for (int first = warp.begin + warp.lane_head; first - warp.lane_head < warp.end; first += AHEAD_BWD * HEADS) {
        Raw raw_d[AHEAD_BWD], raw_x[AHEAD_BWD];
        f32 rstd[AHEAD_BWD];
#pragma unroll
        for (int j = 0; j < AHEAD_BWD; j++) {
            const Head h = head_at(warp.token, first + j * HEADS, warp.end, q_heads);
            const bool normed = h.live && (h.is_q ? wq : wk);
            raw_d[j] = fetch(at(h.is_q ? dq : dk, h.token, h.is_q ? lddq : lddk, h.index * DIM + channel), SECOND, h.live);
            raw_x[j] = fetch(at(h.is_q ? q : k, h.token, h.is_q ? ldq : ldk, h.index * DIM + channel), SECOND, normed);
            rstd[j] = 1.0f;
            if (normed) rstd[j] = (h.is_q ? rstd_q : rstd_k)[(u64)h.token * (h.is_q ? q_heads : k_heads) + h.index];
        }
#pragma unroll
        for (int j = 0; j < AHEAD_BWD; j++) {
            const Head h = head_at(warp.token, first + j * HEADS, warp.end, q_heads);
            const T* w = h.is_q ? wq : wk;
            f32 a[N], b[N], ga[N], gb[N];
            split(raw_d[j], a, b);
#pragma unroll
            for (int i = 0; i < N; i++) {
                ga[i] = a[i] * c[i] + b[i] * s[i];
                gb[i] = b[i] * c[i] - a[i] * s[i];
            }
            if (wq || wk) {
                const Raw weight = fetch(w + channel, SECOND, h.live && w);
                f32 dot = 0.0f;
                if (w) {
                    split(weight, a, b);
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        ga[i] *= gain(a[i]);
                        gb[i] *= gain(b[i]);
                    }
                }
                split(raw_x[j], a, b);
#pragma unroll
                for (int i = 0; i < N; i++) dot = fmaf(ga[i], a[i], fmaf(gb[i], b[i], dot));
                const f32 r = rstd[j], along = r * r * (lanes_sum<Warp<DIM>::LANES>(dot) / (f32)DIM);
                if (w) {
#pragma unroll
                    for (int i = 0; i < N; i++) {
                        ga[i] = r * (ga[i] - a[i] * along);
                        gb[i] = r * (gb[i] - b[i] * along);
                    }
                }
            }
            T* y = at(h.is_q ? dq_out : dk_out, h.token, h.is_q ? lddqo : lddko, h.index * DIM + channel);
            if (h.live) join(y, SECOND, ga, gb);
        }
    }
}

// Groups of LANES threads take every (256 / LANES)-th token of the chunk; channel sums meet in shared memory.
template <int DIM>
DEVICE void weight_grad(const T* dy, const T* x, const f32* rstd, const f32* cos, const f32* sin, const u32* positions,
                        f32* partial, int tokens, int heads, int lddy, int ldx, int chunk) {
    const int HALF = DIM / 2, LANES = HALF / N, GROUPS = 256 / LANES, SECOND = Lane<DIM>::SECOND;
    __shared__ f32 sums[GROUPS][DIM + 1];
    const int group = threadIdx.x / LANES, col = threadIdx.x % LANES * N, channel = Lane<DIM>::first(col);
    const int end = min(tokens, ((int)blockIdx.x + 1) * chunk);
    f32 sa[N] = {}, sb[N] = {};
    for (int token = blockIdx.x * chunk + group; token < end; token += GROUPS) {
        f32 c[N], s[N];
        const u64 angle = (u64)positions[token] * HALF + col;
        load_angles(cos + angle, c);
        load_angles(sin + angle, s);
#pragma unroll 1 // two heads at once spill in f16
        for (int head = 0; head < heads; head++) {
            f32 da[N], db[N], xa[N], xb[N];
            split(fetch(at(dy, token, lddy, head * DIM + channel), SECOND, true), da, db);
            split(fetch(at(x, token, ldx, head * DIM + channel), SECOND, true), xa, xb);
            const f32 r = rstd[(u64)token * heads + head];
#pragma unroll
            for (int i = 0; i < N; i++) {
                sa[i] = fmaf(da[i] * c[i] + db[i] * s[i], xa[i] * r, sa[i]);
                sb[i] = fmaf(db[i] * c[i] - da[i] * s[i], xb[i] * r, sb[i]);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        sums[group][PAIRS == INTERLEAVED ? 2 * (col + i) : col + i] = sa[i];
        sums[group][PAIRS == INTERLEAVED ? 2 * (col + i) + 1 : HALF + col + i] = sb[i];
    }
    __syncthreads();
    if (threadIdx.x < DIM) {
        f32 total = 0.0f;
        for (int g = 0; g < GROUPS; g++) total += sums[g][threadIdx.x];
        partial[(u64)blockIdx.x * DIM + threadIdx.x] = total;
    }
}

// The unsuffixed kernels take head_dim and rotary_dim of any even size: a warp a head, lane l has channels l, l + 32, …

DEVICE f32 element(const T* x, int i) { return to_f32(x[i]); }

// The channels of pair i.
DEVICE int first_of(int i) { return PAIRS == INTERLEAVED ? 2 * i : i; }
DEVICE int second_of(int i, int half) { return PAIRS == INTERLEAVED ? 2 * i + 1 : i + half; }

extern "C" __global__ void __launch_bounds__(256)
qk_norm_rope_fwd(const T* q, const T* k, const T* wq, const T* wk, const f32* cos, const f32* sin, const u32* positions,
                 T* q_out, T* k_out, f32* rstd_q, f32* rstd_k, int tokens, int q_heads, int k_heads, int head_dim,
                 int rotary_dim, int ldq, int ldk, int ldqo, int ldko, f32 eps) {
    begin_early();
    const u32 unit = (blockIdx.x * 256 + threadIdx.x) / 32, heads = q_heads + k_heads, token = unit / heads;
    const int lane = threadIdx.x % 32, half = rotary_dim / 2;
    if (token >= (u32)tokens) return; // a whole warp
    const Head h = head_at(token, unit - token * heads, heads, q_heads);
    const T* x = at(h.is_q ? q : k, token, h.is_q ? ldq : ldk, h.index * head_dim);
    T* y = at(h.is_q ? q_out : k_out, token, h.is_q ? ldqo : ldko, h.index * head_dim);
    const T* w = h.is_q ? wq : wk;
    f32 r = 1.0f;
    if (w) {
        f32 sum = 0.0f;
        for (int i = lane; i < head_dim; i += 32) sum = fmaf(element(x, i), element(x, i), sum);
        r = rsqrtf(warp_sum(sum) / (f32)head_dim + eps);
        if (lane == 0) (h.is_q ? rstd_q : rstd_k)[(u64)token * (h.is_q ? q_heads : k_heads) + h.index] = r;
    }
    const u64 angle = half ? (u64)positions[token] * half : 0;
    // In place, a channel is read and written by one lane only: pairs stay together.
    for (int i = lane; i < half; i += 32) {
        const int first = first_of(i), second = second_of(i, half);
        f32 a = element(x, first), b = element(x, second);
        if (w) {
            a *= r * gain(element(w, first));
            b *= r * gain(element(w, second));
        }
        const f32 c = cos[angle + i], s = sin[angle + i];
        y[first] = from_f32<T>(a * c - b * s);
        y[second] = from_f32<T>(b * c + a * s);
    }
    for (int i = rotary_dim + lane; i < head_dim; i += 32)
        y[i] = w ? from_f32<T>(element(x, i) * (r * gain(element(w, i)))) : x[i];
}

extern "C" __global__ void __launch_bounds__(256)
qk_norm_rope_bwd(const T* dq, const T* dk, const T* q, const T* k, const T* wq, const T* wk, const f32* rstd_q,
                 const f32* rstd_k, const f32* cos, const f32* sin, const u32* positions, T* dq_out, T* dk_out,
                 int tokens, int q_heads, int k_heads, int head_dim, int rotary_dim, int lddq, int lddk, int ldq,
                 int ldk, int lddqo, int lddko) {
    const u32 unit = (blockIdx.x * 256 + threadIdx.x) / 32, heads = q_heads + k_heads, token = unit / heads;
    const int lane = threadIdx.x % 32, half = rotary_dim / 2;
    if (token >= (u32)tokens) return; // a whole warp
    const Head h = head_at(token, unit - token * heads, heads, q_heads);
    const T* d = at(h.is_q ? dq : dk, token, h.is_q ? lddq : lddk, h.index * head_dim);
    const T* x = at(h.is_q ? q : k, token, h.is_q ? ldq : ldk, h.index * head_dim);
    T* y = at(h.is_q ? dq_out : dk_out, token, h.is_q ? lddqo : lddko, h.index * head_dim);
    const T* w = h.is_q ? wq : wk;
    const u64 angle = half ? (u64)positions[token] * half : 0;
    f32 r = 1.0f, along = 0.0f;
    if (w) {
        f32 dot = 0.0f;
        for (int i = lane; i < half; i += 32) {
            const int first = first_of(i), second = second_of(i, half);
            const f32 a = element(d, first), b = element(d, second), c = cos[angle + i], s = sin[angle + i];
            dot = fmaf((a * c + b * s) * gain(element(w, first)), element(x, first), dot);
            dot = fmaf((b * c - a * s) * gain(element(w, second)), element(x, second), dot);
        }
        for (int i = rotary_dim + lane; i < head_dim; i += 32)
            dot = fmaf(element(d, i) * gain(element(w, i)), element(x, i), dot);
        r = (h.is_q ? rstd_q : rstd_k)[(u64)token * (h.is_q ? q_heads : k_heads) + h.index];
        along = r * r * (warp_sum(dot) / (f32)head_dim);
    }
    for (int i = lane; i < half; i += 32) {
        const int first = first_of(i), second = second_of(i, half);
        f32 a = element(d, first), b = element(d, second);
        const f32 c = cos[angle + i], s = sin[angle + i];
        const f32 turned = a * c + b * s;
        b = b * c - a * s;
        a = turned;
        if (w) {
            a = r * (a * gain(element(w, first)) - element(x, first) * along);
            b = r * (b * gain(element(w, second)) - element(x, second) * along);
        }
        y[first] = from_f32<T>(a);
        y[second] = from_f32<T>(b);
    }
    for (int i = rotary_dim + lane; i < head_dim; i += 32)
        y[i] = w ? from_f32<T>(r * (element(d, i) * gain(element(w, i)) - element(x, i) * along)) : d[i];
}

extern "C" __global__ void __launch_bounds__(256)
qk_norm_rope_dw(const T* dq, const T* dk, const T* q, const T* k, const f32* rstd_q, const f32* rstd_k, const f32* cos,
                const f32* sin, const u32* positions, f32* partial_q, f32* partial_k, int tokens, int q_heads,
                int k_heads, int head_dim, int rotary_dim, int lddq, int lddk, int ldq, int ldk, int chunk) {
    const bool is_q = blockIdx.y == 0;
    const T *dy = is_q ? dq : dk, *x = is_q ? q : k;
    const int heads = is_q ? q_heads : k_heads, lddy = is_q ? lddq : lddk, ldx = is_q ? ldq : ldk;
    const f32* rstd = is_q ? rstd_q : rstd_k;
    const int channel = threadIdx.x, half = rotary_dim / 2, end = min(tokens, ((int)blockIdx.x + 1) * chunk);
    if (channel >= head_dim) return;
    const bool turns = channel < rotary_dim;
    const int pair = PAIRS == INTERLEAVED ? channel / 2 : channel < half ? channel : channel - half;
    const bool is_first = channel == first_of(pair);
    const int other = is_first ? second_of(pair, half) : first_of(pair);
    f32 sum = 0.0f;
    for (int token = blockIdx.x * chunk; token < end; token++) {
        f32 c = 1.0f, s = 0.0f;
        if (turns) {
            const u64 angle = (u64)positions[token] * half + pair;
            c = cos[angle];
            s = is_first ? sin[angle] : -sin[angle];
        }
        for (int head = 0; head < heads; head++) {
            const T* d = at(dy, token, lddy, head * head_dim);
            f32 turned = element(d, channel) * c;
            if (turns) turned += element(d, other) * s;
            const f32 r = rstd[(u64)token * heads + head];
            sum = fmaf(turned, to_f32(*at(x, token, ldx, head * head_dim + channel)) * r, sum);
        }
    }
    (is_q ? partial_q : partial_k)[(u64)blockIdx.x * head_dim + channel] = sum;
}

#define SIZED(DIM)                                                                                                     \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) qk_norm_rope_fwd_##DIM(                                  \
        const T* q, const T* k, const T* wq, const T* wk, const f32* cos, const f32* sin, const u32* positions,        \
        T* q_out, T* k_out, f32* rstd_q, f32* rstd_k, int tokens, int q_heads, int k_heads, int head_dim,              \
        int rotary_dim, int ldq, int ldk, int ldqo, int ldko, f32 eps) {                                               \
        forward<DIM>(q, k, wq, wk, cos, sin, positions, q_out, k_out, rstd_q, rstd_k, tokens, q_heads, k_heads,     \
                        ldq, ldk, ldqo, ldko, eps);                                                                    \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256, BLOCKS) qk_norm_rope_bwd_##DIM(                                  \
        const T* dq, const T* dk, const T* q, const T* k, const T* wq, const T* wk, const f32* rstd_q,                 \
        const f32* rstd_k, const f32* cos, const f32* sin, const u32* positions, T* dq_out, T* dk_out, int tokens,     \
        int q_heads, int k_heads, int head_dim, int rotary_dim, int lddq, int lddk, int ldq, int ldk, int lddqo,       \
        int lddko) {                                                                                                   \
        backward<DIM>(dq, dk, q, k, wq, wk, rstd_q, rstd_k, cos, sin, positions, dq_out, dk_out, tokens, q_heads,   \
                         k_heads, lddq, lddk, ldq, ldk, lddqo, lddko);                                                 \
    }                                                                                                                  \
    extern "C" __global__ void __launch_bounds__(256) qk_norm_rope_dw_##DIM(                                           \
        const T* dq, const T* dk, const T* q, const T* k, const f32* rstd_q, const f32* rstd_k, const f32* cos,        \
        const f32* sin, const u32* positions, f32* partial_q, f32* partial_k, int tokens, int q_heads, int k_heads,    \
        int head_dim, int rotary_dim, int lddq, int lddk, int ldq, int ldk, int chunk) {                               \
        const bool is_q = blockIdx.y == 0;                                                                             \
        weight_grad<DIM>(is_q ? dq : dk, is_q ? q : k, is_q ? rstd_q : rstd_k, cos, sin, positions,                    \
                         is_q ? partial_q : partial_k, tokens, is_q ? q_heads : k_heads, is_q ? lddq : lddk,           \
                         is_q ? ldq : ldk, chunk);                                                                     \
    }
SIZED(64)
SIZED(128)
SIZED(256)
