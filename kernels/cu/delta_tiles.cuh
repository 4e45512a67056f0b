// Products of small tiles in shared memory, for the gated delta rule. The loader puts this text between mma.cuh and
// gated_delta.cu or gated_delta_bwd.cu; it requires T, DK and DV.
//
// A tile is rows of E values; rows lie WIDTH + PAD elements apart, so that the eight rows which one ldmatrix phase reads
// cover all 32 banks. For T of 16 bits E is T and products run on the tensor cores (mma.sync m16n8k16, sums in f32); for f32
// they are f32 multiply-adds of the same fragments, so that both share every line around them.
//
// Fragments: with g = lane / 4 and c = 2 · (lane % 4), an accumulator [4] holds (g, c), (g, c + 1), (g + 8, c), (g + 8, c + 1)
// of a 16 × 8 block.

typedef T E;
static const bool CORES = sizeof(E) == 2;
static const int PAD = 16 / sizeof(E);

DEVICE int lane_row() { return threadIdx.x % 32 / 4; }
DEVICE int lane_col() { return threadIdx.x % 4 * 2; }

DEVICE void copy16(E* to, const E* from, bool valid) {
    copy16_async((u32)__cvta_generic_to_shared(to), from, valid);
}
DEVICE void commit() { commit_copies(); }
template <int LEFT> DEVICE void arrived() { copies_left<LEFT>(); }

// The block copies `valid` rows of a matrix into a tile of ROWS rows and zeroes the others.
template <int ROWS, int WIDTH> DEVICE void load_rows(E* tile, const E* from, long long ld, int valid, int threads) {
    const int N = Vec<E>::N, PIECES = WIDTH / N;
    for (int i = threadIdx.x; i < ROWS * PIECES; i += threads) {
        const int row = i / PIECES, col = i % PIECES * N;
        copy16(tile + row * (WIDTH + PAD) + col, from + (row < valid ? row : 0) * ld + col, row < valid);
    }
}

DEVICE void ldmatrix4(u32 (&r)[4], const E* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(p))
                 : "memory");
}
DEVICE void ldmatrix4_transposed(u32 (&r)[4], const E* p) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"((u32)__cvta_generic_to_shared(p))
                 : "memory");
}

// Not used; code for f32 that does not run must compile.
template <> DEVICE void mma<f32>(f32*, const u32 (&)[4], u32, u32) {}

// How an operand lies: element (row, k) of A at [row][k] or, transposed, at [k][row]; element (k, col) of B at [k][col] or,
// transposed, at [col][k].
enum Lies { PLAIN, TURNED };

template <int M, int N> DEVICE void clear(f32 (&c)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; m++)
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) c[m][n][e] = 0.0f;
}

// c += A·B for the 16·M × 8·N block whose first row of A and column of B the pointers name, over K; N is even.
template <Lies A, Lies B, int K, int LDA, int LDB, int M, int N>
DEVICE void product(f32 (&c)[M][N][4], const E* a, const E* b) {
    if (CORES) {
        const int lane = threadIdx.x % 32;
        // Rows of 16 with two halves of 8 columns, in the order of A's four matrices and in that of two of B.
        const int row_a = lane % 16, half_a = lane / 16 * 8;
        const int row_b = lane % 8 + lane / 16 * 8, half_b = lane / 8 % 2 * 8;
        const E* at = A == PLAIN ? a + row_a * LDA + half_a : a + row_b * LDA + half_b;
        const E* bt = B == PLAIN ? b + row_a * LDB + half_a : b + row_b * LDB + half_b;
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            u32 fa[M][4];
#pragma unroll
            for (int m = 0; m < M; m++) {
                if (A == PLAIN) ldmatrix4(fa[m], at + m * 16 * LDA + k);
                else ldmatrix4_transposed(fa[m], at + k * LDA + m * 16);
            }
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                u32 fb[4];
                if (B == PLAIN) ldmatrix4_transposed(fb, bt + k * LDB + n * 8);
                else ldmatrix4(fb, bt + n * 8 * LDB + k);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma<E>(c[m][n], fa[m], fb[0], fb[1]);
                    mma<E>(c[m][n + 1], fa[m], fb[2], fb[3]);
                }
            }
        }
        return;
    }
    const int g = lane_row(), l = lane_col(), depth = CORES ? 0 : K;
#pragma unroll 2
    for (int k = 0; k < depth; k++) {
        f32 fa[M][2], fb[N][2];
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int row = m * 16 + g + h * 8;
                fa[m][h] = to_f32(A == PLAIN ? a[row * LDA + k] : a[k * LDA + row]);
            }
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int col = n * 8 + l + h;
                fb[n][h] = to_f32(B == PLAIN ? b[k * LDB + col] : b[col * LDB + k]);
            }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) c[m][n][e] = fmaf(fa[m][e / 2], fb[n][e % 2], c[m][n][e]);
    }
}

// As `product` with A in global memory: row r of it at a + r·ld, zeros from row `valid` on.
template <Lies B, int K, int LDB, int M, int N>
DEVICE void product_from(f32 (&c)[M][N][4], const E* a, long long ld, int valid, const E* b) {
    const int g = lane_row(), l = lane_col();
    const E* rows[2 * M];
    bool in[2 * M];
#pragma unroll
    for (int i = 0; i < 2 * M; i++) {
        in[i] = g + i * 8 < valid;
        rows[i] = a + (in[i] ? g + i * 8 : 0) * ld;
    }
    if (CORES) {
        const int lane = threadIdx.x % 32;
        const int row_a = lane % 16, half_a = lane / 16 * 8;
        const int row_b = lane % 8 + lane / 16 * 8, half_b = lane / 8 % 2 * 8;
        const E* bt = B == PLAIN ? b + row_a * LDB + half_a : b + row_b * LDB + half_b;
#pragma unroll
        for (int k = 0; k < K; k += 16) {
            u32 fa[M][4];
#pragma unroll
            for (int m = 0; m < M; m++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int row = m * 2 + i % 2;
                    const u32* p = reinterpret_cast<const u32*>(rows[row] + k + i / 2 * 8 + l);
                    fa[m][i] = in[row] ? *p : 0;
                }
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                u32 fb[4];
                if (B == PLAIN) ldmatrix4_transposed(fb, bt + k * LDB + n * 8);
                else ldmatrix4(fb, bt + n * 8 * LDB + k);
#pragma unroll
                for (int m = 0; m < M; m++) {
                    mma<E>(c[m][n], fa[m], fb[0], fb[1]);
                    mma<E>(c[m][n + 1], fa[m], fb[2], fb[3]);
                }
            }
        }
        return;
    }
    const int depth = CORES ? 0 : K;
#pragma unroll 2
    for (int k = 0; k < depth; k++) {
        f32 fa[2 * M], fb[N][2];
#pragma unroll
        for (int i = 0; i < 2 * M; i++) fa[i] = in[i] ? to_f32(rows[i][k]) : 0.0f;
#pragma unroll
        for (int n = 0; n < N; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const int col = n * 8 + l + h;
                fb[n][h] = to_f32(B == PLAIN ? b[k * LDB + col] : b[col * LDB + k]);
            }
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int n = 0; n < N; n++)
#pragma unroll
                for (int e = 0; e < 4; e++) c[m][n][e] = fmaf(fa[m * 2 + e / 2], fb[n][e % 2], c[m][n][e]);
    }
}

template <typename X> DEVICE void store_two(X* p, f32 lo, f32 hi) { *reinterpret_cast<u32*>(p) = pack2<X>(lo, hi); }
template <> DEVICE void store_two<f32>(f32* p, f32 lo, f32 hi) { *reinterpret_cast<float2*>(p) = make_float2(lo, hi); }
DEVICE void load_two(const E* p, f32 (&v)[2]) {
    E e[2];
    if (CORES) *reinterpret_cast<u32*>(e) = *reinterpret_cast<const u32*>(p);
    else *reinterpret_cast<float2*>(e) = *reinterpret_cast<const float2*>(p);
    v[0] = to_f32(e[0]);
    v[1] = to_f32(e[1]);
}

// ---- Operands in registers: blocks of 16 rows whose K columns lie as accumulators do.

DEVICE void unpack2(u32 pair, f32& lo, f32& hi) {
    E e[2];
    *reinterpret_cast<u32*>(e) = pair;
    lo = to_f32(e[0]);
    hi = to_f32(e[1]);
}
DEVICE u32 turned(u32 block) {
    u32 y;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(block));
    return y;
}
template <typename X> DEVICE u32 pack_pair(f32 lo, f32 hi) { return pack2<X>(lo, hi); }
template <> DEVICE u32 pack_pair<f32>(f32, f32) { return 0; }

// A left operand: accumulators rounded to E.
template <int K> struct Held {
    u32 pairs[CORES ? K / 16 : 1][4];
    f32 values[CORES ? 1 : K / 8][4];
    DEVICE void set(int n, f32 a, f32 b, f32 c, f32 d) {
        if (CORES) {
            pairs[CORES ? n / 2 : 0][n % 2 * 2] = pack_pair<E>(a, b);
            pairs[CORES ? n / 2 : 0][n % 2 * 2 + 1] = pack_pair<E>(c, d);
        } else {
            const int at = CORES ? 0 : n;
            values[at][0] = a, values[at][1] = b, values[at][2] = c, values[at][3] = d;
        }
    }
    template <int N> DEVICE void set(const f32 (&x)[N][4]) {
#pragma unroll
        for (int n = 0; n < N; n++) set(n, x[n][0], x[n][1], x[n][2], x[n][3]);
    }
};

// The 16 columns of a tile that `tile` names, transposed: x is a block of 16 channels × 64 tokens.
template <int LD> DEVICE void load_turned(f32 (&x)[8][4], const E* tile) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
        if (CORES) {
            u32 r[4];
            ldmatrix4_transposed(r, tile + (n * 8 + lane % 8 + lane / 16 * 8) * LD + lane / 8 % 2 * 8);
#pragma unroll
            for (int i = 0; i < 4; i++) unpack2(r[i], x[n + i / 2][i % 2 * 2], x[n + i / 2][i % 2 * 2 + 1]);
        } else {
#pragma unroll
            for (int m = 0; m < 2; m++)
#pragma unroll
                for (int e = 0; e < 4; e++)
                    x[n + m][e] = to_f32(tile[((n + m) * 8 + lane_col() + e % 2) * LD + lane_row() + e / 2 * 8]);
        }
    }
}

// The inverse, to the first `valid` rows of a matrix.
DEVICE void store_turned(E* to, long long ld, int valid, const f32 (&x)[8][4]) {
#pragma unroll
    for (int n = 0; n < 8; n++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            if (CORES) {
                const u32 pair = turned(pack_pair<E>(x[n][h * 2], x[n][h * 2 + 1]));
                const int row = n * 8 + lane_row();
                if (row < valid) *reinterpret_cast<u32*>(to + row * ld + h * 8 + lane_col()) = pair;
            } else {
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const int row = n * 8 + lane_col() + e;
                    if (row < valid) to[row * ld + h * 8 + lane_row()] = from_f32<E>(x[n][h * 2 + e]);
                }
            }
        }
}

// Which blocks of 16 × 16 of B are not zero.
enum Shape { FULL, FROM_DIAGONAL, TO_DIAGONAL }; // columns from, or up to, the block's k

// c += A·B over K.
template <Lies B, int K, int LDB, Shape SHAPE, int N> DEVICE void product_held(f32 (&c)[N][4], const Held<K>& a, const E* b) {
    const int lane = threadIdx.x % 32;
    if (CORES) {
        const E* bt = B == PLAIN ? b + lane % 16 * LDB + lane / 16 * 8 : b + (lane % 8 + lane / 16 * 8) * LDB + lane / 8 % 2 * 8;
#pragma unroll
        for (int k = 0; k < K; k += 16)
#pragma unroll
            for (int n = 0; n < N; n += 2) {
                if (SHAPE == FROM_DIAGONAL && n * 8 < k) continue;
                if (SHAPE == TO_DIAGONAL && n * 8 > k) continue;
                u32 fb[4];
                if (B == PLAIN) ldmatrix4_transposed(fb, bt + k * LDB + n * 8);
                else ldmatrix4(fb, bt + n * 8 * LDB + k);
                mma<E>(c[n], a.pairs[CORES ? k / 16 : 0], fb[0], fb[1]);
                mma<E>(c[n + 1], a.pairs[CORES ? k / 16 : 0], fb[2], fb[3]);
            }
    } else {
        // A loop, which puts the operand into local memory: unrolled, it takes the compiler minutes.
#pragma unroll 1
        for (int part = 0; part < (CORES ? 0 : K / 8); part++)
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const int k = part * 8 + i, from = lane / 4 * 4 + i / 2;
                const f32 a0 = __shfl_sync(0xffffffffu, a.values[part][i % 2], from);
                const f32 a1 = __shfl_sync(0xffffffffu, a.values[part][2 + i % 2], from);
#pragma unroll
                for (int n = 0; n < N; n++)
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int col = n * 8 + lane_col() + e;
                        const f32 v = to_f32(B == PLAIN ? b[k * LDB + col] : b[col * LDB + k]);
                        c[n][e] = fmaf(a0, v, c[n][e]);
                        c[n][2 + e] = fmaf(a1, v, c[n][2 + e]);
                    }
            }
    }
}

// ---- The gated delta rule.

extern __shared__ __align__(16) u8 shared[];

// Sums of g: f32 operands show what a difference of two large f32 sums loses.
template <typename X> struct SumOf { typedef f32 Type; };
template <> struct SumOf<f32> { typedef double Type; };
typedef SumOf<E>::Type Sum;
DEVICE f32 e_to(Sum x) { return expf((f32)x); }

static const int C = 64;
[[maybe_unused]] static const int LK = DK + PAD, LV = DV + PAD, LC = C + PAD;
[[maybe_unused]] static const f32 L2_EPS = 1e-6f;

DEVICE f32 inverse_root(f32 x) { return 1.0f / sqrtf(x); }
DEVICE f32 sigmoid(f32 x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE f32 softplus(f32 x) { return x > 20.0f ? x : log1pf(expf(x)); }
DEVICE f32 scale() { return inverse_root((f32)DK); }

// What each token's rows are multiplied with: β, γ·rk, s·γ·rq and c.
enum Factor { BETA, READ, ASK, WRITE, FACTORS };
