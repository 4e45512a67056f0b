// Gated activations whose result is also rows of e4m3 codes, for products in fp8; kernels/src/ops/gated_activation.
//
// act is that of gated_activation.cu, rounded to T, and its codes [rows, width] are those that fp8_rows.cu makes of it.
//
// Layout: as in the two files; T of 16 bits, width a multiple of 16. act may be the same matrix as gate or up.
//
// Launch: grid (rows), block round_up(ceil(width / 32), 32), at most 512: widths up to 16,384; dynamic shared memory 0.
//   gated_activation_fp8_fwd(gate, up, act, codes, scales, i32 width, ldg, ldu, lda, f32 alpha, limit)
//
// Bytes: 7 an element. Status, NVIDIA H200, 2026-12-01, bf16 8192 x 9728, SILU: 139.6 us, 95 % of 4.25 TB/s; act and its codes one
// after another 112.6 + 62.7 us. Equal to these bit for bit.
// Tried: the backward likewise, with dgate and dup of a row as codes: 504 us, where one after another they take 229 + 156.

// 16-byte vectors of a row in one thread.
const int VECS = 4;

extern "C" __global__ void __launch_bounds__(512, 1)
gated_activation_fp8_fwd(const T* gate, const T* up, T* act, u8* codes, f32* scales, int width, int ldg, int ldu, int lda,
                         f32 alpha, f32 limit) {
    __shared__ f32 shared[32];
    const u32 row = blockIdx.x;
    uint4 a[VECS], b[VECS];
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * 8;
        a[k] = load_part(at(gate, row, ldg, col), width - col);
        b[k] = load_part(at(up, row, ldu, col), width - col);
    }
    f32 largest = 0.0f;
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * 8;
        f32 g[N], u[N];
        unpack16<T>(a[k], g);
        unpack16<T>(b[k], u);
#pragma unroll
        for (int e = 0; e < N; e++) {
            const Gate v = gated(g[e], alpha, limit);
            g[e] = v.g * v.s * clamped_up(u[e], limit);
        }
        a[k] = pack16<T>(g);
        if (col < width) {
            store_part(at(act, row, lda, col), width - col, a[k]);
            largest = fmaxf(largest, largest_of(a[k], nullptr, col, width));
        }
    }
    const f32 inverse = row_scale(largest, shared, scales + row);
#pragma unroll
    for (int k = 0; k < VECS; k++) {
        const int col = (threadIdx.x + k * blockDim.x) * 8;
        if (col < width) store_codes(codes + (u64)row * width + col, a[k], nullptr, col, width, inverse);
    }
}
