// The gradients of the gated delta rule from the states before chunks and the gradients to those after them;
// kernels/src/ops/gated_delta. Notation, layout and operands are those of gated_delta.cu.
//
// X = r·∂/∂(r x) for x = q or k is what is summed: dx = X − r² x (x·X). With B = s D rq rk ∘ tril(dO·Δᵀ), M = −D rk rk ∘ tril₋₁(dV·Δᵀ):
// Xq = s γ rq dO·Sᵀ + B·K; Xk = R + W, R = −γ rk dV·Sᵀ + M·K, W = c Δ·Eᵀ + Bᵀ·Q + Mᵀ·K, E the gradient to the state after the chunk.
// What the cumulated gates get is dG_i = q_i·Xq_i + k_i·R_i − k_i·W_i; with f32 operands the sums of mod.rs without differences.
// db = (1 − β)(v·dV + k·R).
//
// Layout: dq, dk as q and k, da, db as a and b; d_a_log, d_dt_bias f32 [chunks, value heads]. With WIDE = 1 whole states are in
// shared memory, else 64 of their columns at a time.
//
// Launch: grid (chunks, key heads), 4 · min(DK, 64) threads.
//
// Measured on an H200, bf16, 16 key and 32 value heads of 128, 8,192 tokens, WIDE = 1, 2026-11-30: 606 µs; with WIDE = 0 and warp
// tiles of 16 rows 1,074. The operands are 0.5 GB, 118 µs at 4.25 TB/s. memcheck clean.
// Tried: warp tiles of 16 rows with WIDE = 1: 604 µs.

static const int PART = WIDE || DK < 64 ? DK : 64;  // columns of a transposed state in shared memory
static const int BLOCKS = DK / PART;
static const int LP = PART + PAD;
static const int WN = (DK < 64 ? DK : 64) / 16;     // warps beside each other, below each other there are two
static const int GRAD_THREADS = 64 * WN;
static const int COLS = PART / WN;                  // a warp's columns of a block
static const int GN = COLS / 8;
static const int PN = C / WN / 8;                   // blocks of 8 columns of the 64 × 64 tiles in a warp

enum Dots { QUERY, READER, END, WRITER, INTER, DOTS };

// What the decays between two tokens get, with f32 operands.
static const int PAIRS = CORES ? 1 : C;

// Adds rows of a block times factors to the sums, and their dots with the rows of a tile to `dot`.
DEVICE void collect(f32 (&sum)[2][GN][4], f32 (&dot)[4], const f32 (&x)[2][GN][4], const f32 (&by)[4], const E* tile) {
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
        for (int n = 0; n < GN; n++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                f32 v[2];
                load_two(tile + (m * 16 + lane_row() + h * 8) * LK + n * 8 + lane_col(), v);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const f32 g = x[m][n][h * 2 + e] * by[m * 2 + h];
                    sum[m][n][h * 2 + e] += g;
                    dot[m * 2 + h] = fmaf(g, v[e], dot[m * 2 + h]);
                }
            }
}

extern "C" __global__ void __launch_bounds__(GRAD_THREADS)
gated_delta_bwd(const T* q, const T* k, const T* v, const T* b, const T* a, const T* a_log, const T* dt_bias, const T* d_o,
                const T* dv, const E* states, const E* ends, const E* delta, const Sum* cum, const f32* factors, const f32* rq,
                const f32* rk, const int* chunks, T* dq, T* dk, T* db, T* da, f32* d_a_log, f32* d_dt_bias, int key_heads,
                int value_heads, int tokens, int ldq, int ldk, int ldv, int ldb, int lda, int lddo, int lddv, int lddq, int lddk,
                int lddb, int ldda) {
    __shared__ Sum cums[C];
    __shared__ f32 betas[C], rqs[C], rks[C], values[C], totals[2][C], dots[DOTS][WN][C], sums[32], carry[4];
    __shared__ f32 of_states[2][C], pairs[PAIRS][PAIRS + 1]; // with f32 operands
    E* keys = reinterpret_cast<E*>(shared);
    E* queries = keys + C * LK;
    E* deltas = queries + C * LK;
    E* by_queries = deltas + C * LV;
    E* by_keys = by_queries + C * LC;
    E* before = by_keys + C * LC;                   // the state, or columns of it
    E* after = WIDE ? before + DV * LP : before;    // the gradient to the state after the chunk
    E* d_os = after + DV * LP;                      // with WIDE alone, as dvs
    E* dvs = d_os + C * LV;
    const int chunk = blockIdx.x, key_head = blockIdx.y, group = value_heads / key_heads, t = threadIdx.x, warp = t / 32;
    const int wr = warp % 2 * 32, wc = warp / 2;
    const int first = chunks[2 * chunk], valid = chunks[2 * chunk + 1];
    int row[4];
#pragma unroll
    for (int i = 0; i < 4; i++) row[i] = wr + lane_row() + i * 8;
    load_rows<C, DK>(keys, k + (long long)first * ldk + key_head * DK, ldk, valid, GRAD_THREADS);
    load_rows<C, DK>(queries, q + (long long)first * ldq + key_head * DK, ldq, valid, GRAD_THREADS);
    if (t < C) {
        const long long at = (long long)key_head * tokens + first + t;
        rqs[t] = t < valid ? rq[at] : 0.0f;
        rks[t] = t < valid ? rk[at] : 0.0f;
        totals[0][t] = totals[1][t] = 0.0f;
    }
    f32 xq[BLOCKS][2][GN][4], xk[BLOCKS][2][GN][4];
#pragma unroll
    for (int blk = 0; blk < BLOCKS; blk++) clear(xq[blk]), clear(xk[blk]);
    for (int member = 0; member < group; member++) {
        const int head = key_head * group + member;
        const long long state_at = ((long long)chunk * value_heads + head) * DK * DV;
        const long long row_do = (long long)(first + wr) * lddo + head * DV;
        const long long row_dv = (long long)(first + wr) * lddv + head * DV;
        const int left = valid - wr;
        __syncthreads(); // everyone is done with the last head's tiles
        load_rows<C, DV>(deltas, delta + ((long long)first * value_heads + head) * DV, (long long)value_heads * DV, valid,
                         GRAD_THREADS);
        if (WIDE) {
            load_rows<C, DV>(d_os, d_o + (long long)first * lddo + head * DV, lddo, valid, GRAD_THREADS);
            load_rows<C, DV>(dvs, dv + (long long)first * lddv + head * DV, lddv, valid, GRAD_THREADS);
            commit();
        }
        load_rows<DV, PART>(before, states + state_at, DK, DV, GRAD_THREADS);
        commit();
        if (WIDE) {
            load_rows<DV, PART>(after, ends + state_at, DK, DV, GRAD_THREADS);
            commit();
        }
        if (t < C) {
            const long long at = (long long)head * tokens + first + min(t, valid - 1);
            cums[t] = cum[at];
            betas[t] = t < valid ? factors[at] : 0.0f;
        }
        {
            // v·dV of the rows, each by WN threads.
            const int parts = WN, r = t / parts;
            f32 sum = 0.0f;
            if (r < valid)
                for (int d = t % parts * 2; d < DV; d += parts * 2) {
                    f32 x[2], y[2];
                    load_two(v + (long long)(first + r) * ldv + head * DV + d, x);
                    load_two(dv + (long long)(first + r) * lddv + head * DV + d, y);
                    sum = fmaf(x[0], y[0], fmaf(x[1], y[1], sum));
                }
#pragma unroll
            for (int o = WN / 2; o > 0; o /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, o);
            if (t % parts == 0) values[r] = sum;
        }
        arrived<WIDE ? 2 : 0>();
        __syncthreads();
        const Sum last = cums[C - 1];
        {
            f32 dp[2][PN][4], dl[2][PN][4];
            clear(dp);
            clear(dl);
            const E* b_tile = deltas + wc * PN * 8 * LV;
            if (WIDE) {
                product<PLAIN, TURNED, DV, LV, LV>(dp, d_os + wr * LV, b_tile);
                product<PLAIN, TURNED, DV, LV, LV>(dl, dvs + wr * LV, b_tile);
            } else {
                product_from<TURNED, DV, LV>(dp, d_o + row_do, lddo, left, b_tile);
                product_from<TURNED, DV, LV>(dl, dv + row_dv, lddv, left, b_tile);
            }
#pragma unroll
            for (int n = 0; n < PN; n++)
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int col = (wc * PN + n) * 8 + lane_col();
                    f32 x[2], y[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int j = col + e;
                        const f32 decay = j <= row[i] ? e_to(cums[row[i]] - cums[j]) * rks[j] : 0.0f;
                        x[e] = dp[i / 2][n][i % 2 * 2 + e] * decay * rqs[row[i]] * scale();
                        y[e] = j < row[i] ? -dl[i / 2][n][i % 2 * 2 + e] * decay * rks[row[i]] : 0.0f;
                    }
                    store_two<E>(by_queries + row[i] * LC + col, x[0], x[1]);
                    store_two<E>(by_keys + row[i] * LC + col, y[0], y[1]);
                    if (!CORES)
                        for (int e = 0; e < 2; e++) {
                            f32 qk = 0.0f, kk = 0.0f;
                            for (int d = 0; d < DK; d++) {
                                const f32 key = to_f32(keys[(col + e) * LK + d]);
                                qk = fmaf(to_f32(queries[row[i] * LK + d]), key, qk);
                                kk = fmaf(to_f32(keys[row[i] * LK + d]), key, kk);
                            }
                            pairs[row[i] % PAIRS][(col + e) % PAIRS] = fmaf(x[e], qk, y[e] * kk);
                        }
                }
        }
        if (WIDE) arrived<1>();
        __syncthreads();
        f32 dot[DOTS][4] = {};
        f32 asked[4], read[4], wrote[4];
        const f32 one[4] = {1.0f, 1.0f, 1.0f, 1.0f};
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const f32 gamma = e_to(cums[row[i]]);
            asked[i] = scale() * gamma * rqs[row[i]];
            read[i] = -gamma * rks[row[i]];
            wrote[i] = rks[row[i]] * e_to(last - cums[row[i]]);
        }
#pragma unroll
        for (int blk = 0; blk < BLOCKS; blk++) {
            if (!WIDE && blk > 0) {
                __syncthreads();
                load_rows<DV, PART>(before, states + state_at + blk * PART, DK, DV, GRAD_THREADS);
                commit();
                arrived<0>();
                __syncthreads();
            }
            const E* b_tile = before + wc * COLS;
            const int col = blk * PART + wc * COLS, tile = wr * LK + col;
            f32 x[2][GN][4];
            clear(x);
            if (WIDE) product<PLAIN, PLAIN, DV, LV, LP>(x, d_os + wr * LV, b_tile);
            else product_from<PLAIN, DV, LP>(x, d_o + row_do, lddo, left, b_tile);
            collect(xq[blk], dot[QUERY], x, asked, queries + tile);
            clear(x);
            if (WIDE) product<PLAIN, PLAIN, DV, LV, LP>(x, dvs + wr * LV, b_tile);
            else product_from<PLAIN, DV, LP>(x, dv + row_dv, lddv, left, b_tile);
            collect(xk[blk], dot[READER], x, read, keys + tile);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) dot[INTER][i] = dot[QUERY][i] + dot[READER][i];
        if (WIDE) {
            arrived<0>();
            __syncthreads();
        }
        f32 along = 0.0f; // of the state before the chunk and the gradient to that after it
#pragma unroll
        for (int blk = 0; blk < BLOCKS; blk++) {
            if (!WIDE) {
                __syncthreads();
                load_rows<DV, PART>(after, ends + state_at + blk * PART, DK, DV, GRAD_THREADS);
                commit();
                arrived<0>();
                __syncthreads();
            }
            for (int i = t; i < DV * PART / 2; i += GRAD_THREADS) {
                const int r = i / (PART / 2), c = i % (PART / 2) * 2;
                f32 x[2], y[2];
                if (WIDE) load_two(before + r * LP + c, x);
                else load_two(states + state_at + r * DK + blk * PART + c, x);
                load_two(after + r * LP + c, y);
                along = fmaf(x[0], y[0], fmaf(x[1], y[1], along));
            }
            const int tile = wr * LK + blk * PART + wc * COLS;
            f32 x[2][GN][4];
            clear(x);
            product<PLAIN, PLAIN, DV, LV, LP>(x, deltas + wr * LV, after + wc * COLS);
            collect(xk[blk], dot[END], x, wrote, keys + tile);
        }
#pragma unroll
        for (int blk = 0; blk < BLOCKS; blk++) {
            const int col = blk * PART + wc * COLS, tile = wr * LK + col;
            f32 x[2][GN][4];
            clear(x);
            product<PLAIN, PLAIN, C, LC, LK>(x, by_queries + wr * LC, keys + col);
            collect(xq[blk], dot[QUERY], x, one, queries + tile);
            clear(x);
            product<PLAIN, PLAIN, C, LC, LK>(x, by_keys + wr * LC, keys + col);
            collect(xk[blk], dot[READER], x, one, keys + tile);
            clear(x);
            product<TURNED, PLAIN, C, LC, LK>(x, by_queries + wr, queries + col);
            product<TURNED, PLAIN, C, LC, LK>(x, by_keys + wr, keys + col);
            collect(xk[blk], dot[WRITER], x, one, keys + tile);
        }
#pragma unroll
        for (int i = 0; i < DOTS; i++)
#pragma unroll
            for (int h = 0; h < 4; h++) {
                f32 sum = dot[i][h];
                sum += __shfl_xor_sync(0xffffffffu, sum, 1);
                sum += __shfl_xor_sync(0xffffffffu, sum, 2);
                if (t % 4 == 0) dots[i][wc][row[h]] = sum;
            }
        along = block_sum(along, sums);
        if (t < C) {
            f32 total[DOTS];
#pragma unroll
            for (int i = 0; i < DOTS; i++) {
                total[i] = 0.0f;
                for (int w = 0; w < WN; w++) total[i] += dots[i][w][t];
            }
            totals[0][t] += total[QUERY];
            totals[1][t] += total[READER] + total[END] + total[WRITER];
            f32 dg = e_to(last) * along;
            if (CORES) {
                // Sums from here to the end of the chunk: 32 at a time, the second half's total before the first.
                f32 sum = total[QUERY] + total[READER] - total[END] - total[WRITER];
#pragma unroll
                for (int o = 1; o < 32; o *= 2) {
                    const f32 later = __shfl_down_sync(0xffffffffu, sum, o);
                    if (t % 32 + o < 32) sum += later;
                }
                const f32 end_sum = warp_sum(total[END]);
                if (t % 32 == 0) carry[t / 32] = sum, carry[2 + t / 32] = end_sum;
                asm volatile("bar.sync 1, 64;" ::: "memory");
                dg += sum + (t < 32 ? carry[1] : 0.0f) + carry[2] + carry[3];
            } else {
                // Without differences: what later tokens read, what earlier ones wrote, and pairs on both sides.
                of_states[0][t] = total[INTER];
                of_states[1][t] = total[END];
                f32 sum = 0.0f;
                for (int j = 0; j < t; j++) {
                    sum += pairs[t % PAIRS][j % PAIRS];
                    pairs[t % PAIRS][j % PAIRS] = sum;
                }
                asm volatile("bar.sync 1, 64;" ::: "memory");
                for (int i = C - 1; i >= t; i--) {
                    dg += of_states[0][i];
                    if (t > 0) dg += pairs[i % PAIRS][(t - 1) % PAIRS];
                }
                for (int j = 0; j < t; j++) dg += of_states[1][j];
            }
            f32 to_log = 0.0f, to_a = 0.0f;
            if (t < valid) {
                const f32 bt = betas[t], rate = -expf(to_f32(a_log[head]));
                const f32 x = to_f32(a[(long long)(first + t) * lda + head]) + to_f32(dt_bias[head]);
                to_a = dg * rate * sigmoid(x);
                to_log = dg * rate * softplus(x);
                da[(long long)(first + t) * ldda + head] = from_f32<T>(to_a);
                db[(long long)(first + t) * lddb + head] = from_f32<T>((1.0f - bt) * (values[t] + total[READER]));
            }
            to_a = warp_sum(to_a);
            to_log = warp_sum(to_log);
            asm volatile("bar.sync 1, 64;" ::: "memory");
            if (t % 32 == 0) carry[t / 32] = to_a, carry[2 + t / 32] = to_log;
            asm volatile("bar.sync 1, 64;" ::: "memory");
            if (t == 0) {
                d_dt_bias[(long long)chunk * value_heads + head] = carry[0] + carry[1];
                d_a_log[(long long)chunk * value_heads + head] = carry[2] + carry[3];
            }
        }
    }
    __syncthreads();
#pragma unroll
    for (int blk = 0; blk < BLOCKS; blk++)
#pragma unroll
        for (int n = 0; n < GN; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                if (row[i] >= valid) continue;
                const int col = blk * PART + wc * COLS + n * 8 + lane_col(), at = i % 2 * 2;
                const f32 bq = rqs[row[i]] * rqs[row[i]] * totals[0][row[i]], bk = rks[row[i]] * rks[row[i]] * totals[1][row[i]];
                f32 x[2], y[2];
                load_two(queries + row[i] * LK + col, x);
                load_two(keys + row[i] * LK + col, y);
                const f32 *gq = xq[blk][i / 2][n], *gk = xk[blk][i / 2][n];
                store_two<T>(dq + (long long)(first + row[i]) * lddq + key_head * DK + col, gq[at] - bq * x[0],
                             gq[at + 1] - bq * x[1]);
                store_two<T>(dk + (long long)(first + row[i]) * lddk + key_head * DK + col, gk[at] - bk * y[0],
                             gk[at + 1] - bk * y[1]);
            }
}
