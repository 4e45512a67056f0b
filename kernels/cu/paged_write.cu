// The keys and values of new tokens into pages; kernels/src/ops/paged_attention.
//
// A token at position y of its sequence, in row x of k and v, becomes row tables[z + y / 16]·16 + y % 16 of the pools; z is the
// start of the sequence's block table.
//
// Layout: k, v [tokens, width], pools [pages·16, width] of T, row-major with row strides in elements; width and strides
// multiples of 8, pointers 16-byte aligned. rows int4 [count]: x, y, z.
//
// Launch: paged_write(k, v, k_pool, v_pool, rows, tables, i32 count, width, ldk, ldv, ldp), grid (ceil(count·width / N / 256), 2),
//   block 256, N = 16 / sizeof(T); y = 0 is k, 1 is v
//
// Floor, bf16, 8,192 tokens, 8 heads of 128: 67 MB → 15.8 µs at the 4.25 TB/s that a large copy reaches on an H200.
// Tests: those of paged attention, which reads what this writes.

const int N = Vec<T>::N, PAGE = 16;

extern "C" __global__ void __launch_bounds__(256)
paged_write(const T* k, const T* v, T* k_pool, T* v_pool, const int4* rows, const u32* tables, int count, int width,
            int ldk, int ldv, int ldp) {
    const Place p = place<N>(blockIdx.x * 256 + threadIdx.x, width);
    if (p.row >= (u32)count) return;
    const int4 row = rows[p.row];
    const u32 slot = tables[row.z + row.y / PAGE] * PAGE + row.y % PAGE;
    const bool is_k = blockIdx.y == 0;
    *reinterpret_cast<uint4*>(at(is_k ? k_pool : v_pool, slot, ldp, p.col)) =
        *reinterpret_cast<const uint4*>(at(is_k ? k : v, row.x, is_k ? ldk : ldv, p.col));
}
