// Products of up to 16 rows with a weight of few rows, as x·Aᵀ of an adapter beside quantized weights: y = x·Wᵀ.
//
// A cluster of SPLITS blocks has 16 rows of W; all its warps share k in pieces of 64 values, and the blocks add their sums
// through distributed shared memory, always in the same order. The order of k is that of few_rows.cuh: thread (g, t) reads
// the values 8t … 8t + 7 of every 32.
//
// x [m, k], W [n, k], y [m, n], all T (bf16 or f16) with row strides in elements. Sums are f32 and rounded once. Rows of x
// and W 16-byte aligned, k a multiple of 8.
//
// With `frozen` set, W is read while the kernel before this one still runs, which must not write W.
//
// GROUPS 1 or 2, m <= 8·GROUPS; WARPS 8; sm_90 and later. Launch: grid (ceil(n / 16), SPLITS), block 256, dynamic
// shared memory 0.
//   narrow(x, w, y, i32 m, n, k, ldx, ldw, ldy, frozen)
//
// All x·Aᵀ of Qwen3-4B's 36 blocks with rank 16 (144 products) on an H200, in a CUDA graph, 2026-12-01: 1 row 0.29 ms
// (few_rows.cu 0.55, cuBLAS 1.00), 8 rows 0.31 (0.57, 1.07), 16 rows 0.39 (cuBLAS 1.12); 32 rows 0.67 (1.15), but no gain
// between products of cuBLAS.
//
// No spills from sm_90 to sm_120.

static const int SPLITS = 8;

// The f32 at a shared address of another block of the cluster.
DEVICE f32 load_of_rank(const f32* p, int rank) {
    u32 address, there;
    asm("{ .reg .u64 a; cvta.to.shared.u64 a, %1; cvt.u32.u64 %0, a; }" : "=r"(address) : "l"(p));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    f32 x;
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(there) : "memory");
    return x;
}

// What the blocks of the cluster wrote to shared memory before can be read after.
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

extern "C" __global__ void __cluster_dims__(1, SPLITS, 1) __launch_bounds__(32 * WARPS)
narrow(const T* x, const T* w, T* y, int m, int n, int k, int ldx, int ldw, int ldy, int frozen) {
    __shared__ Sums sums;
    __shared__ f32 partial[GROUPS * 8 * TILE];
    let_next_begin();
    if (!frozen) wait_for_previous();
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    const int first = blockIdx.x * TILE, rank = blockIdx.y;
    const T* rows[2]; // g and g + 8, which end with the last row of W
#pragma unroll
    for (int h = 0; h < 2; h++) rows[h] = at(w, min(first + 8 * h + g, n - 1), ldw, 8 * t);
    const uint4 zero = make_uint4(0, 0, 0, 0);
    f32 c[GROUPS][4] = {};
    // A piece of W for this warp.
    uint4 q[2][2];
    auto read_w = [&](int base) {
#pragma unroll
        for (int j = 0; j < 2; j++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                q[h][j] = base + 32 * j + 8 * t < k ? *reinterpret_cast<const uint4*>(rows[h] + base + 32 * j) : zero;
    };
    const int begin = (rank * WARPS + warp) * 64;
    read_w(begin);
    if (frozen) wait_for_previous();
    for (int base = begin; base < k; base += 64 * WARPS * SPLITS) {
        if (base > begin) read_w(base);
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const int col = base + 32 * j + 8 * t;
            const uint4 &low = q[0][j], &high = q[1][j];
#pragma unroll
            for (int r = 0; r < GROUPS; r++) {
                const uint4 b = col < k && 8 * r + g < m ? *reinterpret_cast<const uint4*>(at(x, 8 * r + g, ldx, col)) : zero;
                mma<T>(c[r], {low.x, high.x, low.y, high.y}, b.x, b.y);
                mma<T>(c[r], {low.z, high.z, low.w, high.w}, b.z, b.w);
            }
        }
    }
    leave_sums(sums, c);
    __syncthreads();
    for (int i = threadIdx.x; i < GROUPS * 8 * TILE; i += 32 * WARPS) {
        f32 sum = 0.0f;
#pragma unroll
        for (int v = 0; v < WARPS; v++) sum += sums[v][i / (8 * TILE)][i % (8 * TILE)];
        partial[i] = sum;
    }
    cluster_sync();
    const int share = GROUPS * 8 * TILE / SPLITS;
    for (int i = rank * share + threadIdx.x; i < (rank + 1) * share; i += 32 * WARPS) {
        const int row = i / TILE, col = first + i % TILE;
        f32 sum = 0.0f;
#pragma unroll
        for (int other = 0; other < SPLITS; other++) sum += load_of_rank(partial + i, other);
        if (row < m && col < n) *at(y, row, ldy, col) = from_f32<T>(sum);
    }
    // No block may end while another one reads its sums.
    cluster_sync();
}
