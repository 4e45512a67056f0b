// Products with the matrices of experts on any card; kernels/src/ops/grouped.
//
// With x_e the rows offsets[e] .. offsets[e + 1] and W_e one of `experts` matrices below one another:
//   FORM 0: out_e = alpha a_e b_e^T, b_e [n, k];   FORM 1: out_e = alpha a_e b_e, b_e [k, n]
//   FORM 2: out_e = alpha a_e^T b_e, both rows of experts, a [rows, n], b [rows, k], out f32 [experts * n, k]
//   plus what out holds where `add`. Row i of a (and of b, in FORM 2) is row selections[i] / top_k of it where there are selections.
// Sums are f32: mma.sync for 16-bit T, fused multiply-adds for f32.
//
// Layout: row-major, each with its row stride; a and b 16-byte aligned, strides multiples of 8, any width.
//
// Compile with -DT=bf16|f16|f32 -DFORM=0|1|2.
// Launch: block 256; dynamic shared memory 16,384 STAGES + 16 bytes (f32: 32,768 STAGES + 16), STAGES 3 (f32: 2).
//   a, b, out, const int* offsets, const int* a_selections|null, const int* b_selections|null, int experts, n, k, top_k, lda, ldb, ldo,
//   f32 alpha, int add
//   grid FORM 0, 1: ceil(n / 128), at least sum of ceil(rows of e / 128); FORM 2: ceil(k / 128), ceil(n / 128), experts
//
// Status, NVIDIA H200, 2026-11-30, 65,536 rows, 128 experts, 2048 -> 1536, bf16: FORM 0 226 TFLOP/s, FORM 1 232, FORM 2 133. It is
// for cards without wgmma, on none of which it was measured, and for widths that the copy engine does not take.
// Tests: kernels/tests/cuda.rs, with every tail and gather.

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define PLAIN_f32 1
#define TENSOR_CORES !JOIN(PLAIN_, T)
#if FORM == 2
#define OUT f32
#else
#define OUT T
#endif
#define BM 128
#define BN 128
#define BK 32
#define STAGES (sizeof(T) == 4 ? 2 : 3)
#define THREADS 256

const int N = Vec<T>::N;
const int TILE_BYTES = 128 * BK * (int)sizeof(T);

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// The first `bytes` of 16, and zeros after them; of 0 nothing is read.
DEVICE void copy_part_async(u32 to, const T* from, int bytes) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
#else
    const uint4 v = bytes > 0 ? load_part(from, bytes / (int)sizeof(T)) : make_uint4(0, 0, 0, 0);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}

// A tile of 128 × BK (BY_SUM: BK × 128, its rows are summed over) as rows of 16-byte pieces, exchanged within a row so that
// ldmatrix meets no bank twice.
template <bool BY_SUM> struct Tile {
    static const int ROWS = BY_SUM ? BK : 128, PIECES = (BY_SUM ? 128 : BK) / N;
    static DEVICE u32 at(int row, int piece) { return (u32)(row * PIECES + (piece ^ (PIECES == 4 ? row / 2 % 4 : row % 8))) * 16; }

    // Copies the first `rows` rows from row `first` of a matrix on (row i is row selections[i] / top_k, where there are some)
    // and the first `cols` columns from column `col` on; zeros elsewhere.
    static DEVICE void load(u32 tile, const T* from, int ld, int first, int rows, int col, int cols, const int* selections, int top_k) {
#pragma unroll
        for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
            const int p = threadIdx.x + i * THREADS, row = p / PIECES, piece = p % PIECES;
            const int n = row < rows ? max(0, min(N, cols - piece * N)) : 0;
            const T* piece_at = from;
            if (n > 0) {
                const int r = selections ? selections[first + row] / top_k : first + row;
                piece_at = from + (long long)r * ld + col + piece * N;
            }
            copy_part_async(tile + at(row, piece), piece_at, n * (int)sizeof(T));
        }
    }
};
typedef Tile<FORM == 2> TileA;
typedef Tile<FORM != 0> TileB;

#if TENSOR_CORES
template <bool TRANSPOSED> DEVICE void ldmatrix(u32 (&r)[4], u32 address) {
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// A warp has 64 rows by 32 columns: sum 16m + 4n + 2r + c is row 16m + 8r + lane / 4, column 8n + 2(lane % 4) + c of them.
DEVICE int sum_row(int i) { return threadIdx.x / 128 * 64 + i / 16 * 16 + i / 2 % 2 * 8 + threadIdx.x % 32 / 4; }
DEVICE int sum_col(int i) { return threadIdx.x / 32 % 4 * 32 + i / 4 % 4 * 8 + threadIdx.x % 4 * 2 + i % 2; }

DEVICE void multiply(f32 (&sums)[64], u32 a, u32 b) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 128 * 64, col = threadIdx.x / 32 % 4 * 32;
    const int low = lane % 8, bit3 = lane / 8 % 2, bit4 = lane / 16;
#pragma unroll
    for (int k = 0; k < BK; k += 16) {
        u32 fb[2][4];
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const int c = col + 16 * n;
            const u32 at = FORM == 0 ? TileB::at(c + bit4 * 8 + low, k / 8 + bit3) : TileB::at(k + bit3 * 8 + low, c / 8 + bit4);
            ldmatrix<FORM != 0>(fb[n], b + at);
        }
#pragma unroll
        for (int m = 0; m < 4; m++) {
            const int r = row + 16 * m;
            const u32 at = FORM == 2 ? TileA::at(k + bit4 * 8 + low, r / 8 + bit3) : TileA::at(r + bit3 * 8 + low, k / 8 + bit4);
            u32 fa[4];
            ldmatrix<FORM == 2>(fa, a + at);
#pragma unroll
            for (int n = 0; n < 4; n++) mma<T>(&sums[16 * m + 4 * n], fa, fb[n / 2][n % 2 * 2], fb[n / 2][n % 2 * 2 + 1]);
        }
    }
}
#else
// A thread has 8 rows by 8 columns.
DEVICE int sum_row(int i) { return threadIdx.x / 16 + i / 8 * 16; }
DEVICE int sum_col(int i) { return threadIdx.x % 16 + i % 8 * 16; }

template <typename L> DEVICE f32 element(u32 tile, bool by_sum, int i, int k) {
    const int row = by_sum ? k : i, col = by_sum ? i : k;
    f32 x;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(tile + L::at(row, col / N) + (u32)(col % N) * 4) : "memory");
    return x;
}
DEVICE void multiply(f32 (&sums)[64], u32 a, u32 b) {
    for (int k = 0; k < BK; k++) {
        f32 x[8], y[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x[i] = element<TileA>(a, FORM == 2, sum_row(8 * i), k);
            y[i] = element<TileB>(b, FORM != 0, sum_col(i), k);
        }
#pragma unroll
        for (int i = 0; i < 64; i++) sums[i] = fmaf(x[i / 8], y[i % 8], sums[i]);
    }
}
#endif

// The expert and the first row of a unit of 128 rows, counted over all experts; an expert of -1 beyond the last. The block arrives.
DEVICE int2 find_unit(int unit, const int* offsets, int experts, int2& found) {
    if (threadIdx.x < 32) {
        const int lane = threadIdx.x;
        if (lane == 0) found = make_int2(-1, 0);
        __syncwarp();
        int before = 0;
        for (int first = 0; first < experts && before <= unit; first += 32) {
            const int e = first + lane;
            const int begin = e < experts ? offsets[e] : 0, rows = e < experts ? offsets[e + 1] - begin : 0;
            const int units = (rows + BM - 1) / BM;
            int scan = units;
#pragma unroll
            for (int o = 1; o < 32; o <<= 1) {
                const int below = __shfl_up_sync(0xffffffffu, scan, o);
                if (lane >= o) scan += below;
            }
            const int mine = unit - before - (scan - units);
            if (mine >= 0 && mine < units) found = make_int2(e, begin + mine * BM);
            before += __shfl_sync(0xffffffffu, scan, 31);
        }
    }
    __syncthreads();
    return found;
}

extern "C" __global__ void __launch_bounds__(THREADS, FORM == 2 || __CUDA_ARCH__ < 900 ? 1 : 2)
grouped(const T* a, const T* b, OUT* out, const int* offsets, const int* a_selections, const int* b_selections, int experts, int n,
        int k, int top_k, int lda, int ldb, int ldo, f32 alpha, int add) {
    extern __shared__ __align__(128) u8 shared[];
    const u32 tiles = shared_address(shared);
    const int col = blockIdx.x * BN;
    int expert, row, rows, blocks;
#if FORM == 2
    expert = blockIdx.z;
    row = blockIdx.y * BM;
    const int begin = offsets[expert], end = offsets[expert + 1];
    rows = n - row;
    blocks = (end - begin + BK - 1) / BK;
    const int cols = k - col;
    if (blocks == 0) return;
#else
    const int2 unit = find_unit(blockIdx.y, offsets, experts, *reinterpret_cast<int2*>(shared + STAGES * 2 * TILE_BYTES));
    expert = unit.x;
    if (expert < 0) return;
    row = unit.y;
    rows = offsets[expert + 1] - row;
    blocks = (k + BK - 1) / BK;
    const int cols = n - col;
    const T* weight = b + (long long)expert * (FORM == 0 ? n : k) * ldb;
#endif
    auto load = [&](int block) {
        const u32 stage = tiles + block % STAGES * 2 * TILE_BYTES;
        const int at = block * BK;
#if FORM == 2
        TileA::load(stage, a, lda, begin + at, end - begin - at, row, rows, a_selections, top_k);
        TileB::load(stage + TILE_BYTES, b, ldb, begin + at, end - begin - at, col, cols, b_selections, top_k);
#else
        TileA::load(stage, a, lda, row, rows, at, k - at, a_selections, top_k);
        if (FORM == 0) TileB::load(stage + TILE_BYTES, weight, ldb, col, cols, at, k - at, nullptr, 1);
        else TileB::load(stage + TILE_BYTES, weight, ldb, at, k - at, col, cols, nullptr, 1);
#endif
    };
    f32 sums[64];
#pragma unroll
    for (int i = 0; i < 64; i++) sums[i] = 0.0f;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < blocks) load(s);
        commit_copies();
    }
    for (int block = 0; block < blocks; block++) {
        copies_left<STAGES - 2>();
        __syncthreads();
        if (block + STAGES - 1 < blocks) load(block + STAGES - 1);
        commit_copies();
        const u32 stage = tiles + block % STAGES * 2 * TILE_BYTES;
        multiply(sums, stage, stage + TILE_BYTES);
    }
    OUT* to = out + (FORM == 2 ? (long long)(expert * n + row) : (long long)row) * ldo + col;
#pragma unroll
    for (int i = 0; i < 64; i++) {
        const int r = sum_row(i), c = sum_col(i);
        if (r < rows && c < cols) {
            OUT& place = to[(long long)r * ldo + c];
            place = from_f32<OUT>(alpha * sums[i] + (add ? to_f32(place) : 0.0f));
        }
    }
}
