// Attention over pages without tensor cores, for what paged_attention.cu does not take: T = f32, and any HEAD_DIM that is
// a multiple of 8 up to 256. For being right, not for speed. kernels/src/ops/paged_attention.
//
// The query of row r at position i of its sequence sees the keys j <= i of the pages that its block table lists, with the
// options of attention_scores.cuh. A warp takes one head of one row and 32 keys at a time: a lane is a key for the scores
// and a set of channels for the sums, all in f32.
//
// Layout: q, o [tokens, heads·HEAD_DIM], pools [pages·16, kv_heads·HEAD_DIM] of T, row-major with row strides in elements;
// key j of a row is row tables[z + j / 16]·16 + j % 16 of the pools. rows int4, one a query: x its row, y its position,
// z the start of its block table in `tables`. Query head h reads key/value head h / (heads / kv_heads).
//
// Launch: paged_attention_plain(q, k_pool, v_pool, o, rows, tables, i32 count, ldq, ldo, ldp, heads, kv_heads, f32 scale,
//   i32 window, f32 softcap, sinks|null), grid ceil(count·heads / WARPS), block 32·WARPS, dynamic shared memory 0
//
// Tests: kernels/tests/common/paged_attention.rs: within 2 × the error of the naive computation, HEAD_DIM 8 … 256.

static const int WARPS = 4;
static const int PAGE = 16;
static const int SLICES = (HEAD_DIM + 31) / 32; // channels of a lane: lane, lane + 32, ...

extern "C" __global__ void __launch_bounds__(32 * WARPS, 4)
paged_attention_plain(const T* __restrict__ q, const T* __restrict__ k_pool, const T* __restrict__ v_pool,
                      T* __restrict__ o, const int4* __restrict__ rows, const u32* __restrict__ tables, int count,
                      int ldq, int ldo, int ldp, int heads, int kv_heads, f32 scale, int window, f32 softcap,
                      const T* __restrict__ sinks) {
    __shared__ __align__(16) f32 queries[WARPS][HEAD_DIM];
    const int lane = threadIdx.x % 32, task = blockIdx.x * WARPS + threadIdx.x / 32;
    if (task >= count * heads) return;
    const int4 row = rows[task / heads];
    const int head = task % heads, channel = head / (heads / kv_heads) * HEAD_DIM;
    f32* query = queries[threadIdx.x / 32];
    for (int d = lane; d < HEAD_DIM; d += 32) query[d] = to_f32(q[(long long)row.x * ldq + head * HEAD_DIM + d]);
    __syncwarp();

    const ScoreScale score(scale, softcap);
    f32 acc[SLICES] = {}, top = __int_as_float(0xff800000), sum = 0.0f;
    // The first 32 keys have one that is seen, so the maximum is finite from there on.
    for (int first = first_key(row.y, window); first <= row.y; first += 32) {
        const int key = first + lane;
        const bool seen = key <= row.y;
        const int slot = seen ? (int)tables[row.z + key / PAGE] * PAGE + key % PAGE : 0;
        f32 x = 0.0f;
        if (seen) {
            const T* k = k_pool + (long long)slot * ldp + channel;
            for (int d = 0; d < HEAD_DIM; d += Vec<T>::N) {
                f32 values[Vec<T>::N];
                load16(k + d, values);
#pragma unroll
                for (int i = 0; i < Vec<T>::N; i++) x = fmaf(query[d + i], values[i], x);
            }
        }
        x = score.shaped(x) * score.factor;
        const f32 next = fmaxf(top, warp_max(seen ? x : __int_as_float(0xff800000)));
        const f32 shrink = exp2f((top - next) * LOG2E);
        const f32 p = seen ? exp2f((x - next) * LOG2E) : 0.0f;
        top = next;
        sum = fmaf(sum, shrink, p);
#pragma unroll
        for (int c = 0; c < SLICES; c++) acc[c] *= shrink;
        for (int j = 0; j < min(32, row.y + 1 - first); j++) {
            const f32 weight = __shfl_sync(0xffffffffu, p, j);
            const T* v = v_pool + (long long)__shfl_sync(0xffffffffu, slot, j) * ldp + channel;
#pragma unroll
            for (int c = 0; c < SLICES; c++) {
                const int d = c * 32 + lane;
                if (d < HEAD_DIM) acc[c] = fmaf(weight, to_f32(v[d]), acc[c]);
            }
        }
    }
    const SoftmaxEnd end(top, warp_sum(sum), sinks, head);
#pragma unroll
    for (int c = 0; c < SLICES; c++) {
        const int d = c * 32 + lane;
        if (d < HEAD_DIM) o[(long long)row.x * ldo + head * HEAD_DIM + d] = from_f32<T>(acc[c] * end.inverse);
    }
}
