// Blocks of GGUF files to T; crates/rekindle-gguf/src/codec, whose values these are to the bit in f32, rounded once to T.
//
//   w = (q - BIAS) * scale, or with HAS_MIN q * scale + min
// in f32, a rounding after each operation, subnormals kept. q is a code of up to 8 bits or an entry of a table; scale and min
// belong to 16 or 32 elements. The K-quants multiply scale and min from a factor of the block and a small integer, a rounding
// each. The layouts are in the codec's module documentation.
//
// Layout: blocks [out, in / ELEMENTS] of BYTES bytes, one after another from a 16-byte aligned address. Result [out, in] of T
// with row stride ldw in elements, a multiple of 8 at a 16-byte aligned pointer. in is a multiple of ELEMENTS.
//
// Compile with -DT=bf16|f16|f32 and -DFORMAT=Q4_0|Q4_1|Q5_0|Q5_1|Q8_0|Q2_K|Q3_K|Q4_K|Q5_K|Q6_K|IQ4_NL|MXFP4.
// Launch: grid ceil(out * in / 8192), block 256, dynamic shared memory 0. Fewer than 2^32 groups of 8 elements.
//   const u8* blocks, T* w, int out, in, ldw, Choice of chosen_experts.cuh, member by member; with a choice, grid.x is for the rows
//   of one expert, which begin at 16 bytes, and grid.y the number of selections
//
// Blocks of 17 to 210 bytes begin at any address, so a thread block copies the bytes of 8,192 elements to shared memory in
// 16-byte loads. Then a thread decodes 8 elements at a time. Four codes are bytes of a register, and one byte permutation
// makes each a float: the byte below the exponent of 2^23 is the number 2^23 + q.
//
// Bytes: those of the blocks and of w; Q4_K to bf16 is 2.56 a value.
// Tests: tests/tests/cuda.rs, every format, against the codec, to the bit.

const int THREADS = 256;
const int GROUPS = 4; // of eight elements a thread
const int SPAN = THREADS * GROUPS * 8;

// Eight codes, and their factor and summand.
struct Group {
    u32 codes[2];
    f32 scale, min;
};

// The 8 bytes at an address in shared memory that is a multiple of ALIGN. Reads up to 4 bytes more.
template <int ALIGN> DEVICE void load8(const u8* p, u32 (&out)[2]) {
    if (ALIGN % 4 == 0) {
        const u32* words = reinterpret_cast<const u32*>(p);
        out[0] = words[0];
        out[1] = words[1];
    } else {
        const u32 shift = (u32)(reinterpret_cast<u64>(p) % 4) * 8;
        const u32* words = reinterpret_cast<const u32*>(p - reinterpret_cast<u64>(p) % 4);
        out[0] = __funnelshift_r(words[0], words[1], shift);
        out[1] = __funnelshift_r(words[1], words[2], shift);
    }
}

// The f16 at an even address.
DEVICE f32 f16_at(const u8* p) { return to_f32(*reinterpret_cast<const f16*>(p)); }

// Bits 0 to 3 of `bits` as bit `to` of four bytes.
DEVICE u32 spread(u32 bits, int to) { return ((bits & 15) * 0x00204081u & 0x01010101u) << to; }

// For four nibbles, one in each byte, the bytes of a table of 16 that they index.
DEVICE u32 looked_up(u32 nibbles, const u32 (&table)[4]) {
    // The nibbles side by side, as the selector of a permutation takes them.
    const u32 selector = __byte_perm(nibbles | nibbles >> 4, 0, 0x4420);
    const u32 low = __byte_perm(table[0], table[1], selector & 0x7777), high = __byte_perm(table[2], table[3], selector & 0x7777);
    return __byte_perm(low, high, 0x3210 | (selector & 0x8888) >> 1);
}

// Blocks of 32: element j is the low half of byte j, element j + 16 the high half.
template <int ALIGN> DEVICE void nibbles32(const u8* bytes, int i, u32 (&out)[2]) {
    load8<ALIGN>(bytes + i % 16, out);
#pragma unroll
    for (int k = 0; k < 2; k++) out[k] = out[k] >> (i / 16 * 4) & 0x0f0f0f0fu;
}

// Adds the fifth bits: bit j of a u32 is that of element j.
DEVICE void add_fifth_bits(const u8* bytes, int i, u32 (&out)[2]) {
    const u32 bits = bytes[i / 8];
    out[0] |= spread(bits, 4);
    out[1] |= spread(bits >> 4, 4);
}

// Blocks of 256: two bits of element i, in byte i % 32 of its half.
template <int ALIGN> DEVICE void pairs(const u8* bytes, int i, u32 (&out)[2]) {
    load8<ALIGN>(bytes + 32 * (i / 128) + i % 32, out);
#pragma unroll
    for (int k = 0; k < 2; k++) out[k] = out[k] >> (i % 128 / 32 * 2) & 0x03030303u;
}

struct Q8_0 {
    static const int ELEMENTS = 32, BYTES = 34, BIAS = 128;
    static const bool HAS_MIN = false;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        load8<2>(block + 2 + i, g.codes);
        g.codes[0] ^= 0x80808080u;
        g.codes[1] ^= 0x80808080u;
        g.scale = f16_at(block);
        return g;
    }
};

struct Q4_0 {
    static const int ELEMENTS = 32, BYTES = 18, BIAS = 8;
    static const bool HAS_MIN = false;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        nibbles32<2>(block + 2, i, g.codes);
        g.scale = f16_at(block);
        return g;
    }
};

struct Q4_1 {
    static const int ELEMENTS = 32, BYTES = 20, BIAS = 0;
    static const bool HAS_MIN = true;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        nibbles32<4>(block + 4, i, g.codes);
        g.scale = f16_at(block);
        g.min = f16_at(block + 2);
        return g;
    }
};

struct Q5_0 {
    static const int ELEMENTS = 32, BYTES = 22, BIAS = 16;
    static const bool HAS_MIN = false;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        nibbles32<2>(block + 6, i, g.codes);
        add_fifth_bits(block + 2, i, g.codes);
        g.scale = f16_at(block);
        return g;
    }
};

struct Q5_1 {
    static const int ELEMENTS = 32, BYTES = 24, BIAS = 0;
    static const bool HAS_MIN = true;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        nibbles32<4>(block + 8, i, g.codes);
        add_fifth_bits(block + 4, i, g.codes);
        g.scale = f16_at(block);
        g.min = f16_at(block + 2);
        return g;
    }
};

struct IQ4_NL {
    static const int ELEMENTS = 32, BYTES = 18, BIAS = 128;
    static const bool HAS_MIN = false;
    static DEVICE Group group(const u8* block, int i) {
        // -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113, each with 128 added.
        const u32 table[4] = {0x3f2d1801u, 0x766a5d4fu, 0xa6998d81u, 0xf1d9c5b5u};
        Group g;
        nibbles32<2>(block + 2, i, g.codes);
        g.codes[0] = looked_up(g.codes[0], table);
        g.codes[1] = looked_up(g.codes[1], table);
        g.scale = f16_at(block);
        return g;
    }
};

struct MXFP4 {
    static const int ELEMENTS = 32, BYTES = 17, BIAS = 12;
    static const bool HAS_MIN = false;
    static DEVICE Group group(const u8* block, int i) {
        // 0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12, each with 12 added: twice the values of E2M1.
        const u32 table[4] = {0x0f0e0d0cu, 0x18141210u, 0x090a0b0cu, 0x00040608u};
        Group g;
        nibbles32<1>(block + 1, i, g.codes);
        g.codes[0] = looked_up(g.codes[0], table);
        g.codes[1] = looked_up(g.codes[1], table);
        // 2^(e - 128), which is subnormal for the two smallest.
        const u32 e = block[0];
        g.scale = __uint_as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23);
        return g;
    }
};

struct Q2_K {
    static const int ELEMENTS = 256, BYTES = 84, BIAS = 0;
    static const bool HAS_MIN = true;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        pairs<4>(block + 16, i, g.codes);
        const u32 scales = block[i / 16];
        g.scale = __fmul_rn(f16_at(block + 80), (f32)(scales & 15));
        g.min = -__fmul_rn(f16_at(block + 82), (f32)(scales >> 4));
        return g;
    }
};

struct Q3_K {
    static const int ELEMENTS = 256, BYTES = 110, BIAS = 4;
    static const bool HAS_MIN = false;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        u32 high[2];
        pairs<2>(block + 32, i, g.codes);
        load8<2>(block + i % 32, high);
#pragma unroll
        for (int k = 0; k < 2; k++) g.codes[k] |= (high[k] >> (i / 32) & 0x01010101u) << 2;
        const int j = i / 16;
        const u8* scales = block + 96;
        const int low = scales[j % 8] >> (j / 8 * 4) & 15, top = scales[8 + j % 4] >> (j / 4 * 2) & 3;
        g.scale = __fmul_rn(f16_at(block + 108), (f32)((low | top << 4) - 32));
        return g;
    }
};

// The factors of Q4_K and Q5_K for group j of 32 elements, from 6-bit scales and minima in 12 bytes.
DEVICE void six_bit_scales(const u8* block, int j, Group& g) {
    const u8* bytes = block + 4;
    int scale, min;
    if (j < 4) {
        scale = bytes[j] & 63;
        min = bytes[j + 4] & 63;
    } else {
        scale = (bytes[j + 4] & 15) | bytes[j - 4] >> 6 << 4;
        min = bytes[j + 4] >> 4 | bytes[j] >> 6 << 4;
    }
    g.scale = __fmul_rn(f16_at(block), (f32)scale);
    g.min = -__fmul_rn(f16_at(block + 2), (f32)min);
}

// The low four bits of element i, in byte i % 32 of its 64.
DEVICE void nibbles64(const u8* bytes, int i, u32 (&out)[2]) {
    load8<4>(bytes + i / 64 * 32 + i % 32, out);
#pragma unroll
    for (int k = 0; k < 2; k++) out[k] = out[k] >> (i / 32 % 2 * 4) & 0x0f0f0f0fu;
}

struct Q4_K {
    static const int ELEMENTS = 256, BYTES = 144, BIAS = 0;
    static const bool HAS_MIN = true;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        nibbles64(block + 16, i, g.codes);
        six_bit_scales(block, i / 32, g);
        return g;
    }
};

struct Q5_K {
    static const int ELEMENTS = 256, BYTES = 176, BIAS = 0;
    static const bool HAS_MIN = true;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        u32 high[2];
        nibbles64(block + 48, i, g.codes);
        load8<4>(block + 16 + i % 32, high);
#pragma unroll
        for (int k = 0; k < 2; k++) g.codes[k] |= (high[k] >> (i / 32) & 0x01010101u) << 4;
        six_bit_scales(block, i / 32, g);
        return g;
    }
};

struct Q6_K {
    static const int ELEMENTS = 256, BYTES = 210, BIAS = 32;
    static const bool HAS_MIN = false;
    static DEVICE Group group(const u8* block, int i) {
        Group g;
        u32 high[2];
        const int l = i % 128;
        load8<2>(block + i / 128 * 64 + l % 64, g.codes);
        pairs<2>(block + 128, i, high);
#pragma unroll
        for (int k = 0; k < 2; k++) g.codes[k] = (g.codes[k] >> (l / 64 * 4) & 0x0f0f0f0fu) | high[k] << 4;
        const int scale = reinterpret_cast<const signed char*>(block)[192 + i / 16];
        g.scale = __fmul_rn(f16_at(block + 208), (f32)scale);
        return g;
    }
};

// Eight values of one row.
DEVICE void store_group(T* p, const f32 (&v)[8]) {
    const int N = Vec<T>::N;
#pragma unroll
    for (int part = 0; part < 8; part += N) {
        f32 some[N];
#pragma unroll
        for (int i = 0; i < N; i++) some[i] = v[part + i];
        store16(p + part, some);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT(THREADS, 6))
dequant_blocks(const u8* blocks, T* w, int out, int in, int ldw, const int* expert_offsets, const int* sorted, const int* chosen,
               int first_expert, int expert_rows) {
    const int SPAN_BYTES = SPAN / FORMAT::ELEMENTS * FORMAT::BYTES;
    static_assert(SPAN % FORMAT::ELEMENTS == 0 && SPAN_BYTES % 16 == 0, "a thread block begins at 16 bytes");
    // load8 reads up to 4 bytes more.
    __shared__ uint4 staged[SPAN_BYTES / 16 + 1];
    const Span span = Choice{expert_offsets, sorted, chosen, first_expert, expert_rows}.span((u32)out, (u32)in / 8);
    const u32 total = span.end, first = span.begin + blockIdx.x * (SPAN / 8);
    if (first >= total) return;
    const u64 begin = (u64)span.begin * 8 / FORMAT::ELEMENTS * FORMAT::BYTES + (u64)blockIdx.x * SPAN_BYTES;
    const u64 end = (u64)total * 8 / FORMAT::ELEMENTS * FORMAT::BYTES;
    const int bytes = (int)min((u64)SPAN_BYTES, end - begin);
    const int LOADS = (SPAN_BYTES / 16 + THREADS - 1) / THREADS;
    uint4 raw[LOADS];
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        const int at = (threadIdx.x + k * THREADS) * 16;
        if (at < bytes) raw[k] = load_part(blocks + begin + at, bytes - at);
    }
#pragma unroll
    for (int k = 0; k < LOADS; k++) {
        const int at = (threadIdx.x + k * THREADS) * 16;
        if (at < bytes) staged[at / 16] = raw[k];
    }
    __syncthreads();
    const u8* shared = reinterpret_cast<const u8*>(staged);
#pragma unroll
    for (int k = 0; k < GROUPS; k++) {
        const u32 local = threadIdx.x + k * THREADS, i = first + local;
        if (i >= total) break;
        const int element = local * 8;
        const Group g = FORMAT::group(shared + element / FORMAT::ELEMENTS * FORMAT::BYTES, element % FORMAT::ELEMENTS);
        f32 v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            // 2^23 + q, and the exact q - BIAS.
            const f32 code = __uint_as_float(__byte_perm(g.codes[j / 4], 0x4b000000u, 0x7540 | j % 4));
            v[j] = __fmul_rn(__fsub_rn(code, (f32)(8388608 + FORMAT::BIAS)), g.scale);
            if (FORMAT::HAS_MIN) v[j] = __fadd_rn(v[j], g.min);
        }
        const Place to = place<8>(i, in);
        store_group(at(w, to.row, ldw, to.col), v);
    }
}
