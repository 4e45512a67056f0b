// Products of up to 32 rows with a 4-bit weight: y = x·Wᵀ + bias + onto, without decoding W into memory.
//
// The blocks are persistent: block b has the tiles b, b + gridDim.x, … of 16 rows of W, and warp w of a block a contiguous
// share of the pairs of scale blocks of 64 values along k. The codes and scales of the next AHEAD pairs, also of the next
// tile, are on their way while one is computed. Lane t reads 16 bytes of a row, half a scale block; lanes t and t ^ 2 then
// exchange halves, so that all four lanes have 16 values of each block. A table of 256 × 32 words in shared memory turns a
// byte of codes into two values; each lane has its own column, so lookups have no bank conflicts. The sum over a scale block
// is multiplied by the scale in f32: the weight is codebook[code] rounded to T, times its f32 scale.
//
// packed [n·k / 2] u8, the even element in the high nibble; absmax [n·k / 64] f32, or with DOUBLE the u8 codes of scales
// map[code]·nested[block >> nested_shift] + offsets[tile / section], rounded as dequant.cu does; x [m, k], bias [n] or null, onto [m, n]
// or null, y [m, n] of T (bf16 or f16) with row strides in elements; y may be onto. n a multiple of 16, k of 64; x and
// packed 16-byte aligned, ldx a multiple of 8.
//
// packed and scales are read while the kernel before this one still runs, which must not write them. With one group, the
// next kernel may begin at once; with more groups, when the last tile is reached.
//
// GROUPS 1 with WARPS 10, or GROUPS 2 or 4 with WARPS 8, m <= 8·GROUPS; DOUBLE 0 or 1. Launch: grid BLOCKS for each SM, at
// most n / 16, block 32·WARPS, dynamic shared memory 65,536 + 512·WARPS·GROUPS.
//   few_rows_4bit(x, packed, absmax, map, nested, offsets, codebook, bias, onto, y, i32 m, n, k, ldx, ldonto, ldy,
//     nested_shift, section)
//
// With EXPERTS, GROUPS 1 and m 1: row r of y is the product of one row of x with the n rows of W of expert chosen[sorted[r]]; the row of
// x is r, or sorted[r] / top_k where top_k > 0. grid.y is the number of rows of y. It starts after the kernel before it has ended,
// which writes the choice.
//   few_rows_4bit(…, section, const int* sorted, const int* chosen, i32 top_k)
//
// The linears of the 36 blocks of Qwen3-4B (2.0 GB of NF4, double quantization; 0.46 ms at 4.3 TB/s) on an H200, in a CUDA
// graph, 2026-11-30: 1 row 1.38 ms, 8 rows 1.55, 16 rows 2.02; with q, k and v, and gate and up, as one weight each 1 row 1.20,
// 8 rows 1.37 (1.44 and 1.61 where the next kernel begins at the last tile). The time is that of instructions, about 200 a warp
// for a pair of scale blocks, and of beginning: a table for each launch.
//
// Tried: 8 bytes a thread without the exchange 1.60 ms for 1 row, 5 to 16 warps, 1 to 4 steps ahead.
// No spills from sm_80 to sm_120.

#ifdef EXPERTS
#define EXPERT_PARAMETERS , const int* sorted, const int* chosen, int top_k
#else
#define EXPERT_PARAMETERS
#endif

static const int AHEAD = 2;
static const int BLOCKS = GROUPS == 4 ? 1 : 2; // an SM
static const u32 TABLE_BYTES = 256 * 128;

// The codes of a pair of scale blocks of rows g and g + 8, and the scale of block t % 2 of row g + t / 2 · 8.
struct Step {
    uint4 codes[2];
    f32 scale;
    u8 code;
};

// Two values, the first in the low half. `column` has zeros where the row's address has ones.
DEVICE u32 look_up(u32 column, u32 row) {
    u32 pair;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"((row & 0x7f80) | column));
    return pair;
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
few_rows_4bit(const T* x, const u8* __restrict__ packed, const void* __restrict__ absmax, const f32* __restrict__ map,
              const f32* __restrict__ nested, const f32* __restrict__ offsets, const f32* __restrict__ codebook,
              const T* bias, const T* onto, T* y, int m, int n, int k, int ldx, int ldonto, int ldy, int nested_shift,
              int section EXPERT_PARAMETERS) {
    // A map of 1 KiB and sums, the table at a multiple of its size, so that addresses need no sum, and again sums.
    extern __shared__ __align__(128) u8 shared[];
    f32* map_values = reinterpret_cast<f32*>(shared);
    Sums& even = *reinterpret_cast<Sums*>(shared + 1024);
    const u32 begin = (u32)__cvta_generic_to_shared(shared);
    const u32 table = (begin + 1024 + (u32)sizeof(Sums) + TABLE_BYTES - 1) & ~(TABLE_BYTES - 1);
    u8* const table_values = shared + (table - begin);
    Sums& odd = *reinterpret_cast<Sums*>(table_values + TABLE_BYTES);

    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const bool right = t >= 2;
    const int blocks = k / 64, pairs = (blocks + 1) / 2, tiles = n / TILE;
    const int from = pairs * warp / WARPS, to = pairs * (warp + 1) / WARPS;

#ifdef EXPERTS
    wait_for_previous();
    const int selection = sorted[blockIdx.y], before = chosen[selection] * tiles; // tiles of the experts before
    x += (u64)(top_k > 0 ? selection / top_k : blockIdx.y) * ldx;
    y += (u64)blockIdx.y * ldy;
#else
    const int before = 0;
#endif
    // Where the next step begins. A warp without a share has no steps.
    int fetch_tile = from < to ? (int)blockIdx.x : tiles, fetch_pair = from;
    const u8* codes_at = packed + ((u64)((before + fetch_tile) * TILE + g) * (k / 2) + 64 * from + 16 * t);
    u32 scale_at = (u32)((before + fetch_tile) * TILE + g + (right ? 8 : 0)) * (u32)blocks + 2 * from + t % 2;
    const u64 lower = (u64)8 * (k / 2);
    const u64 next_codes = (u64)gridDim.x * TILE * (k / 2) - 64 * (to - from);
    const u32 next_scale = gridDim.x * TILE * (u32)blocks - 2 * (to - from);
    auto fetch = [&](Step& step) {
        if (fetch_tile >= tiles) return;
        // Where the number of blocks is odd, the last pair has one.
        const bool whole = 2 * fetch_pair + 2 <= blocks;
        const bool in = whole || !right;
        step.codes[0] = in ? stream16(codes_at) : make_uint4(0, 0, 0, 0);
        step.codes[1] = in ? stream16(codes_at + lower) : make_uint4(0, 0, 0, 0);
        const u32 mine = whole ? scale_at : scale_at - t % 2;
        if (DOUBLE) {
            step.code = __ldg(static_cast<const u8*>(absmax) + mine);
            step.scale = __ldg(nested + (mine >> nested_shift));
        } else {
            step.scale = __ldg(static_cast<const f32*>(absmax) + mine);
        }
        codes_at += 64;
        scale_at += 2;
        if (++fetch_pair == to) {
            fetch_pair = from;
            fetch_tile += gridDim.x;
            codes_at += next_codes;
            scale_at += next_scale;
        }
    };

    if (GROUPS == 1) let_next_begin();
    Step steps[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; a++) fetch(steps[a]);
    f32 shift = DOUBLE ? __ldg(offsets + (before + blockIdx.x) / section) : 0.0f;
    if (DOUBLE)
        for (int i = threadIdx.x; i < 256; i += 32 * WARPS) map_values[i] = __ldg(map + i);
    for (int i = threadIdx.x; i < 256 * 8; i += 32 * WARPS) {
        const u32 byte = i / 8, pair = pack2<T>(__ldg(codebook + (byte >> 4)), __ldg(codebook + (byte & 15)));
        reinterpret_cast<uint4*>(table_values)[i] = make_uint4(pair, pair, pair, pair);
    }
    __syncthreads();
    u32 column = table | lane * 4;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    // x of this lane's row and values: after the exchange, lane t has the part t / 2 + t % 2 · 2 of a block.
    const T* mine = at(x, g, ldx, 16 * (t / 2 + t % 2 * 2));
    // Keeps both in registers, where they would otherwise be computed again in every step.
    asm volatile("" : "+r"(column), "+l"(mine));
    f32 c[GROUPS][4] = {};
    wait_for_previous();

    int tile = blockIdx.x, pair = from, parity = 0;
    while (tile < tiles) {
#pragma unroll
        for (int a = 0; a < AHEAD; a++) {
            if (tile >= tiles) break;
            if (pair < to) {
                const bool whole = 2 * pair + 2 <= blocks;
                const T* const here = mine + 128 * pair;
                auto read_x = [&](uint4 (&values)[2], int r, int d) {
                    const uint4* row = reinterpret_cast<const uint4*>(at(here, 8 * r, ldx, 64 * d));
                    const bool in = 8 * r + g < m && (d == 0 || whole);
                    values[0] = in ? row[0] : zero;
                    values[1] = in ? row[1] : zero;
                };
                // One group is asked for before the codes are looked up; more do not fit into registers.
                uint4 early[2][2];
                if (GROUPS == 1)
#pragma unroll
                    for (int d = 0; d < 2; d++) read_x(early[d], 0, d);
                const f32 scale = DOUBLE ? __fadd_rn(map_values[steps[a].code] * steps[a].scale, shift) : steps[a].scale;
                u32 words[2][2][2]; // [scale block][row][word]
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const uint4& q = steps[a].codes[h];
                    const u32 first = __shfl_xor_sync(0xffffffffu, right ? q.x : q.z, 2);
                    const u32 second = __shfl_xor_sync(0xffffffffu, right ? q.y : q.w, 2);
                    words[0][h][0] = right ? first : q.x;
                    words[0][h][1] = right ? second : q.y;
                    words[1][h][0] = right ? q.z : first;
                    words[1][h][1] = right ? q.w : second;
                }
                fetch(steps[a]);
                pair++;
#pragma unroll
                for (int d = 0; d < 2; d++) {
                    const f32 high = __shfl_sync(0xffffffffu, scale, d, 4), low = __shfl_sync(0xffffffffu, scale, 2 + d, 4);
                    u32 v[2][8];
#pragma unroll
                    for (int h = 0; h < 2; h++)
#pragma unroll
                        for (int i = 0; i < 8; i++) {
                            const u32 word = words[d][h][i / 4], byte = i % 4;
                            v[h][i] = look_up(column, byte == 0 ? word << 7 : word >> (8 * byte - 7));
                        }
#pragma unroll
                    for (int r = 0; r < GROUPS; r++) {
                        uint4 late[2];
                        if (GROUPS > 1) read_x(late, r, d);
                        f32 part[4] = {};
#pragma unroll
                        for (int i = 0; i < 2; i++) {
                            const uint4& some = GROUPS == 1 ? early[d][i] : late[i];
                            mma<T>(part, {v[0][4 * i], v[1][4 * i], v[0][4 * i + 1], v[1][4 * i + 1]}, some.x, some.y);
                            mma<T>(part, {v[0][4 * i + 2], v[1][4 * i + 2], v[0][4 * i + 3], v[1][4 * i + 3]}, some.z, some.w);
                        }
                        c[r][0] += high * part[0];
                        c[r][1] += high * part[1];
                        c[r][2] += low * part[2];
                        c[r][3] += low * part[3];
                    }
                }
            }
            if (pair < to) continue;
            const int current = tile;
            pair = from;
            tile += gridDim.x;
            if (DOUBLE && tile < tiles) shift = __ldg(offsets + (before + tile) / section);
            // Sums alternate between two places, so that one barrier a tile is enough.
            Sums& sums = parity ? odd : even;
            leave_sums(sums, c);
#pragma unroll
            for (int r = 0; r < GROUPS; r++)
#pragma unroll
                for (int e = 0; e < 4; e++) c[r][e] = 0.0f;
            if (GROUPS > 1 && tile >= tiles) let_next_begin();
            __syncthreads();
            write_tile(sums, current, bias, onto, y, m, n, ldonto, ldy);
            parity ^= 1;
        }
    }
}
