// Quantized weights to T: NF4/FP4 with f32 or doubly quantized scales, and LLM.int8(); crates/rekindle-quant.
//
// 4-bit: w = codebook[code]·absmax[block], in f32 with subnormals flushed, rounded once to T; blocks of `blocksize` run
// over the flattened tensor. Double: absmax = map[code8]·nested[block >> nested_shift] + offset, a rounding after the
// product and one after the sum; offsets [parts], each for `section` blocks. int8: w = (code·scb[row])·f32(1/127), a rounding after each factor, then to T.
// The same bits as bitsandbytes' CUDA kernels.
//
// Layout: packed [ceil(out·in / 2)] u8, the even element of the flattened tensor in the high nibble; absmax
// [ceil(out·in / blocksize)] f32 or u8 with nested [ceil(blocks / 2^nested_shift)] f32; codebook [16], map [256] f32;
// int8 codes [out, in], scb [out] f32. Result [out, in] of T with row stride ldw in elements, a multiple of 8 at a
// 16-byte aligned pointer. packed and int8 codes 16-byte aligned. `in` may be anything; where it is a multiple of 8, a
// thread's eight elements are one load of codes and one scale. blocksize a power of two from 32 up, passed as its log2.
//
// Launch: grid ceil(out·ceil(in / 8) / 512), block 256, dynamic shared memory 0. Fewer than 2^32 groups of 8.
//   dequant_4bit(packed, absmax, codebook, w, i32 out, in, ldw, block_shift)
//   dequant_4bit_double(packed, absmax8, map, nested, offsets, codebook, w, i32 out, in, ldw, block_shift,
//     nested_shift, section), and dequant_4bit_stacked for several offsets
//   dequant_int8(codes, scb, w, i32 out, in, ldw, Choice of chosen_experts.cuh, member by member); with a choice, grid.x is for
//     the rows of one expert and grid.y the number of selections
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches, and measured to bf16, 2026-11-23; a launch of
// this size loses about 2 µs in starting and ending (a plain copy of 84 MB: 3.9 TB/s):
//   dequant_4bit_double, NF4, blocksize 64, [9728, 2560] or [2560, 9728] 62.6 MB → 14.7 µs: 17.5 µs, 84 %, 3.57 TB/s
//   dequant_4bit 63.8 MB → 15.0: 17.5, 86 %, 3.64 TB/s
//   dequant_int8 74.7 MB → 17.6: 19.8, 89 %, 3.77 TB/s
// No spills from sm_80 to sm_120.
//
// Bit-exact: the decoded goldens of crates/rekindle-quant, and its formulas on random codes with odd widths and blocks
// across rows; memcheck and racecheck clean.
//
// Tried: groups a thread, 1: 19.3 µs, 4: 19.2, 8: 18.5; two groups with 6 blocks an SM: 18.3.

const int UNROLL = 2; // groups of eight a thread
const int BLOCKS = __CUDA_ARCH__ < 800 ? 4 : __CUDA_ARCH__ == 800 || __CUDA_ARCH__ / 100 == 9 || __CUDA_ARCH__ / 100 == 10 ? 8 : 6; // an SM
const int THREADS = 256;

// Multiplies as the kernels of bitsandbytes do, which are compiled with subnormals flushed.
DEVICE f32 mul_ftz(f32 a, f32 b) {
    f32 y;
    asm("mul.rn.ftz.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
    return y;
}

// Up to eight values of one row.
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

struct Single {
    const f32* absmax;
    // What a group's scale is made of, fetched early.
    struct Parts { f32 absmax; };
    DEVICE Parts fetch(u32 block) const { return {absmax[block]}; }
    DEVICE f32 scale(Parts parts, u32, const f32*) const { return parts.absmax; }
};

// With several offsets (STACKED), each is for `section` blocks.
template <bool STACKED> struct Double {
    const u8* codes;
    const f32* nested;
    const f32* offsets;
    int nested_shift;
    u32 section;
    struct Parts { u8 code; f32 nested; };
    DEVICE Parts fetch(u32 block) const { return {codes[block], nested[block >> nested_shift]}; }
    // Fetches the offset late, because there are no registers left for it.
    DEVICE f32 scale(Parts parts, u32 block, const f32* map) const {
        return __fadd_rn(mul_ftz(map[parts.code], parts.nested), offsets[STACKED ? block / section : 0]);
    }
};

template <typename Scales>
DEVICE void dequant(const u8* packed, Scales scales, const f32* map, const f32* codebook, T* w, int out, int in,
                    int ldw, int block_shift) {
    // 16 words in 16 banks: looking up different codes never conflicts.
    __shared__ f32 values[16];
    __shared__ f32 map_values[256];
    const u32 total = (u32)out * ((u32)(in + 7) / 8);
    const u32 first = blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
    Place to[UNROLL];
    u32 codes[UNROLL];
    typename Scales::Parts parts[UNROLL];
    const bool whole = in % 8 == 0;
    if (whole) {
#pragma unroll
        for (int k = 0; k < UNROLL; k++) {
            const u32 i = first + k * THREADS;
            if (i < total) {
                codes[k] = reinterpret_cast<const u32*>(packed)[i];
                parts[k] = scales.fetch((u32)(((u64)i * 8) >> block_shift));
            }
        }
    }
    if (threadIdx.x < 16) values[threadIdx.x] = codebook[threadIdx.x];
    if (map) map_values[threadIdx.x] = map[threadIdx.x];
#pragma unroll
    for (int k = 0; k < UNROLL; k++) to[k] = place<8>(first + k * THREADS, in);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < UNROLL; k++) {
        if (first + k * THREADS >= total) break;
        f32 v[8];
        if (whole) {
            const u32 block = (u32)(((u64)(first + k * THREADS) * 8) >> block_shift);
            const f32 scale = scales.scale(parts[k], block, map_values);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                // Little endian: byte i / 2, its high nibble first.
                const int shift = i / 2 * 8 + (i % 2 == 0 ? 4 : 0);
                v[i] = mul_ftz(values[(codes[k] >> shift) & 15], scale);
            }
        } else {
            const u64 flat = (u64)to[k].row * in + to[k].col;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (i >= to[k].n) continue;
                const u32 byte = packed[(flat + i) / 2];
                const u32 block = (u32)((flat + i) >> block_shift);
                const f32 scale = scales.scale(scales.fetch(block), block, map_values);
                v[i] = mul_ftz(values[(flat + i) % 2 == 0 ? byte >> 4 : byte & 15], scale);
            }
        }
        store_group(at(w, to[k].row, ldw, to[k].col), to[k].n, v);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
dequant_4bit(const u8* packed, const f32* absmax, const f32* codebook, T* w, int out, int in, int ldw,
             int block_shift) {
    dequant(packed, Single{absmax}, nullptr, codebook, w, out, in, ldw, block_shift);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
dequant_4bit_double(const u8* packed, const u8* absmax8, const f32* map, const f32* nested, const f32* offsets,
                    const f32* codebook, T* w, int out, int in, int ldw, int block_shift, int nested_shift,
                    int section) {
    const Double<false> scales{absmax8, nested, offsets, nested_shift, (u32)section};
    dequant(packed, scales, map, codebook, w, out, in, ldw, block_shift);
}

// The division by `section` takes registers, so fewer blocks fit.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT(THREADS, 6))
dequant_4bit_stacked(const u8* packed, const u8* absmax8, const f32* map, const f32* nested, const f32* offsets,
                     const f32* codebook, T* w, int out, int in, int ldw, int block_shift, int nested_shift,
                     int section) {
    const Double<true> scales{absmax8, nested, offsets, nested_shift, (u32)section};
    dequant(packed, scales, map, codebook, w, out, in, ldw, block_shift);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
dequant_int8(const signed char* codes, const f32* scb, T* w, int out, int in, int ldw, const int* expert_offsets, const int* sorted,
             const int* chosen, int first_expert, int expert_rows) {
    const Span span = Choice{expert_offsets, sorted, chosen, first_expert, expert_rows}.span((u32)out, (u32)(in + 7) / 8);
    const u32 total = span.end;
    const u32 first = span.begin + blockIdx.x * (THREADS * UNROLL) + threadIdx.x;
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
            scale[k] = scb[to[k].row];
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
            const int code = whole ? (int)(word << (24 - i % 4 * 8)) >> 24 : codes[(u64)to[k].row * in + to[k].col + i];
            v[i] = __fmul_rn(__fmul_rn((f32)code, scale[k]), 1.0f / 127.0f);
        }
        store_group(at(w, to[k].row, ldw, to[k].col), to[k].n, v);
    }
}
