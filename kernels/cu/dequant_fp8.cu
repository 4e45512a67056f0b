// fp8 weights (E4M3) to T; crates/rekindle-quant/src/fp8.rs.
//
//   w = f32(code) * scale
// in f32, subnormals kept, rounded once to T. No code is NaN. A scale is that of the section of rows (tensor), of the row, or
// of a block of 128 x 128 of the section. Weights of experts are stacked, each a section; any other weight is one section.
//
// Layout: codes [out, in] u8 from the first decoded row on, 16-byte aligned; scales f32 of the whole weight,
// [sections, per_section / per_row, per_row]; per_row is 1 but for blocks. Result [out, in] of T with row stride ldw in
// elements, a multiple of 8 at a 16-byte aligned pointer. `in` may be anything; where it is a multiple of 8, a thread's eight
// codes are one load.
//
// Compile with -DT=bf16|f16|f32.
// Launch: grid ceil(out * ceil(in / 8) / 512), block 256, dynamic shared memory 0. Fewer than 2^32 groups of 8.
//   const u8* codes, const f32* scales, T* w, int out, in, ldw, first, section, per_section, per_row
// where first is the row of the weight that the first decoded row is.
//
// Bytes: a code and a T for each value, 3 to bf16; [9728, 2560] 74.7 MB -> 17.6 us at 4.25 TB/s.
// No spills from sm_80 to sm_120.
// Tests: kernels/tests/cuda/experts.rs and tests/tests/cuda.rs, against the CPU, to the bit.

const int UNROLL = 2; // groups of eight a thread
const int THREADS = 256;

// The exponent of a code is 120 less than that of an f32; a subnormal code is a subnormal f32 before the product.
DEVICE f32 value(u32 code) {
    return __fmul_rn(__uint_as_float((code & 0x80) << 24 | (code & 0x7f) << 20), __uint_as_float((127 + 120) << 23));
}

DEVICE void store_group(T* p, int n, const f32 (&v)[8]) {
    const int N = Vec<T>::N;
#pragma unroll
    for (int part = 0; part < 8; part += N) {
        f32 some[N];
#pragma unroll
        for (int i = 0; i < N; i++) some[i] = v[part + i];
        store_part(p + part, n - part, pack16<T>(some));
    }
}

struct TensorScale {
    const f32* scales;
    u32 section;
    DEVICE f32 at(u32 row, u32) const { return scales[row / section]; }
};

struct RowScale {
    const f32* scales;
    DEVICE f32 at(u32 row, u32) const { return scales[row]; }
};

// A group of eight begins at a multiple of eight, so it lies in one block.
struct BlockScale {
    const f32* scales;
    u32 section, per_section, per_row;
    DEVICE f32 at(u32 row, u32 col) const {
        const u32 part = row / section;
        return scales[(u64)part * per_section + (row - part * section) / 128 * per_row + col / 128];
    }
};

template <typename Scales>
DEVICE void dequant(const u8* codes, Scales scales, T* w, int out, int in, int ldw, int first_row) {
    const u32 total = (u32)out * ((u32)(in + 7) / 8);
    const u32 first = blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
    const bool whole = in % 8 == 0;
    uint2 raw[UNROLL];
    Place to[UNROLL];
    f32 scale[UNROLL];
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
        const u32 i = first + k * THREADS;
        to[k] = place<8>(i, in);
        if (i < total) {
            if (whole) raw[k] = reinterpret_cast<const uint2*>(codes)[i];
            scale[k] = scales.at((u32)(first_row + to[k].row), (u32)to[k].col);
        }
    }
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
        if (first + k * THREADS >= total) break;
        f32 v[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (i >= to[k].n) continue;
            const u32 word = i < 4 ? raw[k].x : raw[k].y;
            const u32 code = whole ? word >> i % 4 * 8 : codes[(u64)to[k].row * in + to[k].col + i];
            v[i] = __fmul_rn(value(code), scale[k]);
        }
        store_group(at(w, to[k].row, ldw, to[k].col), to[k].n, v);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
dequant_fp8_tensor(const u8* codes, const f32* scales, T* w, int out, int in, int ldw, int first, int section, int, int) {
    dequant(codes, TensorScale{scales, (u32)section}, w, out, in, ldw, first);
}

extern "C" __global__ void __launch_bounds__(THREADS)
dequant_fp8_row(const u8* codes, const f32* scales, T* w, int out, int in, int ldw, int first, int, int, int) {
    dequant(codes, RowScale{scales}, w, out, in, ldw, first);
}

extern "C" __global__ void __launch_bounds__(THREADS)
dequant_fp8_block(const u8* codes, const f32* scales, T* w, int out, int in, int ldw, int first, int section,
                  int per_section, int per_row) {
    dequant(codes, BlockScale{scales, (u32)section, (u32)per_section, (u32)per_row}, w, out, in, ldw, first);
}
