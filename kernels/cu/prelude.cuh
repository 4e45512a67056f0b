// Shared by every kernel file: the loader puts this text before each of them, so no file includes anything.
//
// T, the dtype of activations, comes from the loader as -DT=bf16, -DT=f16 or -DT=f32.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef float f32;
struct bf16 { u16 bits; };
struct f16 { u16 bits; };

#define DEVICE __device__ __forceinline__

// The blocks that a multiprocessor should hold: `wanted`, or fewer where it has 1,024 threads only (compute capability 7.5).
#if __CUDA_ARCH__ >= 800
#define RESIDENT(threads, wanted) (wanted)
#else
#define RESIDENT(threads, wanted) ((wanted) * (threads) > 1024 ? 1024 / (threads) : (wanted))
#endif

DEVICE f32 to_f32(f32 x) { return x; }
DEVICE f32 to_f32(bf16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE f32 to_f32(f16 x) {
    f32 y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

// Rounds to nearest, ties to even.
template <typename To> DEVICE To from_f32(f32 x);
template <> DEVICE f32 from_f32<f32>(f32 x) { return x; }
template <> DEVICE bf16 from_f32<bf16>(f32 x) {
    bf16 y;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
#else
    const u32 bits = __float_as_uint(x);
    y.bits = x == x ? (u16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16) : 0x7fff;
#endif
    return y;
}
template <> DEVICE f16 from_f32<f16>(f32 x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// For kernels that may begin before the one before them has ended (Kernel::early in kernels/src/runtime/launch.rs). Waits
// until it has ended and its results can be read. What another kernel writes must not be read through a __restrict__ pointer:
// the compiler takes it for constant and may move the read before the wait.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// Lets the next such kernel begin when every block has come here or ended.
DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
// The first statement of a kernel that reads nothing before the one before it has ended.
DEVICE void begin_early() {
    let_next_begin();
    wait_for_previous();
}

// Two values in one register, the first in the low half.
template <typename To> DEVICE u32 pack2(f32 lo, f32 hi);
#if __CUDA_ARCH__ >= 800
template <> DEVICE u32 pack2<bf16>(f32 lo, f32 hi) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
template <> DEVICE u32 pack2<f16>(f32 lo, f32 hi) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(hi), "f"(lo));
    return y;
}
#else
template <> DEVICE u32 pack2<bf16>(f32 lo, f32 hi) { return from_f32<bf16>(lo).bits | (u32)from_f32<bf16>(hi).bits << 16; }
template <> DEVICE u32 pack2<f16>(f32 lo, f32 hi) { return from_f32<f16>(lo).bits | (u32)from_f32<f16>(hi).bits << 16; }
#endif

// Copies 16 bytes, or 4, into shared memory while the thread goes on; zeros where not `valid`, and then nothing is read.
// sm_75 has no such copies: there the bytes have arrived on return.
DEVICE void copy16_async(u32 to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
#else
    uint4 v = make_uint4(0, 0, 0, 0);
    if (valid) v = *reinterpret_cast<const uint4*>(from);
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}
DEVICE void copy4_async(u32 to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
#else
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(to), "r"(valid ? *reinterpret_cast<const u32*>(from) : 0) : "memory");
#endif
}
DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most PENDING of this thread's groups of copies are still on their way.
template <int PENDING> DEVICE void copies_left() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}
DEVICE void copies_arrived() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// 16 bytes of T: 8 values of a 16-bit dtype, 4 of f32.
template <typename E> struct Vec { static const int N = 16 / sizeof(E); };

// Values to the 16 bytes that hold them, and back.
template <typename E> DEVICE uint4 pack16(const f32 (&v)[8]) {
    return make_uint4(pack2<E>(v[0], v[1]), pack2<E>(v[2], v[3]), pack2<E>(v[4], v[5]), pack2<E>(v[6], v[7]));
}
template <typename E> DEVICE uint4 pack16(const f32 (&v)[4]) {
    return make_uint4(__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
}
template <typename E> DEVICE void unpack16(const uint4& raw, f32 (&out)[Vec<E>::N]) {
    const E* e = reinterpret_cast<const E*>(&raw);
#pragma unroll
    for (int i = 0; i < Vec<E>::N; i++) out[i] = to_f32(e[i]);
}
template <typename E> DEVICE void load16(const E* p, f32 (&out)[Vec<E>::N]) {
    unpack16<E>(*reinterpret_cast<const uint4*>(p), out);
}
template <typename E> DEVICE void store16(E* p, const f32 (&in)[Vec<E>::N]) {
    *reinterpret_cast<uint4*>(p) = pack16<E>(in);
}

// The first n values at p in 16 bytes, zeros after them; one access when they fill it.
template <typename E> DEVICE uint4 load_part(const E* p, int n) {
    if (n >= Vec<E>::N) return *reinterpret_cast<const uint4*>(p);
    uint4 raw = make_uint4(0, 0, 0, 0);
    E* e = reinterpret_cast<E*>(&raw);
#pragma unroll
    for (int i = 0; i < Vec<E>::N; i++)
        if (i < n) e[i] = p[i];
    return raw;
}
template <typename E> DEVICE void store_part(E* p, int n, const uint4& raw) {
    if (n >= Vec<E>::N) {
        *reinterpret_cast<uint4*>(p) = raw;
        return;
    }
    const E* e = reinterpret_cast<const E*>(&raw);
#pragma unroll
    for (int i = 0; i < Vec<E>::N; i++)
        if (i < n) p[i] = e[i];
}

// Where the i-th group of N values of a matrix `width` wide lies, counting row by row; the last group of a row
// may be short. Matrices have fewer than 2^32 groups.
struct Place { u32 row; int col; int n; };
template <int N> DEVICE Place place(u32 i, int width) {
    const u32 groups = (u32)(width + N - 1) / N, row = i / groups;
    const int col = (int)(i - row * groups) * N;
    return {row, col, min(N, width - col)};
}
template <typename E> DEVICE E* at(E* p, u32 row, int ld, int col) { return p + ((long long)row * ld + col); }

DEVICE f32 warp_sum(f32 x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}
DEVICE f32 warp_max(f32 x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

// The sum over the block, in every thread; `shared` has one f32 a warp. Every thread must arrive.
DEVICE f32 block_sum(f32 x, f32* shared) {
    x = warp_sum(x);
    const int warps = (blockDim.x + 31) / 32;
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    f32 sum = 0.0f;
    for (int w = 0; w < warps; w++) sum += shared[w];
    return sum;
}

// The end of a sum over rows by blocks of 32 × 8: each thread comes with the sums of its N columns, `sums` is the
// block's, `tile` its first column. Those of the columns within `width` go to row blockIdx.y of `partial`.
template <int N> DEVICE void store_column_sums(const f32 (&sum)[N], f32 (&sums)[8][32 * N], int tile, int width, f32* partial) {
#pragma unroll
    for (int i = 0; i < N; i++) sums[threadIdx.y][threadIdx.x * N + i] = sum[i];
    __syncthreads();
    const int t = threadIdx.y * 32 + threadIdx.x;
    if (t < 32 * N && tile + t < width) {
        f32 total = 0.0f;
#pragma unroll
        for (int k = 0; k < 8; k++) total += sums[k][t];
        partial[(u64)blockIdx.y * width + tile + t] = total;
    }
}
