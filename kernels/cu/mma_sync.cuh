// Warp-level matrix products on the tensor cores of every GPU from sm_80 up: cp.async into swizzled tiles of shared
// memory, ldmatrix out of them, mma.sync m16n8k16 with f32 sums. The loader puts this text between mma.cuh and the
// attention kernels that use it; it requires T (bf16 or f16), HEAD_DIM (64, 128 or 256) and WARPS.
//
// A tile is rows of HEAD_DIM values; the 16-byte piece c of row r is stored at position c ^ (r % 8) of its row, so that the
// eight rows which one ldmatrix phase reads, and the eight which a warp writes, cover all 32 banks.
//
// Fragments follow the PTX manual. With g = lane / 4 and c = 2 · (lane % 4), an accumulator [4] holds
// (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1) of a 16 × 8 block, which is half of an A fragment of a 16 × 16 block:
// a product's result, rounded and packed in pairs, is the next product's A without leaving its registers.

static const int THREADS = 32 * WARPS;
static const int ROW_BYTES = HEAD_DIM * 2;
static const int PIECES = ROW_BYTES / 16;
static const int D8 = HEAD_DIM / 8;

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// The block copies rows 0 .. `valid` - 1 of a matrix into a tile of ROWS rows and zeroes the others.
template <int ROWS> DEVICE void load_tile(u32 tile, const T* from, int ld, int valid) {
    static_assert(ROWS * PIECES % THREADS == 0 && THREADS % PIECES == 0, "every thread copies as many pieces");
    const int piece = threadIdx.x % PIECES;
#pragma unroll
    for (int i = 0; i < ROWS * PIECES / THREADS; i++) {
        const int row = threadIdx.x / PIECES + i * (THREADS / PIECES);
        copy16_async(tile + row * ROW_BYTES + ((piece ^ (row % 8)) << 4),
                     from + (long long)(row < valid ? row : 0) * ld + piece * 8, row < valid);
    }
}

// Where this lane's row of a 16-row fragment begins, with the rows of the fragment's matrices in A's order (also B's,
// when it is transposed on the way) or in B's. A step of 16 columns is then ^ 32, a step of rows + ROW_BYTES.
DEVICE u32 fragment_a(u32 tile) {
    const int row = threadIdx.x % 16, half = threadIdx.x / 16 % 2;
    return tile + row * ROW_BYTES + ((half ^ (row % 8)) << 4);
}
DEVICE u32 fragment_b(u32 tile) {
    const int row = threadIdx.x % 8 + threadIdx.x / 16 % 2 * 8, half = threadIdx.x / 8 % 2;
    return tile + row * ROW_BYTES + ((half ^ (row % 8)) << 4);
}

DEVICE void ldmatrix(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
DEVICE void ldmatrix_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// c = A·Bᵀ over HEAD_DIM: 16·M rows of a tile against 8·N rows of another; `a` from fragment_a, `b` from fragment_b.
template <int M, int N> DEVICE void product_rows(f32 (&c)[M][N][4], u32 a, u32 b) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] = 0.0f;
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 16; k++) {
        u32 fa[M][4];
#pragma unroll
        for (int m = 0; m < M; m++) ldmatrix(fa[m], (a ^ (k * 32)) + m * 16 * ROW_BYTES);
#pragma unroll
        for (int n = 0; n < N; n += 2) {
            u32 fb[4];
            ldmatrix(fb, (b ^ (k * 32)) + n * 8 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c[m][n], fa[m], fb[0], fb[1]);
                mma<T>(c[m][n + 1], fa[m], fb[2], fb[3]);
            }
        }
    }
}

// c += P·B: P, 16·M × 16·K, from registers; B the 16·K rows of a tile; `b` from fragment_a.
template <int M, int K> DEVICE void product_columns(f32 (&c)[M][D8][4], const u32 (&p)[M][K][4], u32 b) {
#pragma unroll
    for (int k = 0; k < K; k++) {
#pragma unroll
        for (int n = 0; n < D8; n += 2) {
            u32 fb[4];
            ldmatrix_transposed(fb, (b ^ (n * 16)) + k * 16 * ROW_BYTES);
#pragma unroll
            for (int m = 0; m < M; m++) {
                mma<T>(c[m][n], p[m][k], fb[0], fb[1]);
                mma<T>(c[m][n + 1], p[m][k], fb[2], fb[3]);
            }
        }
    }
}

// Accumulators as the A fragments of the next product.
template <int M, int N> DEVICE void round_to_a(u32 (&p)[M][N / 2][4], const f32 (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++) {
            p[m][n / 2][n % 2 * 2] = pack2<T>(c[m][n][0], c[m][n][1]);
            p[m][n / 2][n % 2 * 2 + 1] = pack2<T>(c[m][n][2], c[m][n][3]);
        }
}

// A warp writes the first `valid` of its 16·M rows, times factor[m][half], to a matrix. They pass through 16·M rows of
// shared memory, whose contents only this warp may still want, so that global memory gets whole 16-byte pieces.
template <int M>
DEVICE void store_rows(T* to, int ld, int valid, u8* rows, const f32 (&c)[M][D8][4], const f32 (&factor)[M][2]) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const int row = m * 16 + half * 8 + lane / 4;
#pragma unroll
            for (int n = 0; n < D8; n++)
                *reinterpret_cast<u32*>(rows + row * ROW_BYTES + ((n ^ (row % 8)) << 4) + lane % 4 * 4) =
                    pack2<T>(c[m][n][half * 2] * factor[m][half], c[m][n][half * 2 + 1] * factor[m][half]);
        }
    __syncwarp();
    const int piece = lane % PIECES;
#pragma unroll
    for (int i = 0; i < M * 16 * PIECES / 32; i++) {
        const int row = lane / PIECES + i * (32 / PIECES);
        if (row < valid)
            *reinterpret_cast<uint4*>(to + (long long)row * ld + piece * 8) =
                *reinterpret_cast<const uint4*>(rows + row * ROW_BYTES + ((piece ^ (row % 8)) << 4));
    }
}

// Products q·k as scores without their factor.
template <int M, int N> DEVICE void shape_scores(f32 (&s)[M][N][4], const ScoreScale& score) {
    if (HAS_SOFTCAP) {
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) s[m][n][e] = score.shaped(s[m][n][e]);
    }
}

// Adds a block of scores to the running softmax: s becomes probabilities relative to `top`.
// Sums are rescaled only when a maximum grows by more than SLACK powers of two. Until then they may exceed 1 by that
// factor, which f32 and the 16-bit probabilities represent without loss.
template <int M, int N8>
DEVICE void softmax_step(f32 (&s)[M][N8][4], f32 (&acc)[M][D8][4], f32 (&top)[M][2], f32 (&sum)[M][2], f32 scale_log2) {
    constexpr f32 SLACK = 8.0f;
#pragma unroll
    for (int m = 0; m < M; m++) {
        f32 highest[2];
        bool grew = false;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            f32 x = s[m][0][half * 2];
#pragma unroll
            for (int n = 0; n < N8; n++) x = fmaxf(x, fmaxf(s[m][n][half * 2], s[m][n][half * 2 + 1]));
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
            x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
            highest[half] = x;
            grew |= (x - top[m][half]) * scale_log2 > SLACK;
        }
        if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const f32 next = fmaxf(top[m][half], highest[half]);
                const f32 shrink = exp2_approx((top[m][half] - next) * scale_log2);
                top[m][half] = next;
                sum[m][half] *= shrink;
#pragma unroll
                for (int d = 0; d < D8; d++) {
                    acc[m][d][half * 2] *= shrink;
                    acc[m][d][half * 2 + 1] *= shrink;
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const f32 offset = -top[m][half] * scale_log2;
#pragma unroll
            for (int n = 0; n < N8; n++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    f32& x = s[m][n][half * 2 + e];
                    x = exp2_approx(fmaf(x, scale_log2, offset));
                    sum[m][half] += x;
                }
        }
    }
}
