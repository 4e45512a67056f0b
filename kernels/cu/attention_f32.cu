// Attention without tensor cores, forward and backward, for what the fast kernels do not take: T = f32, and any
// HEAD_DIM that is a multiple of 8 up to 256. For being right, not for speed. kernels/src/ops/attention.
//
// The mathematics, layout, tables and arguments are those of attention_fwd.cu, attention_bwd_dq.cu and
// attention_bwd_dkdv.cu, with tiles of 16 rows (BLOCK_M = BLOCK_N = 16 in their formulas); everything between loads and
// stores is f32. A warp owns four rows and meets 32 rows of the other side at a time: for scores a lane is one of the
// 32 rows, for sums a lane is a set of channels.
//
// Source: prelude.cuh, attention_scores.cuh, this file. Defines: T = f32, bf16 or f16, HEAD_DIM, and the options of
// attention_scores.cuh.
// Launch: block (128); grid (tiles·heads), for attention_bwd_dkdv (tiles·kv_heads); dynamic shared memory
//   80·(HEAD_DIM + 4)·4 bytes for attention_fwd, 96·(HEAD_DIM + 4)·4 for the other two: 97.5 KiB at most.
//
// Floor: the f32 units' 67 TFLOP/s by the H200's datasheet; one fma reads up to two values of shared memory.
// Status (H200, 2026-11-23, TFLOP/s of the products each kernel makes), 2 × 1,024 tokens, 16/8 heads:
//   f32, 128     fwd 0.588 ms  14.6    dq 0.794 ms  16.2    dkdv 0.959 ms  17.9
//   bf16, 80     fwd 0.468 ms  11.5    dq 0.573 ms  14.0    dkdv 0.691 ms  15.5
// Tests: as in attention_fwd.cu, HEAD_DIM 8, 40, 64, 80, 96, 128, 256; f32 within 2 × (the naive f32 error + 2e-6 of
// the gradients' size), except where the naive gradient is exactly 0 (documents of one token: |dq|, |dk| below
// 1e-5 here).

static const int WARPS = 4;
static const int THREADS = 32 * WARPS;
static const int OWN = 4;              // rows a warp owns
static const int ROWS = OWN * WARPS;   // rows a block owns: the block size of its table of tiles
static const int OTHER = 32;           // rows of the other side at a time, one a lane
static const int PADDED = HEAD_DIM + 4; // floats from row to row: odd in 16-byte pieces, for the banks
static const int SLICES = (HEAD_DIM + 31) / 32; // channels a lane sums in the second product: lane, lane + 32, ...

// The block copies rows 0 .. `valid` - 1 of a matrix into COUNT rows of shared memory and zeroes the others.
template <int COUNT> DEVICE void load_rows(f32* to, const T* from, int ld, int valid) {
    const int pieces = HEAD_DIM / 4;
    for (int i = threadIdx.x; i < COUNT * pieces; i += THREADS) {
        const int row = i / pieces, at = i % pieces * 4;
        float4 x = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row < valid) {
            const T* p = from + (long long)row * ld + at;
            x = make_float4(to_f32(p[0]), to_f32(p[1]), to_f32(p[2]), to_f32(p[3]));
        }
        *reinterpret_cast<float4*>(to + row * PADDED + at) = x;
    }
}

// s[i] = the warp's row i · this lane's row.
DEVICE void product_rows(f32 (&s)[OWN], const f32* own, const f32* other) {
    for (int i = 0; i < OWN; i++) s[i] = 0.0f;
    const f32* mine = other + threadIdx.x % 32 * PADDED;
    for (int d = 0; d < HEAD_DIM; d += 4) {
        const float4 b = *reinterpret_cast<const float4*>(mine + d);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float4 a = *reinterpret_cast<const float4*>(own + i * PADDED + d);
            s[i] = fmaf(a.x, b.x, fmaf(a.y, b.y, fmaf(a.z, b.z, fmaf(a.w, b.w, s[i]))));
        }
    }
}

// acc[i] += the sum over lanes of p[i] · the lane's row; each lane takes its channels of it.
DEVICE void product_columns(f32 (&acc)[OWN][SLICES], const f32 (&p)[OWN], const f32* other) {
    for (int j = 0; j < OTHER; j++) {
        f32 weight[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) weight[i] = __shfl_sync(0xffffffffu, p[i], j);
#pragma unroll
        for (int c = 0; c < SLICES; c++) {
            const int d = c * 32 + threadIdx.x % 32;
            const f32 x = d < HEAD_DIM ? other[j * PADDED + d] : 0.0f;
#pragma unroll
            for (int i = 0; i < OWN; i++) acc[i][c] = fmaf(weight[i], x, acc[i][c]);
        }
    }
}

DEVICE void store_row(T* to, const f32 (&acc)[SLICES], f32 factor) {
#pragma unroll
    for (int c = 0; c < SLICES; c++) {
        const int d = c * 32 + threadIdx.x % 32;
        if (d < HEAD_DIM) to[d] = from_f32<T>(acc[c] * factor);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_fwd(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, T* __restrict__ o,
              f32* __restrict__ lse, const int4* __restrict__ tiles, int ldq, int ldk, int ldv, int ldo, int heads,
              int kv_heads, int tokens, f32 scale, int window, f32 softcap, const T* __restrict__ sinks) {
    extern __shared__ __align__(16) f32 shared[];
    f32 *const q_rows = shared, *const k_rows = q_rows + ROWS * PADDED, *const v_rows = k_rows + OTHER * PADDED;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * OWN;
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int4 tile = tiles[blockIdx.x / heads];
    const int rows = min(ROWS, tile.y - tile.x);
    k += (long long)tile.z * ldk + kv_head * HEAD_DIM;
    v += (long long)tile.z * ldv + kv_head * HEAD_DIM;
    load_rows<ROWS>(q_rows, q + (long long)tile.x * ldq + head * HEAD_DIM, ldq, rows);

    const ScoreScale score(scale, softcap);
    f32 acc[OWN][SLICES] = {}, top[OWN], sum[OWN] = {};
#pragma unroll
    for (int i = 0; i < OWN; i++) top[i] = __int_as_float(0xff800000);
    for (int key = first_key(tile.w, window); key < tile.w + rows; key += OTHER) {
        const int keys = tile.w + rows - key;
        __syncthreads();
        load_rows<OTHER>(k_rows, k + (long long)key * ldk, ldk, keys);
        load_rows<OTHER>(v_rows, v + (long long)key * ldv, ldv, keys);
        __syncthreads();
        f32 s[OWN];
        product_rows(s, q_rows + first * PADDED, k_rows);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            // Every row sees a key of the first block, which has more keys than the tile has rows; so from there on the
            // maximum is finite.
            const int position = tile.w + first + i;
            const bool seen = key + lane <= position && (!HAS_WINDOW || key + lane > position - window);
            const f32 x = score.shaped(s[i]) * score.factor;
            const f32 next = fmaxf(top[i], warp_max(seen ? x : __int_as_float(0xff800000)));
            const f32 shrink = exp2f((top[i] - next) * LOG2E);
            s[i] = seen ? exp2f((x - next) * LOG2E) : 0.0f;
            top[i] = next;
            sum[i] = fmaf(sum[i], shrink, s[i]);
#pragma unroll
            for (int c = 0; c < SLICES; c++) acc[i][c] *= shrink;
        }
        product_columns(acc, s, v_rows);
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const int row = first + i;
        const f32 total = warp_sum(sum[i]);
        if (row >= rows) continue;
        const SoftmaxEnd end(top[i], total, sinks, head);
        if (lse && lane == 0) lse[(long long)head * tokens + tile.x + row] = end.lse;
        store_row(o + (long long)(tile.x + row) * ldo + head * HEAD_DIM, acc[i], end.inverse);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_bwd_dq(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ d_o,
                 const f32* __restrict__ lse, const f32* __restrict__ delta, T* __restrict__ dq,
                 const int4* __restrict__ tiles, int ldq, int ldk, int ldv, int lddo, int lddq, int heads, int kv_heads,
                 int tokens, f32 scale, int window, f32 softcap) {
    extern __shared__ __align__(16) f32 shared[];
    f32 *const q_rows = shared, *const do_rows = q_rows + ROWS * PADDED;
    f32 *const k_rows = do_rows + ROWS * PADDED, *const v_rows = k_rows + OTHER * PADDED;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * OWN;
    const int head = blockIdx.x % heads, kv_head = head / (heads / kv_heads);
    const int4 tile = tiles[blockIdx.x / heads];
    const int rows = min(ROWS, tile.y - tile.x);
    k += (long long)tile.z * ldk + kv_head * HEAD_DIM;
    v += (long long)tile.z * ldv + kv_head * HEAD_DIM;
    lse += (long long)head * tokens + tile.x;
    delta += (long long)head * tokens + tile.x;
    load_rows<ROWS>(q_rows, q + (long long)tile.x * ldq + head * HEAD_DIM, ldq, rows);
    load_rows<ROWS>(do_rows, d_o + (long long)tile.x * lddo + head * HEAD_DIM, lddo, rows);

    const ScoreScale score(scale, softcap);
    f32 acc[OWN][SLICES] = {};
    for (int key = first_key(tile.w, window); key < tile.w + rows; key += OTHER) {
        const int keys = tile.w + rows - key;
        __syncthreads();
        load_rows<OTHER>(k_rows, k + (long long)key * ldk, ldk, keys);
        load_rows<OTHER>(v_rows, v + (long long)key * ldv, ldv, keys);
        __syncthreads();
        f32 s[OWN], dp[OWN];
        product_rows(s, q_rows + first * PADDED, k_rows);
        product_rows(dp, do_rows + first * PADDED, v_rows);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const int row = first + i, position = tile.w + row;
            const bool seen =
                row < rows && key + lane <= position && (!HAS_WINDOW || key + lane > position - window);
            const f32 x = score.shaped(s[i]);
            s[i] = seen ? exp2f((x * score.factor - lse[row]) * LOG2E) * (dp[i] - delta[row]) : 0.0f;
            if (HAS_SOFTCAP) s[i] *= score.slope(x);
        }
        product_columns(acc, s, k_rows);
    }
#pragma unroll
    for (int i = 0; i < OWN; i++)
        if (first + i < rows)
            store_row(dq + (long long)(tile.x + first + i) * lddq + head * HEAD_DIM, acc[i], scale);
}

extern "C" __global__ void __launch_bounds__(THREADS, 2)
attention_bwd_dkdv(const T* __restrict__ q, const T* __restrict__ k, const T* __restrict__ v, const T* __restrict__ d_o,
                   const f32* __restrict__ lse, const f32* __restrict__ delta, T* __restrict__ dk, T* __restrict__ dv,
                   const int4* __restrict__ tiles, int ldq, int ldk, int ldv, int lddo, int lddk, int lddv, int heads,
                   int kv_heads, int tokens, f32 scale, int window, f32 softcap) {
    extern __shared__ __align__(16) f32 shared[];
    f32 *const k_rows = shared, *const v_rows = k_rows + ROWS * PADDED;
    f32 *const q_rows = v_rows + ROWS * PADDED, *const do_rows = q_rows + OTHER * PADDED;
    const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * OWN;
    const int group = heads / kv_heads, kv_head = blockIdx.x % kv_heads;
    const int4 tile = tiles[blockIdx.x / kv_heads];
    const int queries = tile.y - tile.x, rows = min(ROWS, queries);
    load_rows<ROWS>(k_rows, k + (long long)tile.x * ldk + kv_head * HEAD_DIM, ldk, rows);
    load_rows<ROWS>(v_rows, v + (long long)tile.x * ldv + kv_head * HEAD_DIM, ldv, rows);

    // Queries from the tile's first key on that see any of its keys.
    const int last = HAS_WINDOW ? min(queries, rows - 1 + window) : queries;
    const ScoreScale score(scale, softcap);
    f32 acc_k[OWN][SLICES] = {}, acc_v[OWN][SLICES] = {};
    for (int head = kv_head * group; head < (kv_head + 1) * group; head++) {
        const long long statistics = (long long)head * tokens + tile.x;
        for (int query = 0; query < last; query += OTHER) {
            __syncthreads();
            load_rows<OTHER>(q_rows, q + (long long)(tile.x + query) * ldq + head * HEAD_DIM, ldq, queries - query);
            load_rows<OTHER>(do_rows, d_o + (long long)(tile.x + query) * lddo + head * HEAD_DIM, lddo,
                             queries - query);
            __syncthreads();
            f32 p[OWN], ds[OWN];
            product_rows(p, k_rows + first * PADDED, q_rows);
            product_rows(ds, v_rows + first * PADDED, do_rows);
            const bool inside = query + lane < queries;
            const f32 row_lse = inside ? lse[statistics + query + lane] : 0.0f;
            const f32 row_delta = inside ? delta[statistics + query + lane] : 0.0f;
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int distance = query + lane - (first + i);
                const bool seen = inside && distance >= 0 && (!HAS_WINDOW || distance < window);
                const f32 x = score.shaped(p[i]);
                p[i] = seen ? exp2f((x * score.factor - row_lse) * LOG2E) : 0.0f;
                ds[i] = p[i] * (ds[i] - row_delta);
                if (HAS_SOFTCAP) ds[i] *= score.slope(x);
            }
            product_columns(acc_v, p, do_rows);
            product_columns(acc_k, ds, q_rows);
        }
    }
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        if (first + i >= rows) continue;
        store_row(dk + (long long)(tile.x + first + i) * lddk + kv_head * HEAD_DIM, acc_k[i], scale);
        store_row(dv + (long long)(tile.x + first + i) * lddv + kv_head * HEAD_DIM, acc_v[i], 1.0f);
    }
}
