// Optimizer steps whose state is kept in 8-bit blocks; kernels/src/optimizer/blockwise, the same bits.
//
// A block is 256 elements of one parameter; the last block of a parameter may be short. m = map[code]·absmax; the update; absmax
// = max |m|; code = nearest of the map to m·(1/absmax), with the sign of m. v likewise, with its own map.
//   adamw  g ← factor·g; m ← fma(1 − β₁, g, β₁m); v ← fma((1 − β₂)g, g, β₂v); p ← fma(−step, m / (√v + eps), p)·a,
//          step = lr·√(1 − β₂ᵗ) / (1 − β₁ᵗ), eps times √(1 − β₂ᵗ), a = 1 − lr·wd
//   lion   p ← a·p − lr·sign(fma(1 − β₁, g, β₁m)); m ← fma(1 − β₂, g, β₂m), a = 1 − lr·wd
//   sgd    g ← fma(p, a, g); m ← fma(m, β₁, g); p ← fma(−lr, m, p), a = wd
// Subnormal m and v become zero; a negative m does not become zero. A block of zeros has code 255 for m and 0 for v.
//
// Layout: p, g f32, anywhere on 4 bytes; codes u8, 256 a block, short blocks too; absmax f32, one a block; both in any
// memory the device can access, including host memory. tiles: up to eight neighbouring blocks of one parameter, as four u32: its
// first element among those that p and g are a part of, low and high half; its first block; its elements and, from bit 16
// on, its kind.
// tables: the values of the map of m, its bounds (code c begins above bounds[c − 1]; the last is infinite), those of v,
// 256 f32 each; three tables of BUCKETS bytes, each in STRIDE, for m ≥ 0, m < 0 and v: the code of the smallest number in
// a bucket, which is 1/128 of a binade of |x| from 2^-23 to 1, and holds one bound at most; all below are the first bucket
// and all from 1 on the last.
//
// Launch: grid at most the tiles, block 256, dynamic shared memory 0
//   <rule>_8bit(p, g, i64 first, clip, tiles, i32 count, codes_m, absmax_m, codes_v, absmax_v, tables, f32 a0, a1, a2,
//     a3, r0, r1, beta1, one_minus_beta1, beta2, one_minus_beta2, eps). p[0] is element `first`; a is by kind, 0 to 3;
//     r, the step or lr, by kind / 2. clip as optimizer.cu has it. lion and sgd read no codes_v and absmax_v.
//
// Bytes → floor on an H200 at 4.25 TB/s: adamw 16.03 a parameter, 67.1 M parameters: 1076 MB → 253 µs.
// No spills from sm_80 to sm_120.

struct Clip { f32 norm, factor; u32 not_finite; };

struct Numbers { f32 a[4], r[2], b1, c1, b2, c2, eps; };

const int BLOCK = 256, BUCKETS = 23 * 128 + 1, STRIDE = 2960;
const int WORDS = 4 * 256 + 3 * STRIDE / 4;
const u32 FIRST_BUCKET = (127 - 23) << 7;

enum Rule { ADAMW, LION, SGD };

struct Tables {
    f32 values_m[256], bounds_m[256], values_v[256], bounds_v[256];
    u8 codes[3][STRIDE];
};

DEVICE f32 flushed(f32 x) { return fabsf(x) < 1.17549435e-38f ? 0.0f : x; }

template <Rule RULE> DEVICE void update(f32& p, f32 g, f32& m, f32& v, f32 factor, f32 a, f32 r, const Numbers& k) {
    g = __fmul_rn(g, factor);
    if constexpr (RULE == ADAMW) {
        m = flushed(__fmaf_rn(k.c1, g, __fmul_rn(m, k.b1)));
        v = flushed(__fmaf_rn(__fmul_rn(k.c2, g), g, __fmul_rn(v, k.b2)));
        p = __fmul_rn(__fmaf_rn(-r, __fdiv_rn(m, __fadd_rn(__fsqrt_rn(v), k.eps)), p), a);
    } else if constexpr (RULE == LION) {
        const f32 u = __fmaf_rn(k.c1, g, __fmul_rn(m, k.b1));
        p = __fmaf_rn(-r, u > 0.0f ? 1.0f : u < 0.0f ? -1.0f : 0.0f, __fmul_rn(p, a));
        m = flushed(__fmaf_rn(k.c2, g, __fmul_rn(m, k.b2)));
    } else {
        m = flushed(__fmaf_rn(m, k.b1, __fmaf_rn(p, a, g)));
        p = __fmaf_rn(-r, m, p);
    }
}

DEVICE u32 look_up(f32 x, const u8* codes, const f32* bounds) {
    const u32 key = __float_as_uint(x) >> 16 & 0x7fff;
    const u32 code = codes[min(key - min(key, FIRST_BUCKET), (u32)BUCKETS - 1)];
    return code + (x > bounds[code]);
}

// Four neighbouring codes.
template <bool SIGNED> DEVICE u32 encode(const f32* x, f32 absmax, const Tables& t) {
    const f32 inverse = absmax > 0.0f ? __frcp_rn(absmax) : 0.0f;
    u32 word = 0;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        u32 code;
        if (SIGNED) {
            const bool negative = x[k] < 0.0f;
            code = look_up(__fmul_rn(x[k], inverse), t.codes[negative], t.bounds_m);
            code = negative ? min(code, 126) : code;
            if (absmax == 0.0f) code = 255;
        } else {
            code = look_up(__fmul_rn(x[k], inverse), t.codes[2], t.bounds_v);
        }
        word |= code << (8 * k);
    }
    return word;
}

DEVICE void decode(u32 word, f32 absmax, const f32* values, f32* x) {
#pragma unroll
    for (int k = 0; k < 4; k++) x[k] = __fmul_rn(values[word >> (8 * k) & 255], absmax);
}

// Four neighbours, the first n of them.
DEVICE void load(const f32* p, int n, bool wide, f32* x) {
    if (wide) {
        const float4 q = *reinterpret_cast<const float4*>(p);
        x[0] = q.x, x[1] = q.y, x[2] = q.z, x[3] = q.w;
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) x[k] = k < n ? p[k] : 0.0f;
}
DEVICE void store(f32* p, int n, bool wide, const f32* x) {
    if (wide) {
        *reinterpret_cast<float4*>(p) = make_float4(x[0], x[1], x[2], x[3]);
        return;
    }
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (k < n) p[k] = x[k];
}

// A block, by a warp: each thread has two groups of four neighbours, 128 apart.
template <Rule RULE>
DEVICE void step(f32* p, const f32* g, int n, u32 block, u8* codes_m, f32* absmax_m, u8* codes_v, f32* absmax_v,
                 f32 factor, f32 a, f32 r, const Numbers& k, const Tables& t) {
    const int lane = threadIdx.x % 32;
    const bool aligned = ((reinterpret_cast<u64>(p) | reinterpret_cast<u64>(g)) & 15) == 0;
    u32* words_m = reinterpret_cast<u32*>(codes_m + (u64)block * BLOCK) + lane;
    u32* words_v = reinterpret_cast<u32*>(codes_v + (u64)block * BLOCK) + lane;
    f32 pv[8], gv[8], m[8], v[8];
    u32 wm[2], wv[2] = {};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int first = lane * 4 + h * 128;
        const bool wide = aligned && first + 4 <= n;
        wm[h] = words_m[32 * h];
        if (RULE == ADAMW) wv[h] = words_v[32 * h];
        load(p + first, n - first, wide, pv + 4 * h);
        load(g + first, n - first, wide, gv + 4 * h);
    }
    const f32 old_m = absmax_m[block], old_v = RULE == ADAMW ? absmax_v[block] : 0.0f;
    f32 top_m = 0.0f, top_v = 0.0f;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        decode(wm[h], old_m, t.values_m, m + 4 * h);
        if (RULE == ADAMW) decode(wv[h], old_v, t.values_v, v + 4 * h);
#pragma unroll
        for (int i = 4 * h; i < 4 * h + 4; i++) {
            update<RULE>(pv[i], gv[i], m[i], v[i], factor, a, r, k);
            if (lane * 4 + h * 128 + i % 4 < n) {
                top_m = fmaxf(top_m, fabsf(m[i]));
                if (RULE == ADAMW) top_v = fmaxf(top_v, v[i]);
            }
        }
    }
    top_m = warp_max(top_m);
    if (RULE == ADAMW) top_v = warp_max(top_v);
    if (lane == 0) {
        absmax_m[block] = top_m;
        if (RULE == ADAMW) absmax_v[block] = top_v;
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int first = lane * 4 + h * 128;
        store(p + first, n - first, aligned && first + 4 <= n, pv + 4 * h);
        words_m[32 * h] = encode<true>(m + 4 * h, top_m, t);
        if (RULE == ADAMW) words_v[32 * h] = encode<false>(v + 4 * h, top_v, t);
    }
}

template <Rule RULE>
DEVICE void steps(f32* p, const f32* g, long long first, const Clip* clip, const uint4* tiles, int count, u8* codes_m,
                  f32* absmax_m, u8* codes_v, f32* absmax_v, const u32* tables, const Numbers& k) {
    __shared__ alignas(16) u32 shared[WORDS];
    const f32 factor = clip->factor;
    if (clip->not_finite) return;
    for (int i = threadIdx.x; i < WORDS / 4; i += 256)
        reinterpret_cast<uint4*>(shared)[i] = reinterpret_cast<const uint4*>(tables)[i];
    __syncthreads();
    const Tables& t = *reinterpret_cast<const Tables*>(shared);
    const int warp = threadIdx.x / 32;
    for (int i = blockIdx.x; i < count; i += gridDim.x) {
        const uint4 tile = tiles[i];
        const int n = (int)(tile.w & 0xffff) - warp * BLOCK;
        if (n <= 0) continue;
        const u32 kind = tile.w >> 16;
        const f32 a = kind & 2 ? (kind & 1 ? k.a[3] : k.a[2]) : (kind & 1 ? k.a[1] : k.a[0]);
        const long long at = (long long)((u64)tile.y << 32 | tile.x) - first + warp * BLOCK;
        step<RULE>(p + at, g + at, min(n, BLOCK), tile.z + warp, codes_m, absmax_m, codes_v, absmax_v, factor, a,
                   kind & 2 ? k.r[1] : k.r[0], k, t);
    }
}

#define ENTRY(name, rule)                                                                                              \
    extern "C" __global__ void __launch_bounds__(256, 3)                                                               \
    name(f32* p, const f32* g, long long first, const Clip* clip, const uint4* tiles, int count, u8* codes_m,          \
         f32* absmax_m, u8* codes_v, f32* absmax_v, const u32* tables, f32 a0, f32 a1, f32 a2, f32 a3, f32 r0, f32 r1, \
         f32 beta1, f32 one_minus_beta1, f32 beta2, f32 one_minus_beta2, f32 eps) {                                    \
        const Numbers k = {{a0, a1, a2, a3}, {r0, r1}, beta1, one_minus_beta1, beta2, one_minus_beta2, eps};           \
        steps<rule>(p, g, first, clip, tiles, count, codes_m, absmax_m, codes_v, absmax_v, tables, k);                 \
    }

ENTRY(adamw_8bit, ADAMW)
ENTRY(lion_8bit, LION)
ENTRY(sgd_8bit, SGD)
