// Rows to e4m3 codes with a scale each; the definition is in fp8_rows.cu.

// Four values in a register, the first in the lowest byte.
DEVICE u32 codes4(f32 a, f32 b, f32 c, f32 d) {
    u16 lo, hi;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(lo) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(hi) : "f"(d), "f"(c));
    return (u32)lo | (u32)hi << 16;
}

DEVICE f32 block_max(f32 x, f32* shared) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    for (int w = 0; w < (int)(blockDim.x + 31) / 32; w++) x = fmaxf(x, shared[w]);
    return x;
}

// The maximum of a row over the block to its scale, which one thread stores, and the factor from values to codes.
DEVICE f32 row_scale(f32 largest, f32* shared, f32* scale) {
    largest = fmaxf(block_max(largest, shared), 7.8886091e-31f);
    if (threadIdx.x == 0) *scale = largest / 448.0f;
    return 448.0f / largest;
}

// The values of one vector, times the factors of their columns where there are any.
DEVICE void values(const uint4& raw, const f32* by, int col, int width, f32 (&v)[Vec<T>::N]) {
    unpack16<T>(raw, v);
    if (by) {
#pragma unroll
        for (int i = 0; i < Vec<T>::N; i += 4) {
            f32 s[4];
            unpack16<f32>(load_part(by + col + i, width - col - i), s);
#pragma unroll
            for (int e = 0; e < 4; e++) v[i + e] *= s[e];
        }
    }
}
DEVICE f32 largest_of(const uint4& raw, const f32* by, int col, int width) {
    f32 v[Vec<T>::N], largest = 0.0f;
    values(raw, by, col, width, v);
#pragma unroll
    for (int i = 0; i < Vec<T>::N; i++) largest = fmaxf(largest, fabsf(v[i]));
    return largest;
}
// The codes of a vector of 16-bit values.
DEVICE void store_codes(u8* to, const uint4& raw, const f32* by, int col, int width, f32 inverse) {
    f32 v[Vec<T>::N];
    values(raw, by, col, width, v);
    u32 words[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        words[i] = codes4(v[4 * i] * inverse, v[4 * i + 1] * inverse, v[4 * i + 2] * inverse, v[4 * i + 3] * inverse);
    *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
}
