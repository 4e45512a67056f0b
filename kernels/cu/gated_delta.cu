// The gated delta rule in chunks of 64 tokens: forward, states, and the backward from chunk to chunk;
// kernels/src/ops/gated_delta.
//
// With r the reciprocal L2 norms of queries and keys, s = DK^-½, G the sum of g up to a token of its chunk, γ = e^G, and c_j =
// rk_j·e^(G_end − G_j), a chunk that starts with the state S computes
//   L_ij = β_i e^(G_i − G_j) rk_i rk_j k_i·k_j (j < i), A = (I + L)^-1, P_ij = s e^(G_i − G_j) rq_i rk_j q_i·k_j (j ≤ i)
//   Δ = A·β(V − γ rk K·S), O = s γ rq Q·S + P·Δ, S' = γ_end S + (c K)ᵀ·Δ.
// Backward with D the gradient to S': dΔ = Pᵀ·dO + c K·D, dV = β Aᵀ·dΔ, dS = γ_end D − (γ rk K)ᵀ·dV + (s γ rq Q)ᵀ·dO.
//
// Layout: q, k [tokens, key heads · DK], v, o, d_o, dv [tokens, value heads · DV], a, b [tokens, value heads] of T with row strides
// in elements, 16-byte aligned rows; a_log, dt_bias [value heads] of T; value head h has the key of head
// h / (value heads / key heads). cum f32 (f64 with T = f32) [value heads, tokens]; factors f32 [4, value heads, tokens]; decays f32
// [chunks, value heads]; rq, rk f32 [key heads, tokens]; solve (A), scores (P) of E [chunks, value heads, 64, 64]; states, ends of E
// [chunks, value heads, DV, DK], transposed; delta of E [tokens, value heads · DV].
// chunks: i32 pairs (first token, tokens); sequences: i32 pairs (first chunk, chunks). start, end: f32 [value heads, DK, DV] or
// null, with one sequence. E is T. DK and DV are 16, 32, 64 or 128; DVS divides DV and is at least 16; a scan keeps STAGES chunks
// in shared memory.
//
// Launch; the dynamic shared memory is in kernels/src/ops/gated_delta/cuda.rs
//   gated_delta_prep: grid (chunks, key heads), 128 threads.
//   gated_delta_fwd, _states, _bwd_scan: grid (sequences, value heads, DV / DVS), 2 · DVS threads.
//   gated_delta_step: grid (value heads), DV rounded up to 32 threads, one token, `state` in place.
//
// Measured on an H200, bf16, 16 key and 32 value heads of 128, 4 × 2,048 tokens, DVS = 128, STAGES = 2, 2026-11-30: prep 127 µs,
// fwd 197, states 208, bwd_scan 253. One document of 8,192 tokens, DVS = 32: 124, 542, 563, 589. memcheck clean.
// Tried: state and Δ in shared memory, warps sharing rows: fwd 227 µs, states 232, bwd_scan 273.

static const int LS = DVS + PAD;

// ---- What the chunks need that no state takes part in.

static const int LL = C + 4;

extern "C" __global__ void __launch_bounds__(128)
gated_delta_prep(const T* q, const T* k, const T* b, const T* a, const T* a_log, const T* dt_bias, const int* chunks, E* solve,
                 E* scores, Sum* cum, f32* factors, f32* decays, f32* rq, f32* rk, int key_heads, int value_heads, int tokens, int ldq, int ldk,
                 int ldb, int lda) {
    __shared__ f32 norms[2][C], betas[2][C];
    __shared__ Sum gates[2][C], carry[2];
    E* keys = reinterpret_cast<E*>(shared);
    E* queries = keys + C * LK;
    f32* lower = reinterpret_cast<f32*>(shared); // over keys and queries, when these are in registers
    const int chunk = blockIdx.x, key_head = blockIdx.y, t = threadIdx.x, warp = t / 32, group = value_heads / key_heads;
    const int first = chunks[2 * chunk], valid = chunks[2 * chunk + 1];
    load_rows<C, DK>(keys, k + (long long)first * ldk + key_head * DK, ldk, valid, 128);
    load_rows<C, DK>(queries, q + (long long)first * ldq + key_head * DK, ldq, valid, 128);
    commit();
    arrived<0>();
    __syncthreads();
    const int half = t / C, i = t % C;
    {
        const E* row = (half ? keys : queries) + i * LK;
        f32 sum = 0.0f;
#pragma unroll 4
        for (int d = 0; d < DK; d += Vec<E>::N) {
            f32 x[Vec<E>::N];
            load16<E>(row + d, x);
#pragma unroll
            for (int e = 0; e < Vec<E>::N; e++) sum = fmaf(x[e], x[e], sum);
        }
        const f32 r = inverse_root(sum + L2_EPS);
        norms[half][i] = r;
        if (i < valid) (half ? rk : rq)[(long long)key_head * tokens + first + i] = r;
    }
    f32 kk[1][8][4], qk[1][8][4];
    clear(kk);
    clear(qk);
    product<PLAIN, TURNED, DK, LK, LK>(kk, keys + warp * 16 * LK, keys);
    product<PLAIN, TURNED, DK, LK, LK>(qk, queries + warp * 16 * LK, keys);
    for (int pair = 0; pair < group; pair += 2) {
        const int head = key_head * group + pair + half;
        const bool here = pair + half < group;
        Sum g = 0;
        f32 bt = 0.0f;
        if (here && i < valid) {
            bt = sigmoid(to_f32(b[(long long)(first + i) * ldb + head]));
            g = -expf(to_f32(a_log[head])) * softplus(to_f32(a[(long long)(first + i) * lda + head]) + to_f32(dt_bias[head]));
        }
#pragma unroll
        for (int o = 1; o < 32; o *= 2) {
            const Sum before = __shfl_up_sync(0xffffffffu, g, o);
            if (t % 32 >= o) g += before;
        }
        if (warp % 2 == 0 && t % 32 == 31) carry[half] = g;
        __syncthreads(); // also: everyone has read the tiles, or the last pair's triangles
        if (warp % 2) g += carry[half];
        gates[half][i] = g;
        betas[half][i] = bt;
        __syncthreads();
        if (here && i < valid) {
            const Sum last = gates[half][C - 1];
            const long long at = (long long)head * tokens + first + i, next = (long long)value_heads * tokens;
            cum[at] = g;
            factors[BETA * next + at] = bt;
            factors[READ * next + at] = e_to(g) * norms[1][i];
            factors[ASK * next + at] = e_to(g) * norms[0][i] * scale();
            factors[WRITE * next + at] = e_to(last - g) * norms[1][i];
            if (i == 0) decays[(long long)chunk * value_heads + head] = e_to(last);
        }
        for (int p = 0; p < 2 && pair + p < group; p++) {
            E* to = scores + ((long long)chunk * value_heads + key_head * group + pair + p) * C * C;
#pragma unroll
            for (int n = 0; n < 8; n++)
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int row = warp * 16 + lane_row() + h * 8;
                    const Sum at = gates[p][row];
                    const f32 bt = betas[p][row] * norms[1][row], qs = norms[0][row] * scale();
                    f32 score[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) {
                        const int col = n * 8 + lane_col() + e;
                        const f32 decay = col <= row ? e_to(at - gates[p][col]) * norms[1][col] : 0.0f;
                        score[e] = qk[0][n][h * 2 + e] * qs * decay;
                        lower[p * C * LL + row * LL + col] = col < row ? kk[0][n][h * 2 + e] * bt * decay : 0.0f;
                    }
                    store_two<E>(to + row * C + n * 8 + lane_col(), score[0], score[1]);
                }
        }
        __syncthreads();
        // A thread solves one column of A by forward substitution.
        if (here) {
            const f32* rows = lower + half * C * LL;
            E* to = solve + ((long long)chunk * value_heads + head) * C * C + i;
            f32 x[C];
#pragma unroll
            for (int row = 0; row < C; row++) {
                f32 sum[4] = {row == i ? 1.0f : 0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int m = 0; m < row; m += 4) {
                    const float4 l = *reinterpret_cast<const float4*>(rows + row * LL + m);
                    sum[0] = fmaf(-l.x, x[m], sum[0]);
                    if (m + 1 < row) sum[1] = fmaf(-l.y, x[m + 1], sum[1]);
                    if (m + 2 < row) sum[2] = fmaf(-l.z, x[m + 2], sum[2]);
                    if (m + 3 < row) sum[3] = fmaf(-l.w, x[m + 3], sum[3]);
                }
                x[row] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
                to[row * C] = from_f32<E>(x[row]);
            }
        }
    }
}

// ---- Scans over the chunks of a sequence. A warp has 16 channels of a value head, whose part of the state, transposed, stays
// in its registers; so do their rows of Δ and of the results, and warps share nothing but the chunks' tiles.

static const int SCAN_THREADS = 2 * DVS;
static const int DN = DK / 8;

struct Scan {
    const T *q, *k, *x;                             // x: v forward, d_o backward
    const E *solve, *scores;
    const f32 *factors, *decays;
    int key_heads, value_heads, tokens, ldq, ldk, ldx;
};

struct Rows { f32 of[FACTORS][C], decay; };

// Tiles of one chunk.
template <bool QUERIES> struct Tiles {
    static const int SIZE = C * (LK * (QUERIES ? 2 : 1) + LC * (QUERIES ? 2 : 1) + LS);
    E *k, *q, *solve, *scores, *x;
    Rows* rows;
    DEVICE Tiles(E* tiles, Rows* all, int stage) {
        k = tiles + stage * SIZE;
        x = k + C * LK;
        solve = x + C * LS;
        q = solve + C * LC;
        scores = q + C * LK;
        rows = all + stage;
    }
    DEVICE void load(const Scan& s, const int* chunks, int chunk, int head, int column) const {
        const int first = chunks[2 * chunk], valid = chunks[2 * chunk + 1];
        const int key_head = head / (s.value_heads / s.key_heads);
        load_rows<C, DK>(k, s.k + (long long)first * s.ldk + key_head * DK, s.ldk, valid, SCAN_THREADS);
        load_rows<C, DVS>(x, s.x + (long long)first * s.ldx + head * DV + column, s.ldx, valid, SCAN_THREADS);
        const long long square = ((long long)chunk * s.value_heads + head) * C * C;
        load_rows<C, C>(solve, s.solve + square, C, C, SCAN_THREADS);
        if (QUERIES) {
            load_rows<C, DK>(q, s.q + (long long)first * s.ldq + key_head * DK, s.ldq, valid, SCAN_THREADS);
            load_rows<C, C>(scores, s.scores + square, C, C, SCAN_THREADS);
        }
        commit();
        for (int i = threadIdx.x; i < FACTORS * C; i += SCAN_THREADS) {
            const f32* of = s.factors + ((long long)(i / C) * s.value_heads + head) * s.tokens + first;
            rows->of[i / C][i % C] = i % C < valid ? of[i % C] : 0.0f;
        }
        if (threadIdx.x == 0) rows->decay = s.decays[(long long)chunk * s.value_heads + head];
    }
    // The tokens' factors, times x.
    DEVICE void scale(f32 (&x)[8][4], Factor factor, f32 sign = 1.0f) const {
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[n][e] *= sign * rows->of[factor][n * 8 + lane_col() + e % 2];
    }
};

// A warp's part of the state as E.
DEVICE void store_state(const f32 (&s)[DN][4], E* to) {
#pragma unroll
    for (int n = 0; n < DN; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            store_two<E>(to + (lane_row() + h * 8) * DK + n * 8 + lane_col(), s[n][h * 2], s[n][h * 2 + 1]);
}

template <int N> DEVICE void clear(f32 (&c)[N][4]) {
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) c[n][e] = 0.0f;
}

// O, or with STATES the state before each chunk and Δ.
template <bool STATES>
DEVICE void forward(const Scan& p, const int* chunks, const int* sequences, T* o, E* states, E* delta, const f32* start, f32* end,
                    int ldo) {
    __shared__ Rows rows[STAGES];
    typedef Tiles<!STATES> Chunk;
    E* tiles = reinterpret_cast<E*>(shared);
    const int head = blockIdx.y, column = blockIdx.z * DVS, mine = threadIdx.x / 32 * 16, channel = column + mine;
    const int begin = sequences[2 * blockIdx.x], count = sequences[2 * blockIdx.x + 1];
    const long long whole = (long long)head * DK * DV + channel + lane_row(); // of start and end
    f32 s[DN][4];
    clear(s);
    if (start)
#pragma unroll
        for (int n = 0; n < DN; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] = start[whole + (long long)(n * 8 + lane_col() + e % 2) * DV + e / 2 * 8];
    if (STAGES > 1 && count > 0) Chunk(tiles, rows, 0).load(p, chunks, begin, head, column);
    for (int i = 0; i < count; i++) {
        const int chunk = begin + i;
        const Chunk at(tiles, rows, i % STAGES);
        if (STAGES == 1) {
            __syncthreads();
            at.load(p, chunks, chunk, head, column);
        }
        arrived<0>();
        __syncthreads();
        if (STAGES > 1 && i + 1 < count) Chunk(tiles, rows, (i + 1) % STAGES).load(p, chunks, chunk + 1, head, column);
        const int first = chunks[2 * chunk], valid = chunks[2 * chunk + 1];
        if (STATES) store_state(s, states + ((long long)chunk * p.value_heads + head) * DK * DV + channel * DK);
        f32 y[8][4], z[8][4], x[8][4];
        clear(y);
        clear(z);
        {
            Held<DK> state;
            state.set(s);
            product_held<TURNED, DK, LK, FULL>(y, state, at.k);
            if (!STATES) product_held<TURNED, DK, LK, FULL>(z, state, at.q);
        }
        load_turned<LS>(x, at.x + mine);
        at.scale(y, READ);
#pragma unroll
        for (int n = 0; n < 8; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) x[n][e] -= y[n][e];
        at.scale(x, BETA);
        Held<C> rest;
        rest.set(x);
        clear(y);
        product_held<TURNED, C, LC, FROM_DIAGONAL>(y, rest, at.solve);
        if (STATES) store_turned(delta + (long long)first * p.value_heads * DV + head * DV + channel, p.value_heads * DV, valid, y);
        else {
            at.scale(z, ASK);
            rest.set(y);
            product_held<TURNED, C, LC, FROM_DIAGONAL>(z, rest, at.scores);
            store_turned(o + (long long)first * ldo + head * DV + channel, ldo, valid, z);
        }
        at.scale(y, WRITE);
        rest.set(y);
#pragma unroll
        for (int n = 0; n < DN; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] *= at.rows->decay;
        product_held<PLAIN, C, LK, FULL>(s, rest, at.k);
    }
    if (end)
#pragma unroll
        for (int n = 0; n < DN; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) end[whole + (long long)(n * 8 + lane_col() + e % 2) * DV + e / 2 * 8] = s[n][e];
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
gated_delta_fwd(const T* q, const T* k, const T* v, const E* solve, const E* scores, const f32* factors, const f32* decays,
                const int* chunks, const int* sequences, const f32* start, f32* end, T* o, int key_heads, int value_heads,
                int tokens, int ldq, int ldk, int ldv, int ldo) {
    const Scan p = {q, k, v, solve, scores, factors, decays, key_heads, value_heads, tokens, ldq, ldk, ldv};
    forward<false>(p, chunks, sequences, o, nullptr, nullptr, start, end, ldo);
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
gated_delta_states(const T* k, const T* v, const E* solve, const f32* factors, const f32* decays, const int* chunks,
                   const int* sequences, E* states, E* delta, int key_heads, int value_heads, int tokens, int ldk, int ldv) {
    const Scan p = {nullptr, k, v, solve, nullptr, factors, decays, key_heads, value_heads, tokens, 0, ldk, ldv};
    forward<true>(p, chunks, sequences, nullptr, states, delta, nullptr, nullptr, 0);
}

// dV, and the gradient to the state after each chunk, from the last chunk to the first.
extern "C" __global__ void __launch_bounds__(SCAN_THREADS)
gated_delta_bwd_scan(const T* q, const T* k, const T* d_o, const E* solve, const E* scores, const f32* factors,
                     const f32* decays, const int* chunks, const int* sequences, E* ends, T* dv, int key_heads, int value_heads,
                     int tokens, int ldq, int ldk, int lddo, int lddv) {
    __shared__ Rows rows[STAGES];
    const Scan p = {q, k, d_o, solve, scores, factors, decays, key_heads, value_heads, tokens, ldq, ldk, lddo};
    typedef Tiles<true> Chunk;
    E* tiles = reinterpret_cast<E*>(shared);
    const int head = blockIdx.y, column = blockIdx.z * DVS, mine = threadIdx.x / 32 * 16, channel = column + mine;
    const int begin = sequences[2 * blockIdx.x], count = sequences[2 * blockIdx.x + 1];
    f32 s[DN][4];
    clear(s);
    if (STAGES > 1 && count > 0) Chunk(tiles, rows, 0).load(p, chunks, begin + count - 1, head, column);
    for (int i = 0; i < count; i++) {
        const int chunk = begin + count - 1 - i;
        const Chunk at(tiles, rows, i % STAGES);
        if (STAGES == 1) {
            __syncthreads();
            at.load(p, chunks, chunk, head, column);
        }
        arrived<0>();
        __syncthreads();
        if (STAGES > 1 && i + 1 < count) Chunk(tiles, rows, (i + 1) % STAGES).load(p, chunks, chunk - 1, head, column);
        const int first = chunks[2 * chunk], valid = chunks[2 * chunk + 1];
        store_state(s, ends + ((long long)chunk * value_heads + head) * DK * DV + channel * DK);
        f32 y[8][4], x[8][4], g[8][4];
        clear(y);
        clear(x);
        {
            Held<DK> state;
            state.set(s);
            product_held<TURNED, DK, LK, FULL>(y, state, at.k);
        }
        at.scale(y, WRITE);
        load_turned<LS>(g, at.x + mine);
        Held<C> left;
        left.set(g);
        product_held<PLAIN, C, LC, TO_DIAGONAL>(y, left, at.scores);
        left.set(y);
        product_held<PLAIN, C, LC, TO_DIAGONAL>(x, left, at.solve);
        at.scale(x, BETA);
        store_turned(dv + (long long)first * lddv + head * DV + channel, lddv, valid, x);
#pragma unroll
        for (int n = 0; n < DN; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[n][e] *= at.rows->decay;
        at.scale(x, READ, -1.0f);
        left.set(x);
        product_held<PLAIN, C, LK, FULL>(s, left, at.k);
        at.scale(g, ASK);
        left.set(g);
        product_held<PLAIN, C, LK, FULL>(s, left, at.q);
    }
}

// ---- One token: S ← e^g S; S ← S + k ⊗ β(v − Sᵀk); o = Sᵀq. A thread has one column of the state.

extern "C" __global__ void __launch_bounds__(128)
gated_delta_step(const T* q, const T* k, const T* v, const T* b, const T* a, const T* a_log, const T* dt_bias, f32* state, T* o,
                 int key_heads, int value_heads) {
    __shared__ f32 keys[DK], queries[DK], sums[4];
    const int head = blockIdx.x, key_head = head / (value_heads / key_heads), t = threadIdx.x;
    f32 qq = 0.0f, kk = 0.0f;
    for (int d = t; d < DK; d += blockDim.x) {
        const f32 x = to_f32(q[key_head * DK + d]), y = to_f32(k[key_head * DK + d]);
        queries[d] = x;
        keys[d] = y;
        qq = fmaf(x, x, qq);
        kk = fmaf(y, y, kk);
    }
    const f32 rq = inverse_root(block_sum(qq, sums) + L2_EPS) * scale();
    const f32 rk = inverse_root(block_sum(kk, sums) + L2_EPS);
    if (t >= DV) return;
    const f32 bt = sigmoid(to_f32(b[head]));
    const f32 decay = expf(-expf(to_f32(a_log[head])) * softplus(to_f32(a[head]) + to_f32(dt_bias[head])));
    f32* column = state + (long long)head * DK * DV + t;
    f32 past = 0.0f, out = 0.0f;
#pragma unroll 16
    for (int d = 0; d < DK; d++) past = fmaf(column[d * DV], keys[d], past);
    const f32 change = bt * (to_f32(v[head * DV + t]) - rk * decay * past) * rk;
#pragma unroll 16
    for (int d = 0; d < DK; d++) {
        const f32 s = fmaf(keys[d], change, column[d * DV] * decay);
        out = fmaf(s, queries[d], out);
        column[d * DV] = s;
    }
    o[head * DV + t] = from_f32<T>(out * rq);
}
