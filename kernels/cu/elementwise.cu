// Scaling, products, casts and scattered rows; sums and aligned copies are in reduce.cu.
//
// y = factor·x in f32, rounded to T; y = a ∘ b; y[r, c] = x[r, c]·s[c]; y = x rounded to another dtype; y = x + a in f32;
// y[places[r]] = x[r].
//
// Layout: matrices [rows, width], row-major, each with its row stride in elements, any width, fewer than 2^32 groups of
// 8. x is of T, y of T or of the dtype in the name. A group of 8 whose address is a multiple of 16 moves in 16-byte
// accesses, any other one by one: alignment and strides may be anything. scale may have y = x.
//
// Launch: grid ceil(rows·ceil(width / 8) / 256), block 256, dynamic shared memory 0
//   scale(x, y, i32 rows, width, ldx, ldy, f32 factor)
//   mul(a, b, y, i32 rows, width, lda, ldb, ldy): y may be a or b
//   add_f32(x, a, y, i32 rows, width, ldx, lda, ldy): a and y f32; y may be a
//   scale_columns(x, s, y, i32 rows, width, ldx, ldy): s T [width]; y may be x
//   cast_bf16, cast_f16, cast_f32(x, y, i32 rows, width, ldx, ldy)
//   scatter_rows(x, places, y, i32 rows, width, ldx, ldy): places u32 [rows], no two equal
//
// Bytes → floor on an H200 at the 4.25 TB/s that a large copy reaches: x once, y once; bf16 8192 × 2560 84 MB → 19.7 µs,
// to f32 126 MB → 29.6 µs. No spills from sm_80 to sm_120.
//
// Bit-exact against the host's roundings, odd widths, addresses and strides of any alignment.

template <typename E> DEVICE bool wide(const E* p) { return reinterpret_cast<u64>(p) % 16 == 0; }

// Up to eight values of a row.
template <typename E> DEVICE void fetch(const E* p, int n, f32 (&v)[8]) {
    const int N = Vec<E>::N;
    if (n == 8 && wide(p)) {
#pragma unroll
        for (int part = 0; part < 8; part += N) {
            f32 some[N];
            load16(p + part, some);
#pragma unroll
            for (int i = 0; i < N; i++) v[part + i] = some[i];
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = i < n ? to_f32(p[i]) : 0.0f;
    }
}
template <typename E> DEVICE void leave(E* p, int n, const f32 (&v)[8]) {
    const int N = Vec<E>::N;
    if (n == 8 && wide(p)) {
#pragma unroll
        for (int part = 0; part < 8; part += N) {
            f32 some[N];
#pragma unroll
            for (int i = 0; i < N; i++) some[i] = v[part + i];
            store16(p + part, some);
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < n) p[i] = from_f32<E>(v[i]);
    }
}

// The thread's group of eight goes from x, times a factor, to y, to the row that `places` names if there are any.
template <typename To, bool SCALED>
DEVICE void move(const T* x, const u32* places, To* y, int rows, int width, int ldx, int ldy, f32 factor) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= (u32)rows * ((u32)(width + 7) / 8)) return;
    const Place p = place<8>(i, width);
    const int n = min(p.n, 8);
    f32 v[8];
    fetch(at(x, p.row, ldx, p.col), n, v);
    if (SCALED) {
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] *= factor;
    }
    leave(at(y, places ? places[p.row] : p.row, ldy, p.col), n, v);
}

extern "C" __global__ void __launch_bounds__(256)
scale(const T* x, T* y, int rows, int width, int ldx, int ldy, f32 factor) {
    move<T, true>(x, nullptr, y, rows, width, ldx, ldy, factor);
}

// y = op(a, b), element by element.
template <typename A, typename B, typename Y, typename Op>
DEVICE void combine(const A* a, const B* b, Y* y, int rows, int width, int lda, int ldb, int ldy, Op op) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= (u32)rows * ((u32)(width + 7) / 8)) return;
    const Place p = place<8>(i, width);
    const int n = min(p.n, 8);
    f32 u[8], v[8];
    fetch(at(a, p.row, lda, p.col), n, u);
    fetch(at(b, p.row, ldb, p.col), n, v);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] = op(u[k], v[k]);
    leave(at(y, p.row, ldy, p.col), n, v);
}

extern "C" __global__ void __launch_bounds__(256)
mul(const T* a, const T* b, T* y, int rows, int width, int lda, int ldb, int ldy) {
    combine(a, b, y, rows, width, lda, ldb, ldy, [](f32 u, f32 v) { return u * v; });
}

extern "C" __global__ void __launch_bounds__(256)
add_f32(const T* x, const f32* a, f32* y, int rows, int width, int ldx, int lda, int ldy) {
    combine(x, a, y, rows, width, ldx, lda, ldy, [](f32 u, f32 v) { return u + v; });
}

extern "C" __global__ void __launch_bounds__(256)
scale_columns(const T* x, const T* s, T* y, int rows, int width, int ldx, int ldy) {
    const u32 i = blockIdx.x * 256 + threadIdx.x;
    if (i >= (u32)rows * ((u32)(width + 7) / 8)) return;
    const Place p = place<8>(i, width);
    const int n = min(p.n, 8);
    f32 u[8], v[8];
    fetch(s + p.col, n, u);
    fetch(at(x, p.row, ldx, p.col), n, v);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] *= u[k];
    leave(at(y, p.row, ldy, p.col), n, v);
}

extern "C" __global__ void __launch_bounds__(256)
cast_bf16(const T* x, bf16* y, int rows, int width, int ldx, int ldy) {
    move<bf16, false>(x, nullptr, y, rows, width, ldx, ldy, 1.0f);
}

extern "C" __global__ void __launch_bounds__(256)
cast_f16(const T* x, f16* y, int rows, int width, int ldx, int ldy) {
    move<f16, false>(x, nullptr, y, rows, width, ldx, ldy, 1.0f);
}

extern "C" __global__ void __launch_bounds__(256)
cast_f32(const T* x, f32* y, int rows, int width, int ldx, int ldy) {
    move<f32, false>(x, nullptr, y, rows, width, ldx, ldy, 1.0f);
}

extern "C" __global__ void __launch_bounds__(256)
scatter_rows(const T* x, const u32* places, T* y, int rows, int width, int ldx, int ldy) {
    move<T, false>(x, places, y, rows, width, ldx, ldy, 1.0f);
}
