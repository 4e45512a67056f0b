// f32 values into bf16, 4-bit codes and 8-bit codes by stochastic rounding; kernels/src/params/stochastic, the same bits.
//
// Between the neighbours a ≤ x < b of the format, x becomes b where u < (x − a) / (b − a); u = word / 2^32 of Philox with
// counter (element / 4, 0, site, step), word element mod 4. A value within 4 units in the last place of a neighbour is
// that neighbour. 4-bit: x = w / absmax, absmax = max |w| of the block; 8-bit: x = w·(127 / max |w| of the row).
//
// Layout: w f32, dense; bf16 y dense; packed [ceil(n / 2)] u8, the even element in the high nibble, absmax
// [ceil(n / blocksize)] f32, table [16] f32 by code; int8 codes [rows, cols], scales [rows]. w 16-byte aligned, cols a
// multiple of 4. blocksize a power of two from 32 up. Fewer than 2^34 elements.
//
// Launch (dynamic shared memory 0)
//   store_bf16(w, y, i64 n, u64 key, u32 site, step): grid ceil(n / 1024), block 256
//   store_4bit(w, packed, absmax, table, i64 n, i32 blocksize, u64 key, u32 site, step): grid ceil(blocks / 8), block 256,
//     a warp a block of codes
//   store_int8(w, codes, scales, i32 rows, cols, u64 key, u32 site, step): grid rows, block 256
// T is not used.
//
// Bytes → floor on an H200 at 4.25 TB/s, [9728, 2560]: bf16 149 MB → 35 µs, 4-bit 114 MB → 27 µs, 8-bit 125 MB → 29 µs.

const f32 NEAR = 4.0f * 1.1920929e-7f;

DEVICE uint4 words(u64 four, u32 site, u32 step, u64 key) {
    uint4 counter[1] = {make_uint4((u32)four, (u32)(four >> 32), site, step)};
    philox(counter, key);
    return counter[0];
}

DEVICE f32 uniform(u32 word) { return (f32)(word >> 8) * (1.0f / 16777216.0f); }

DEVICE u16 round_bf16(f32 x, u32 bits) {
    const u32 raw = __float_as_uint(x);
    if ((raw & 0x7F800000u) == 0x7F800000u) return (u16)((raw >> 16) | ((raw & 0x007FFFFFu) != 0 ? 0x40u : 0u));
    return (u16)((raw + (bits & 0xFFFFu)) >> 16);
}

extern "C" __global__ void __launch_bounds__(256)
store_bf16(const f32* w, u16* y, long long n, u64 key, u32 site, u32 step) {
    const long long first = ((long long)blockIdx.x * 256 + threadIdx.x) * 4;
    if (first >= n) return;
    const uint4 bits = words((u64)first / 4, site, step, key);
    if (first + 4 <= n) {
        const float4 v = *reinterpret_cast<const float4*>(w + first);
        const u32 low = round_bf16(v.x, bits.x) | (u32)round_bf16(v.y, bits.y) << 16;
        const u32 high = round_bf16(v.z, bits.z) | (u32)round_bf16(v.w, bits.w) << 16;
        *reinterpret_cast<uint2*>(y + first) = make_uint2(low, high);
        return;
    }
    const u32 each[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
        if (first + k < n) y[first + k] = round_bf16(w[first + k], each[k]);
}

struct Sorted { f32 values[16]; u32 codes[16]; };

// The table by size, by the first warp's lower half; of equal values the higher code first.
DEVICE void sort_table(const f32* table, Sorted& sorted) {
    if (threadIdx.x >= 16) return;
    const int code = (int)threadIdx.x;
    const f32 value = table[code];
    int rank = 0;
    for (int other = 0; other < 16; other++) {
        const f32 v = table[other];
        rank += v < value || (v == value && other > code);
    }
    sorted.values[rank] = value;
    sorted.codes[rank] = (u32)code;
}

DEVICE u32 choose(const Sorted& sorted, f32 x, u32 word) {
    int at = 0;
#pragma unroll
    for (int i = 1; i < 16; i++) at += sorted.values[i] <= x;
    if (at == 15) return sorted.codes[15];
    const f32 low = sorted.values[at], high = sorted.values[at + 1];
    bool up;
    if (__fsub_rn(x, low) <= NEAR * fabsf(low)) up = false;
    else if (__fsub_rn(high, x) <= NEAR * fabsf(high)) up = true;
    else up = uniform(word) < __fdiv_rn(__fsub_rn(x, low), __fsub_rn(high, low));
    return sorted.codes[at + up];
}

extern "C" __global__ void __launch_bounds__(256)
store_4bit(const f32* w, u8* packed, f32* absmax, const f32* table, long long n, int blocksize, u64 key, u32 site,
           u32 step) {
    __shared__ Sorted sorted;
    sort_table(table, sorted);
    __syncthreads();
    const long long block = (long long)blockIdx.x * 8 + threadIdx.x / 32, first = block * blocksize;
    if (first >= n) return;
    const int lane = (int)threadIdx.x % 32, size = (int)min((long long)blocksize, n - first);
    f32 most = 0.0f;
    for (int i = lane; i < size; i += 32) most = fmaxf(most, fabsf(w[first + i]));
    most = warp_max(most);
    if (lane == 0) absmax[block] = most;
    for (int i = lane * 2; i < size; i += 64) {
        const uint4 bits = words((u64)(first + i) / 4, site, step, key);
        f32 pair[2] = {w[first + i], i + 1 < size ? w[first + i + 1] : 0.0f};
#pragma unroll
        for (int k = 0; k < 2; k++) pair[k] = most > 0.0f ? __fdiv_rn(pair[k], most) : 0.0f;
        const u32 high = choose(sorted, pair[0], i % 4 == 0 ? bits.x : bits.z);
        const u32 low = choose(sorted, pair[1], i % 4 == 0 ? bits.y : bits.w);
        packed[(first + i) / 2] = (u8)(high << 4 | low);
    }
}

DEVICE int choose_integer(f32 x, u32 word) {
    const f32 nearest = rintf(x);
    if (fabsf(__fsub_rn(x, nearest)) <= NEAR * 127.0f) return (int)nearest;
    const f32 low = floorf(x);
    return (int)low + (uniform(word) < __fsub_rn(x, low) ? 1 : 0);
}

extern "C" __global__ void __launch_bounds__(256)
store_int8(const f32* w, char4* codes, f32* scales, int rows, int cols, u64 key, u32 site, u32 step) {
    __shared__ f32 shared[8];
    const int row = (int)blockIdx.x, fours = cols / 4;
    const float4* from = reinterpret_cast<const float4*>(w + (long long)row * cols);
    f32 most = 0.0f;
    for (int i = (int)threadIdx.x; i < fours; i += 256) {
        const float4 v = from[i];
        most = fmaxf(most, fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w))));
    }
    most = warp_max(most);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = most;
    __syncthreads();
    for (int i = 0; i < 8; i++) most = fmaxf(most, shared[i]);
    if (threadIdx.x == 0) scales[row] = most;
    const f32 factor = most > 0.0f ? __fdiv_rn(127.0f, most) : 0.0f;
    const u64 before = (u64)row * fours;
    for (int i = (int)threadIdx.x; i < fours; i += 256) {
        const float4 v = from[i];
        const uint4 bits = words(before + i, site, step, key);
        codes[before + i] = make_char4((char)choose_integer(__fmul_rn(v.x, factor), bits.x),
                                       (char)choose_integer(__fmul_rn(v.y, factor), bits.y),
                                       (char)choose_integer(__fmul_rn(v.z, factor), bits.z),
                                       (char)choose_integer(__fmul_rn(v.w, factor), bits.w));
    }
}
