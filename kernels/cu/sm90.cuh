// What the kernels for compute capability 9.0 share: barriers, the copy engine, wgmma. The loader puts this
// text after prelude.cuh and before each of them.

// What cuTensorMapEncodeTiled fills.
struct __align__(64) TensorMap { u64 words[16]; };

// Barriers in shared memory, by their addresses there.
DEVICE void barrier_init(u32 bar, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(arrivals));
}
DEVICE void barrier_arrive(u32 bar) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory"); }
DEVICE void barrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
DEVICE void barrier_wait(u32 bar, u32 parity) {
    u32 done;
    do {
        asm volatile(
            "{ .reg .pred done; mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2; selp.u32 %0, 1, 0, done; }"
            : "=r"(done)
            : "r"(bar), "r"(parity)
            : "memory");
    } while (!done);
}

DEVICE void named_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }

// Shared memory written here may be read or written by the copy engine and wgmma afterwards.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE float2 load_shared(u32 at) {
    float2 x;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(at) : "memory");
    return x;
}
DEVICE void store_shared(u32 at, f32 x) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(x) : "memory"); }
DEVICE void store_matrices(u32 at, const u32* x) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(x[0]), "r"(x[1]), "r"(x[2]),
                 "r"(x[3])
                 : "memory");
}

// One box of the map, from row `row` and column 64 * `panel`.
DEVICE void tma_load(u32 to, const TensorMap* map, u32 bar, int row, int panel) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(map), "r"(0), "r"(row), "r"(panel), "r"(bar)
        : "memory");
}

// wgmma's spelling for T, and lists of 32, 40, 64 and 128 accumulators.
#define STRING_(x) #x
#define STRING(x) STRING_(x)
#define WGMMA(n) "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." STRING(T) "." STRING(T) " "
#define ACC32 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define ACC40 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39}"
#define ACC64 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}"
#define ACC128 \
    "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
    "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
    "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
    "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
    "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
    "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
    "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}"

// The operands of those lists, from d[i] on: "=f" for accumulators that are only written, "+f" for others.
#define REG8(io, d, i) \
    io(d[i]), io(d[i + 1]), io(d[i + 2]), io(d[i + 3]), io(d[i + 4]), io(d[i + 5]), io(d[i + 6]), io(d[i + 7])
#define REG32(io, d, i) REG8(io, d, i), REG8(io, d, i + 8), REG8(io, d, i + 16), REG8(io, d, i + 24)
#define REG40(io, d, i) REG32(io, d, i), REG8(io, d, i + 32)
#define REG64(io, d, i) REG32(io, d, i), REG32(io, d, i + 32)
#define REG128(io, d, i) REG64(io, d, i), REG64(io, d, i + 64)

DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most PENDING groups run; the compiler may not read or move `d` across it.
template <int PENDING, int N> DEVICE void wgmma_wait(f32 (&d)[N]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

// d += a b for 64 rows and 64, 128 or 256 columns: a in registers, b in shared memory with its columns contiguous.
DEVICE void wgmma(f32 (&d)[32], const u32* a, u64 b) {
    asm volatile(WGMMA(64) ACC32 ", {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : REG32("+f", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void wgmma(f32 (&d)[64], const u32* a, u64 b) {
    asm volatile(WGMMA(128) ACC64 ", {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : REG64("+f", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
DEVICE void wgmma(f32 (&d)[128], const u32* a, u64 b) {
    asm volatile(WGMMA(256) ACC128 ", {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"
                 : REG128("+f", d, 0)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// A wgmma descriptor: 128-byte swizzle, 1024 bytes between groups of 8 rows, `panel` bytes between panels of 64 columns
// (read for a transposed operand alone).
DEVICE u64 descriptor(u32 at, u32 panel) {
    // In a cluster the upper bits of a shared address name the block.
    return (u64)1 << 62 | (u64)(1024 >> 4) << 32 | (u64)(panel >> 4) << 16 | (u64)((at & 0x3ffff) >> 4);
}

// True in one lane of a warp that has converged; the compiler knows that it is one.
DEVICE bool elect_one() {
    u32 elected;
    asm volatile("{ .reg .pred one; elect.sync _|one, 0xffffffff; selp.u32 %0, 1, 0, one; }" : "=r"(elected));
    return elected;
}

// Blocks of a cluster, one or two.
template <int BLOCKS> DEVICE u32 cluster_rank() {
    u32 rank = 0;
    if (BLOCKS > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
template <int BLOCKS> DEVICE void cluster_sync() {
    if (BLOCKS == 1) __syncthreads();
    else asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Arrives at the barrier of the block `rank`.
DEVICE void barrier_arrive_at(u32 bar, u32 rank) {
    asm volatile(
        "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(bar), "r"(rank)
        : "memory");
}

// One box of a matrix, from row `row` and column `col`, into this block or, at the same place, into both of a cluster.
DEVICE void load_box(u32 to, const TensorMap* map, u32 bar, int row, int col) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
        "l"(map), "r"(col), "r"(row), "r"(0), "r"(bar)
        : "memory");
}
DEVICE void load_box_to_both(u32 to, const TensorMap* map, u32 bar, int row, int col) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], "
        "[%5], %6;" ::"r"(to),
        "l"(map), "r"(col), "r"(row), "r"(0), "r"(bar), "h"((u16)3)
        : "memory");
}

DEVICE int load_shared_int(u32 at) {
    int x;
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(x) : "r"(at) : "memory");
    return x;
}
DEVICE void store_shared_int(u32 at, int x) { asm volatile("st.shared.s32 [%0], %1;" ::"r"(at), "r"(x) : "memory"); }
