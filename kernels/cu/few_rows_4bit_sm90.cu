// Products of 9 to 64 rows with a 4-bit weight: y = x·Wᵀ + bias + onto, without decoding W into memory. W is the first
// operand of wgmma, from registers, and x the second, from shared memory.
//
// A block has 128 rows of W and a share of k in steps of 128 values; a cluster of blocks has all of k, and each of the two
// warpgroups of a block 64 rows. Codes pass through shared memory, copied three steps ahead, and so does x, two steps or,
// with 64 rows, one. A table in shared memory turns a byte of codes into two values: entry b is at 256·b, with a column for
// each lane, so that a lookup is one PRMT and one load without bank conflicts. The gaps of 128 bytes between entries hold
// the codes. The sum over a scale block of 64 values is multiplied by its scale in f32: the weight is codebook[code]
// rounded to T, times its f32 scale. The blocks of a cluster add their sums through distributed shared memory, always in
// the same order.
//
// The order of k within a scale block is free as long as both operands agree. Lane t of four reads the values
// 16t … 16t + 15 of a row of W, and its values 4i … 4i + 3 stand for k = 2t, 2t + 1, 2t + 8, 2t + 9 of product i; pairs of
// x are stored in that order.
//
// Arguments as for few_rows_4bit.cu. packed and scales are read while the kernel before this one still runs, which must
// not write them.
//
// GROUPS 2, 4 or 8, m <= 8·GROUPS; DOUBLE 0 or 1; sm_90a. Launch: grid (S, ceil(n / 128)) in clusters of (S, 1), S at most
// 8, block 256, dynamic shared memory 65,536 + X_BUFFERS·2,048·GROUPS + 1,024·ceil(ceil(k / 128) / S).
//   few_rows_4bit_sm90(x, packed, absmax, map, nested, offsets, codebook, bias, onto, y, i32 m, n, k, ldx, ldonto, ldy,
//     nested_shift, section), section in rows
//
// The linears of the 36 blocks of Qwen3-4B (2.0 GB of NF4, double quantization; 0.46 ms at 4.3 TB/s) with q, k and v, and
// gate and up, as one weight each, on an H200, in a CUDA graph, 2026-12-01: 16 rows 1.92 ms (few_rows_4bit.cu 2.07), 32 rows
// 2.32 (3.51), 64 rows 3.44; 1 row 1.61 (1.25), 8 rows 1.68 (1.42). cuBLAS with bf16 weights: 2.56 for 32 rows. A block
// alone on an SM takes 0.49 µs for a step, mostly the latency of lookups and wgmma one after another, and 2.5 µs beside
// its steps.
//
// Tried: clusters of 3, 5, 6 and 7 blocks, up to 1.5 times as long; a prefetch of 128 bytes with each copy of codes, the same.
// No spills.

static const int TILE = 128;                        // rows of W of a block
static const int STEP = 128;                        // values of k of a step
static const int N = 8 * GROUPS;                    // rows of x
static const int X_BUFFERS = GROUPS == 8 ? 2 : 4;   // steps of x in shared memory
static const int X_AHEAD = X_BUFFERS / 2;
static const int CODES_AHEAD = 3;
static const u32 X_BYTES = 256 * N;
static const int PITCH = TILE + 4;                  // of sums in shared memory

// d = or += a·b of 64 rows of W and N rows of x for 16 values of k.
#define FEW_ROWS_WGMMA(n, list, add) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." STRING(T) "." STRING(T) " " list add
#define ACC8 "{%0, %1, %2, %3, %4, %5, %6, %7}"
#define ACC16 "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}"
template <bool ADD> DEVICE void product(f32 (&d)[8], const u32* a, u64 b) {
    if (ADD)
        asm volatile(FEW_ROWS_WGMMA(16, ACC8, ", {%8, %9, %10, %11}, %12, 1, 1, 1, 0;")
                     : REG8("+f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile(FEW_ROWS_WGMMA(16, ACC8, ", {%8, %9, %10, %11}, %12, 0, 1, 1, 0;")
                     : REG8("=f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <bool ADD> DEVICE void product(f32 (&d)[16], const u32* a, u64 b) {
    if (ADD)
        asm volatile(FEW_ROWS_WGMMA(32, ACC16, ", {%16, %17, %18, %19}, %20, 1, 1, 1, 0;")
                     : REG8("+f", d, 0), REG8("+f", d, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile(FEW_ROWS_WGMMA(32, ACC16, ", {%16, %17, %18, %19}, %20, 0, 1, 1, 0;")
                     : REG8("=f", d, 0), REG8("=f", d, 8) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <bool ADD> DEVICE void product(f32 (&d)[32], const u32* a, u64 b) {
    if (ADD)
        asm volatile(FEW_ROWS_WGMMA(64, ACC32, ", {%32, %33, %34, %35}, %36, 1, 1, 1, 0;")
                     : REG32("+f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
    else
        asm volatile(FEW_ROWS_WGMMA(64, ACC32, ", {%32, %33, %34, %35}, %36, 0, 1, 1, 0;")
                     : REG32("=f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// The f32 at a shared address of a block of the cluster.
DEVICE f32 load_of_rank(u32 at, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    f32 x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
    return x;
}

extern "C" __global__ void __launch_bounds__(256, 2)
few_rows_4bit_sm90(const T* x, const u8* __restrict__ packed, const void* __restrict__ absmax, const f32* __restrict__ map,
                   const f32* __restrict__ nested, const f32* __restrict__ offsets, const f32* __restrict__ codebook,
                   const T* bias, const T* onto, T* y, int m, int n, int k, int ldx, int ldonto, int ldy, int nested_shift,
                   int section) {
    extern __shared__ __align__(1024) u8 shared[];
    // [x, X_BUFFERS][table with codes][scales, [steps][TILE] float2]
    u8* const table = shared + X_BUFFERS * X_BYTES;
    float2* const scales = reinterpret_cast<float2*>(table + 65536);
    const u32 x_at = (u32)__cvta_generic_to_shared(shared), table_at = x_at + X_BUFFERS * X_BYTES;

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.y * TILE, blocks = k / 64, all = (blocks + 1) / 2;
    const int rank = blockIdx.x, ranks = gridDim.x;
    const int from = all * rank / ranks, steps = all * (rank + 1) / ranks - from;

    let_next_begin();

    // Codes: this lane copies the piece lane % 4 of the rows lane / 4 and lane / 4 + 8 of its warp's 16.
    const u8* codes_from[2];
    u32 codes_to[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = g + 8 * h, d = t / 2;
        codes_from[h] = packed + (u64)min(first + 16 * warp + row, n - 1) * (k / 2) + (u64)from * 64 + 16 * t;
        codes_to[h] = table_at + (warp * 8 + d * 4 + row / 4) * 256 + 128 + (row + 2 * d) % 4 * 32 + t % 2 * 16;
    }
    auto copy_codes = [&](int step) {
        if (step < steps) {
            const bool in = 2 * (from + step) + t / 2 < blocks;
#pragma unroll
            for (int h = 0; h < 2; h++)
                copy16_async(codes_to[h] + step % 4 * (64 * 256), codes_from[h] + (in ? step * 64 : 0), in);
        }
    };
    // x: a warp copies the row `warp` of each group of 8, a pair of values a lane.
    const T* x_from = at(x, warp, ldx, from * STEP + 2 * lane);
    const u32 x_to = x_at + warp * 128 + ((lane % 8) ^ warp) * 16 + lane / 8 * 4;
    auto copy_x = [&](int step) {
        if (step < steps) {
#pragma unroll
            for (int i = 0; i < 2 * GROUPS; i++) {
                const int d = i % 2, r = i / 2;
                const bool in = 8 * r + warp < m && 2 * (from + step) + d < blocks;
                copy4_async(x_to + step % X_BUFFERS * X_BYTES + d * (128 * N) + r * 1024,
                            in ? at(x_from, 8 * r, ldx, step * STEP + 64 * d) : x, in);
            }
        }
    };

#pragma unroll
    for (int step = 0; step < CODES_AHEAD; step++) copy_codes(step);
    // Table: 16 bytes a thread and turn.
#pragma unroll
    for (int i = threadIdx.x; i < 256 * 8; i += 256) {
        const u32 byte = i / 8, pair = pack2<T>(__ldg(codebook + (byte >> 4)), __ldg(codebook + (byte & 15)));
        *reinterpret_cast<uint4*>(table + byte * 256 + i % 8 * 16) = make_uint4(pair, pair, pair, pair);
    }
    {
        const int row = threadIdx.x / 2, d = threadIdx.x % 2, at_row = min(first + row, n - 1);
        const f32 shift = DOUBLE ? __ldg(offsets + at_row / section) : 0.0f;
        const u32 begin = (u32)at_row * (u32)blocks + 2 * from + d;
#pragma unroll 4
        for (int step = 0; step < steps; step++) {
            f32 scale = 0.0f;
            if (2 * (from + step) + d < blocks) {
                const u32 block = begin + 2 * step;
                if (DOUBLE) {
                    const u8 code = __ldg(static_cast<const u8*>(absmax) + block);
                    scale = __fadd_rn(__ldg(map + code) * __ldg(nested + (block >> nested_shift)), shift);
                } else {
                    scale = __ldg(static_cast<const f32*>(absmax) + block);
                }
            }
            reinterpret_cast<f32*>(scales + step * TILE + row)[d] = scale;
        }
    }
    wait_for_previous();
#pragma unroll
    for (int step = 0; step < X_AHEAD; step++) {
        copy_x(step);
        commit_copies();
    }

    f32 acc[4 * GROUPS], part[4 * GROUPS];
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; i++) acc[i] = part[i] = 0.0f;
    f32 scale[2] = {0.0f, 0.0f}; // of the products that run, rows g and g + 8
    auto finish = [&]() {
        wgmma_wait<0>(part);
#pragma unroll
        for (int i = 0; i < 4 * GROUPS; i++) acc[i] = fmaf(scale[i % 4 / 2], part[i], acc[i]);
    };
    const u32 column = lane * 4;
    auto look_up = [&](u32 word, int byte) {
        return *reinterpret_cast<const u32*>(table + __byte_perm(word, column, 0x5504 | byte << 4));
    };
    const u8* const my_codes = table + warp * 8 * 256 + 128;
    const float2* const my_scales = scales + warp * 16 + g;

    for (int step = 0; step < steps; step++) {
        if (X_BUFFERS == 2) finish();
        copies_left<X_AHEAD - 1>();
        fence_async();
        __syncthreads();
        copy_codes(step + CODES_AHEAD);
        copy_x(step + X_AHEAD);
        commit_copies();
        const u8* const codes = my_codes + step % 4 * (64 * 256);
        const u64 b = descriptor(x_at + step % X_BUFFERS * X_BYTES, 0);
        u32 a[2][16];
#pragma unroll
        for (int d = 0; d < 2; d++) {
            uint2 words[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = g + 8 * h;
                words[h] = *reinterpret_cast<const uint2*>(codes + (d * 4 + row / 4) * 256 + (row + 2 * d) % 4 * 32 + 8 * t);
            }
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int h = 0; h < 2; h++)
#pragma unroll
                    for (int e = 0; e < 2; e++)
                        a[d][4 * i + h + 2 * e] = look_up(i < 2 ? words[h].x : words[h].y, i % 2 * 2 + e);
            if (X_BUFFERS != 2 || d == 1) finish();
            wgmma_fence();
            product<false>(part, a[d], b + d * (128 * N / 16));
#pragma unroll
            for (int i = 1; i < 4; i++) product<true>(part, a[d] + 4 * i, b + d * (128 * N / 16) + 2 * i);
            wgmma_commit();
#pragma unroll
            for (int h = 0; h < 2; h++) scale[h] = reinterpret_cast<const f32*>(my_scales + step * TILE + 8 * h)[d];
        }
    }
    finish();
    __syncthreads();
    // Sums of this block, [N][PITCH].
    f32* const sums = reinterpret_cast<f32*>(shared);
#pragma unroll
    for (int i = 0; i < 4 * GROUPS; i++)
        sums[(8 * (i / 4) + 2 * t + i % 2) * PITCH + 16 * warp + g + i % 4 / 2 * 8] = acc[i];
    cluster_sync<2>();
    for (int i = rank * 256 + threadIdx.x; i < m * TILE; i += ranks * 256) {
        const int row = i / TILE, col = first + i % TILE;
        if (col >= n) continue;
        f32 sum = 0.0f;
        for (int other = 0; other < ranks; other++) sum += load_of_rank(x_at + (row * PITCH + i % TILE) * 4, other);
        if (bias) sum += to_f32(bias[col]);
        if (onto) sum += to_f32(*at(onto, row, ldonto, col));
        *at(y, row, ldy, col) = from_f32<T>(sum);
    }
    // No block may end while another one reads its sums.
    cluster_sync<2>();
}
