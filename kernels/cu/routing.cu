// Router of a mixture of experts, and the rows that it deals to the experts; kernels/src/ops/routing.
//
// The top_k largest logits of a token, in falling order, equal ones from the lower expert on; their weights [tokens, top_k]:
//   FORM 0: softmax(logits) over all experts; 1: softmax over the chosen; 2: sigmoid of each
// Backward, w the weights and dw their gradient: 0: dlogits = p ([chosen] dw - sum over the chosen p dw), p = softmax(logits);
// 1: w (dw - sum w dw) where chosen, 0 elsewhere; 2: w (1 - w) dw where chosen.
//
// A selection is token * top_k + slot. Rows are selections sorted by expert, in rising order within an expert:
// sorted [rows] the selection of a row, place [tokens, top_k] the row of a selection, offsets [experts + 1] first rows.
//
// Layout: logits and dlogits of T with row strides; every other array dense, i32 or f32. experts <= 512, top_k <= 32.
// y and onto of sum_slots: matrices of T, 16-byte aligned, strides multiples of 8, any width.
//
// Launch (no dynamic shared memory but where named)
//   router_fwd(logits, f32* weights, i32* chosen, i32 tokens, experts, top_k, form, ldl)
//   router_bwd(logits|null, const f32* weights, const i32* chosen, const f32* dweights, dlogits, i32 tokens, experts, top_k, form,
//              ldl, lddl)      grid ceil(tokens / 8), block 256: a warp a token; form 0 reads the logits
//   router_spread(const f32* values, const i32* chosen, out, i32 tokens, experts, top_k, ldo)      the same grid: out [tokens, experts]
//     of T is 0 but for the values [tokens, top_k] of the chosen
//   router_pick(all, const i32* chosen, f32* values, i32 selections, top_k, lda)      grid ceil(selections / 256), block 256: its adjoint
//   expert_row_sums(dy, const i32* offsets, f32* sums, i32 n, lddy)      grid (ceil(n / 32), experts), block 256: sums [experts, n] +=
//     the rows of each expert
//   dispatch_count(const i32* chosen, i32* counts, i32 selections, experts)      grid ceil(selections / 1024), block 1024
//   dispatch_scan(i32* counts, i32* offsets, i32 blocks, experts)                grid 1, block 512
//   dispatch_place(const i32* chosen, const i32* counts, i32* sorted, i32* place, i32 selections, experts)
//     grid and block as dispatch_count, 64 * experts bytes of dynamic shared memory. counts [blocks, experts] is scratch.
//   sum_slots(y, const i32* place, const onto|null, out, i32 tokens, width, top_k, ldy, ldon, ldout)
//     grid ceil(tokens * ceil(width / N) / 256), block 256; N = 8 for 16-bit T, 4 for f32. out may be onto.
// The sort is stable, so the same choice gives the same rows.
//
// Bytes -> floor at 4.25 TB/s, and measured with launches from Python (about 15 us each), NVIDIA H200, 2026-11-30, bf16, 8,192
// tokens, 8 of 128 experts, 2,048 wide: sum_slots 336 MB -> 79 us: 104; router_fwd 2 MB: 42; router_bwd: 26; the three dispatch
// kernels together: 52. No spills from sm_80 to sm_120.
// Tests: kernels/tests/cuda.rs against the CPU's choice and f64.

const int N = Vec<T>::N;

// Values that a lane holds of a token's logits: experts lane, lane + 32, ...
const int HELD = 16;

DEVICE f32 exponential(f32 x) { return sizeof(T) == 4 ? expf(x) : __expf(x); }

// Larger for larger values, and for equal ones of a lower expert; never 0.
DEVICE u64 rank_key(f32 x, int expert) {
    const u32 bits = __float_as_uint(x);
    return (u64)(bits >> 31 ? ~bits : bits | 0x80000000u) << 32 | (u32)~expert;
}
DEVICE f32 ranked_value(u64 key) {
    const u32 bits = (u32)(key >> 32);
    return __uint_as_float(bits >> 31 ? bits & 0x7fffffffu : ~bits);
}
DEVICE u64 warp_max(u64 x) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) {
        const u64 y = __shfl_xor_sync(0xffffffffu, x, o);
        x = x > y ? x : y;
    }
    return x;
}

// The lane's logits, -inf beyond them.
DEVICE void load_logits(f32 (&x)[HELD], const T* logits, int experts) {
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int e = i * 32 + threadIdx.x % 32;
        x[i] = e < experts ? to_f32(logits[e]) : -__int_as_float(0x7f800000);
    }
}
// Replaces logits by exp(logit - top), and returns their sum over the warp.
DEVICE f32 exponentials(f32 (&x)[HELD], int experts, f32 top) {
    f32 sum = 0.0f;
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        x[i] = i * 32 + (int)threadIdx.x % 32 < experts ? exponential(x[i] - top) : 0.0f;
        sum += x[i];
    }
    return warp_sum(sum);
}

extern "C" __global__ void __launch_bounds__(256)
router_fwd(const T* logits, f32* weights, int* chosen, int tokens, int experts, int top_k, int form, int ldl) {
    const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    f32 x[HELD];
    load_logits(x, logits + (u64)token * ldl, experts);
    // Lane s keeps the choice of slot s.
    f32 mine = 0.0f;
    int expert = 0;
    u32 taken = 0;
    for (int slot = 0; slot < top_k; slot++) {
        u64 best = 0;
#pragma unroll
        for (int i = 0; i < HELD; i++) {
            const int e = i * 32 + lane;
            if (e < experts && !(taken >> i & 1)) {
                const u64 key = rank_key(x[i], e);
                best = best > key ? best : key;
            }
        }
        best = warp_max(best);
        const int e = (int)~(u32)best;
        if (lane == e % 32) taken |= 1u << e / 32;
        if (lane == slot) mine = ranked_value(best), expert = e;
    }
    // The first choice is the largest logit of all.
    const f32 top = __shfl_sync(0xffffffffu, mine, 0);
    f32 weight;
    if (form == 2) {
        weight = 1.0f / (1.0f + exponential(-mine));
    } else {
        weight = lane < top_k ? exponential(mine - top) : 0.0f;
        weight /= form == 1 ? warp_sum(weight) : exponentials(x, experts, top);
    }
    if (lane < top_k) {
        weights[(u64)token * top_k + lane] = weight;
        chosen[(u64)token * top_k + lane] = expert;
    }
}

extern "C" __global__ void __launch_bounds__(256)
router_bwd(const T* logits, const f32* weights, const int* chosen, const f32* dweights, T* dlogits, int tokens, int experts,
           int top_k, int form, int ldl, int lddl) {
    const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    const u64 at = (u64)token * top_k + lane;
    const f32 w = lane < top_k ? weights[at] : 0.0f, dw = lane < top_k ? dweights[at] : 0.0f;
    const int expert = lane < top_k ? chosen[at] : -1;
    const f32 mean = warp_sum(w * dw);
    const f32 dlogit = form == 2 ? w * (1.0f - w) * dw : w * (dw - mean);
    f32 x[HELD];
    if (form) {
#pragma unroll
        for (int i = 0; i < HELD; i++) x[i] = 0.0f;
    } else {
        load_logits(x, logits + (u64)token * ldl, experts);
        f32 top = x[0];
#pragma unroll
        for (int i = 1; i < HELD; i++) top = fmaxf(top, x[i]);
        const f32 sum = exponentials(x, experts, warp_max(top));
#pragma unroll
        for (int i = 0; i < HELD; i++) x[i] *= -mean / sum;
    }
    for (int slot = 0; slot < top_k; slot++) {
        const int e = __shfl_sync(0xffffffffu, expert, slot);
        const f32 d = __shfl_sync(0xffffffffu, dlogit, slot);
#pragma unroll
        for (int i = 0; i < HELD; i++) x[i] = e == i * 32 + lane ? d : x[i];
    }
#pragma unroll
    for (int i = 0; i < HELD; i++) {
        const int e = i * 32 + lane;
        if (e < experts) dlogits[(u64)token * lddl + e] = from_f32<T>(x[i]);
    }
}

extern "C" __global__ void __launch_bounds__(256)
router_spread(const f32* values, const int* chosen, T* out, int tokens, int experts, int top_k, int ldo) {
    const int token = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    const u64 at = (u64)token * top_k + lane;
    const f32 value = lane < top_k ? values[at] : 0.0f;
    const int expert = lane < top_k ? chosen[at] : -1;
    for (int first = 0; first < experts; first += 32) {
        f32 x = 0.0f;
        for (int slot = 0; slot < top_k; slot++) {
            const int e = __shfl_sync(0xffffffffu, expert, slot);
            const f32 v = __shfl_sync(0xffffffffu, value, slot);
            if (e == first + lane) x = v;
        }
        if (first + lane < experts) out[(u64)token * ldo + first + lane] = from_f32<T>(x);
    }
}

extern "C" __global__ void __launch_bounds__(256)
router_pick(const T* all, const int* chosen, f32* values, int selections, int top_k, int lda) {
    const int s = blockIdx.x * 256 + threadIdx.x;
    if (s < selections) values[s] = to_f32(all[(u64)(s / top_k) * lda + chosen[s]]);
}

extern "C" __global__ void __launch_bounds__(256)
expert_row_sums(const T* dy, const int* offsets, f32* sums, int n, int lddy) {
    __shared__ f32 parts[8][32];
    const int col = blockIdx.x * 32 + threadIdx.x % 32, part = threadIdx.x / 32;
    f32 sum = 0.0f;
    if (col < n)
        for (int row = offsets[blockIdx.y] + part; row < offsets[blockIdx.y + 1]; row += 8) sum += to_f32(dy[(u64)row * lddy + col]);
    parts[part][threadIdx.x % 32] = sum;
    __syncthreads();
    if (part || col >= n) return;
#pragma unroll
    for (int i = 1; i < 8; i++) sum += parts[i][threadIdx.x];
    sums[(u64)blockIdx.y * n + col] += sum;
}

// Selections of each expert in each 1024 selections.
extern "C" __global__ void __launch_bounds__(1024)
dispatch_count(const int* chosen, int* counts, int selections, int experts) {
    __shared__ int count[512];
    if (threadIdx.x < experts) count[threadIdx.x] = 0;
    __syncthreads();
    const int s = blockIdx.x * 1024 + threadIdx.x;
    if (s < selections) atomicAdd(&count[chosen[s]], 1);
    __syncthreads();
    if (threadIdx.x < experts) counts[(u64)blockIdx.x * experts + threadIdx.x] = count[threadIdx.x];
}

// Counts become the first rows of each block's selections of each expert.
extern "C" __global__ void __launch_bounds__(512) dispatch_scan(int* counts, int* offsets, int blocks, int experts) {
    __shared__ int sums[16];
    const int e = threadIdx.x, lane = e % 32;
    int total = 0;
    if (e < experts) {
#pragma unroll 8
        for (int b = 0; b < blocks; b++) total += counts[(u64)b * experts + e];
    }
    int scan = total;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const int below = __shfl_up_sync(0xffffffffu, scan, o);
        if (lane >= o) scan += below;
    }
    if (lane == 31) sums[e / 32] = scan;
    __syncthreads();
    int first = scan - total;
    for (int w = 0; w < e / 32; w++) first += sums[w];
    if (e < experts) {
        offsets[e] = first;
        if (e == experts - 1) offsets[experts] = first + total;
        for (int b = 0; b < blocks; b++) {
            const u64 at = (u64)b * experts + e;
            const int here = counts[at];
            counts[at] = first;
            first += here;
        }
    }
}

extern "C" __global__ void __launch_bounds__(1024)
dispatch_place(const int* chosen, const int* counts, int* sorted, int* place, int selections, int experts) {
    // [32 warps][experts]: selections of an expert in the warps before this one.
    extern __shared__ u16 before[];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    for (int i = threadIdx.x; i < 32 * experts; i += 1024) before[i] = 0;
    __syncthreads();
    const int s = blockIdx.x * 1024 + threadIdx.x;
    const int e = s < selections ? chosen[s] : -1;
    const u32 same = __match_any_sync(0xffffffffu, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    if (e >= 0 && rank == 0) before[warp * experts + e] = (u16)__popc(same);
    __syncthreads();
    if (threadIdx.x < experts) {
        int sum = 0;
#pragma unroll
        for (int w = 0; w < 32; w++) {
            const int here = before[w * experts + threadIdx.x];
            before[w * experts + threadIdx.x] = (u16)sum;
            sum += here;
        }
    }
    __syncthreads();
    if (e < 0) return;
    const int row = counts[(u64)blockIdx.x * experts + e] + before[warp * experts + e] + rank;
    sorted[row] = s;
    place[s] = row;
}

extern "C" __global__ void __launch_bounds__(256)
sum_slots(const T* y, const int* places, const T* onto, T* out, int tokens, int width, int top_k, int ldy, int ldon, int ldout) {
    const Place p = place<N>(blockIdx.x * 256 + threadIdx.x, width);
    if (p.row >= (u32)tokens) return;
    f32 sum[N], v[N];
#pragma unroll
    for (int e = 0; e < N; e++) sum[e] = 0.0f;
    if (onto) unpack16<T>(load_part(at(onto, p.row, ldon, p.col), p.n), sum);
#pragma unroll 4
    for (int slot = 0; slot < top_k; slot++) {
        unpack16<T>(load_part(at(y, (u32)places[p.row * (u32)top_k + slot], ldy, p.col), p.n), v);
#pragma unroll
        for (int e = 0; e < N; e++) sum[e] += v[e];
    }
    store_part(at(out, p.row, ldout, p.col), p.n, pack16<T>(sum));
}
