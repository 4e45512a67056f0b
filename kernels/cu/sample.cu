// Choice of the next token from each row of logits; kernels/src/ops/decode_step.
//
// l = multiplier·logit, with a softcap c l = c·tanh(l / c). A row with temperature 0 takes the largest l, the lowest id of
// equal ones. Others draw from w = exp((l - max) / temperature), after these filters: top_k keeps the k largest l; top_p of
// those the fewest largest whose w reach the share top_p; min_p those with w >= min_p. Of equal l the lower ids are kept.
//
// Without a filter the draw is that of `uniform` in the cumulated weights in the order of threads, with filters in the
// order of falling weights: the distribution is that of the CPU's sampler, the token of a random number is another one.
//
// A block has a row. The first pass over the logits finds maximum and sums. With a filter, a second pass collects the
// candidates, tokens whose l reaches a limit, into shared memory, where they are sorted. The limit is the k-th largest
// of the threads' maxima, which at least k tokens reach; k is top_k, or FIRST for top_p alone. Where the candidates do not
// fit or do not reach top_p, the filters' limits are found by bisection over the bits of l, a pass a bit, 16 for logits of
// 16 bits and 32 otherwise.
//
// Layout: logits [rows, vocab] of T, row-major, stride ld a multiple of 8, 16-byte aligned. draws 32 bytes a row: f32
// temperature, top_p, min_p, u32 top_k (0 for all), f64 uniform, 8 bytes unused. drawn uint4 a row: id, ln p of the id by the
// unfiltered logits, ln p in the distribution it was drawn from (0 for temperature 0; both f32), and 1 if all logits are finite.
// If they are not the rest is undefined.
//
// Launch: sample(logits, draws, drawn, i32 vocab, ld, f32 multiplier, softcap), grid rows, block 1024; with -DSOFTCAP the softcap
// is applied.
//
// Floor: the bytes of the logits, but at a few rows what one multiprocessor reads and computes.
// Tests: against exact probabilities with evenly spread random numbers: each token comes as often as it must, to within one
// draw, for every filter; tests/tests/cuda.rs.

static const int THREADS = 1024;
static const int WARPS = THREADS / 32;
const int N = Vec<T>::N;
#ifdef SOFTCAP
static const int AHEAD = 2; // beside the softcap, more do not fit into registers
#else
static const int AHEAD = 4; // 16-byte loads of a thread on their way
#endif

#ifdef SOFTCAP
static const bool HAS_SOFTCAP = true;
#else
static const bool HAS_SOFTCAP = false;
#endif

static const int MOST = 2048; // candidates
static const int FIRST = 512; // thread maxima that reach the limit of candidates for top_p alone

struct Draw {
    f32 temperature, top_p, min_p;
    u32 top_k;
    double uniform;
    u64 unused;
};

struct Add {
    template <typename X> DEVICE X operator()(X a, X b) const { return a + b; }
};
struct Smaller {
    template <typename X> DEVICE X operator()(X a, X b) const { return a < b ? a : b; }
};

// The reduction over the block, in every thread, always in the same order.
template <typename X, typename Op> DEVICE X block_reduce(X x, Op op, X* shared) {
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x = op(x, __shfl_xor_sync(0xffffffffu, x, o));
    __syncthreads();
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    x = shared[threadIdx.x % 32];
#pragma unroll
    for (int o = 16; o > 0; o >>= 1) x = op(x, __shfl_xor_sync(0xffffffffu, x, o));
    return x;
}

// The sum over the threads before this one, and the whole in `total`.
DEVICE double block_scan(double x, double* shared, double& total) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double sum = x;
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const double before = __shfl_up_sync(0xffffffffu, sum, o);
        if (lane >= o) sum += before;
    }
    __syncthreads();
    if (lane == 31) shared[warp] = sum;
    __syncthreads();
    double warps = shared[lane];
#pragma unroll
    for (int o = 1; o < 32; o <<= 1) {
        const double before = __shfl_up_sync(0xffffffffu, warps, o);
        if (lane >= o) warps += before;
    }
    total = __shfl_sync(0xffffffffu, warps, 31);
    const double before = __shfl_sync(0xffffffffu, warps, max(0, warp - 1));
    return sum - x + (warp > 0 ? before : 0.0);
}

// Larger for larger values.
DEVICE u32 key(f32 x) {
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The value of a key.
DEVICE f32 value_of(u32 key) { return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key); }

struct Row {
    const T* logits;
    int vocab;
    f32 multiplier, softcap;

    // Calls f(id, l) for this thread's tokens.
    template <typename F> DEVICE void each(F f) const {
        for (int first = threadIdx.x * N; first < vocab; first += AHEAD * THREADS * N) {
            uint4 raw[AHEAD];
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const int i = first + k * THREADS * N;
                raw[k] = load_part(logits + min(i, vocab), i < vocab ? vocab - i : 0);
            }
#pragma unroll
            for (int k = 0; k < AHEAD; k++) {
                const int i = first + k * THREADS * N;
                f32 values[N];
                unpack16<T>(raw[k], values);
#pragma unroll
                for (int j = 0; j < N; j++) {
                    f32 l = values[j] * multiplier;
                    if (HAS_SOFTCAP) l = softcap * tanhf(l / softcap);
                    if (i + j < vocab) f(i + j, l);
                }
            }
        }
    }
    // Whether l has no more bits than T.
    DEVICE bool is_short() const { return sizeof(T) == 2 && !HAS_SOFTCAP && multiplier == 1.0f; }
};

// Tokens that may be drawn: those above `lowest`, and of those at it the ids below `end`.
struct Kept {
    f32 lowest;
    int end;
    DEVICE bool has(int id, f32 l) const { return l > lowest || (l == lowest && id < end); }
};

// The largest key that `reaches` is true for, which it is for 0 and for every key below one that it is true for.
template <typename F> DEVICE u32 largest_key(bool is_short, F reaches) {
    u32 cut = 0;
    for (int bit = 31; bit >= (is_short ? 16 : 0); bit--) {
        const u32 next = cut | 1u << bit;
        if (reaches(next)) cut = next;
    }
    return cut;
}

// Keeps of the kept tokens at `lowest` the first `some`.
DEVICE Kept first_of_equal(const Row& row, const Kept& kept, f32 lowest, int some, int* shared) {
    int low = 0, high = lowest == kept.lowest ? kept.end : row.vocab;
    // Finds the smallest id below which there are `some` of them.
    while (low < high) {
        const int middle = (low + high) / 2;
        int count = 0;
        row.each([&](int id, f32 l) { count += l == lowest && id < middle && kept.has(id, l); });
        if (block_reduce(count, Add(), shared) >= some) high = middle; else low = middle + 1;
    }
    return {lowest, low};
}

// Candidates as key << 32 | ~id, so that the most likely come first in falling order, the lower id of equal ones.
struct Candidates {
    u64 entries[MOST];
    int count;

    // Collects the tokens whose l is at least `limit`; returns how many there are, which may be more than fit.
    DEVICE int collect(const Row& row, f32 limit) {
        if (threadIdx.x == 0) count = 0;
        for (int i = threadIdx.x; i < MOST; i += THREADS) entries[i] = 0;
        __syncthreads();
        row.each([&](int id, f32 l) {
            if (l < limit) return;
            const int at = atomicAdd(&count, 1);
            if (at < MOST) entries[at] = (u64)key(l) << 32 | (u32)~id;
        });
        __syncthreads();
        return count;
    }

    // Sorts the first `some` entries, a power of two, into falling order.
    DEVICE void sort(int some) {
        for (int size = 2; size <= some; size *= 2)
            for (int stride = size / 2; stride > 0; stride /= 2) {
                const int pair = threadIdx.x, low = pair / stride * stride * 2 + pair % stride, high = low + stride;
                if (2 * pair < some) {
                    const u64 a = entries[low], b = entries[high];
                    if ((a < b) == ((low & size) == 0)) entries[low] = b, entries[high] = a;
                }
                __syncthreads();
            }
    }
    DEVICE f32 logit(int i) const { return value_of((u32)(entries[i] >> 32)); }
    DEVICE int id(int i) const { return (int)~(u32)entries[i]; }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
sample(const T* logits, const Draw* draws, uint4* drawn, int vocab, int ld, f32 multiplier, f32 softcap) {
    __shared__ union {
        f32 floats[WARPS];
        double doubles[WARPS];
        int ints[WARPS];
        u64 words[WARPS];
    } shared;
    __shared__ Candidates candidates;
    __shared__ int chosen;
    begin_early();
    const Row row{logits + (long long)blockIdx.x * ld, vocab, multiplier, softcap};
    const Draw draw = draws[blockIdx.x];
    const bool greedy = draw.temperature == 0.0f;
    const f32 inverse = greedy ? 1.0f : 1.0f / draw.temperature;
    const bool same = inverse == 1.0f;

    // This thread's maximum, the sums of exp(l - top) and exp((l - top) / temperature), and whether all are finite.
    f32 top = -3.402823466e38f, sum = 0.0f, weights = 0.0f;
    int best = vocab, finite = 1;
    row.each([&](int id, f32 l) {
        finite &= fabsf(l) <= 3.402823466e38f;
        if (l > top) {
            sum *= __expf(top - l);
            if (!same) weights *= __expf((top - l) * inverse);
            top = l;
            best = id;
        }
        sum += __expf(l - top);
        if (!same) weights += __expf((l - top) * inverse);
    });
    if (same) weights = sum;
    // Of equal maxima the lower id.
    const u64 mine = best < vocab ? (u64)(~key(top)) << 32 | (u32)best : ~0ull;
    const u64 first = block_reduce(mine, Smaller(), shared.words);
    const u32 top_key = ~(u32)(first >> 32);
    const f32 highest = value_of(top_key);
    const int all_finite = block_reduce(finite, Smaller(), shared.ints);
    const f32 shrink = best < vocab ? __expf(top - highest) : 0.0f;
    const double total = block_reduce((double)(sum * shrink), Add(), shared.doubles);
    if (!all_finite || greedy) {
        if (threadIdx.x == 0)
            drawn[blockIdx.x] = make_uint4((u32)first, __float_as_uint((f32)-log(total)), 0, all_finite);
        return;
    }

    auto weight = [&](f32 l) { return __expf((l - highest) * inverse); };
    Kept kept{-__int_as_float(0x7f800000), vocab};
    const bool is_filtered = (draw.top_k > 0 && draw.top_k < (u32)vocab) || draw.top_p < 1.0f || draw.min_p > 0.0f;
    f32 own = best < vocab ? weights * __expf((top - highest) * inverse) : 0.0f;
    const bool has_top_k = draw.top_k > 0 && draw.top_k < (u32)vocab, has_top_p = draw.top_p < 1.0f;
    if (is_filtered && (!has_top_k || draw.top_k <= THREADS)) {
        // The limit that enough tokens reach.
        f32 limit = highest + __logf(fmaxf(draw.min_p, 1e-37f)) * draw.temperature * 1.001f - 1e-3f;
        if (has_top_k || has_top_p) {
            const int wanted = has_top_k ? (int)draw.top_k : FIRST;
            const u32 mine = key(top);
            limit = value_of(largest_key(row.is_short(), [&](u32 cut) { return __syncthreads_count(mine >= cut) >= wanted; }));
        }
        const int count = candidates.collect(row, limit);
        if (count <= MOST) {
            int some = 2;
            while (some < count) some *= 2;
            candidates.sort(some);
            const int kept = has_top_k ? min(count, (int)draw.top_k) : count, at = 2 * threadIdx.x;
            const f32 w[2] = {at < kept ? weight(candidates.logit(at)) : 0.0f,
                              at + 1 < kept ? weight(candidates.logit(at + 1)) : 0.0f};
            double mass;
            const double before = block_scan((double)w[0] + (double)w[1], shared.doubles, mass);
            const double sums[2] = {before + w[0], before + w[0] + w[1]}; // with the entry itself
            const double whole = has_top_k ? mass : block_reduce((double)own, Add(), shared.doubles);
            const double target = has_top_p ? whole * (double)draw.top_p : 0.0;
            if (mass >= target) {
                int some = kept;
                if (has_top_p) {
                    const int below = (at < kept && sums[0] < target) + (at + 1 < kept && sums[1] < target);
                    some = min(some, block_reduce(below, Add(), shared.ints) + 1);
                }
                if (draw.min_p > 0.0f)
                    some = min(some, block_reduce((w[0] >= draw.min_p) + (w[1] >= draw.min_p), Add(), shared.ints));
                const double all = block_reduce((at < some ? (double)w[0] : 0.0) + (at + 1 < some ? (double)w[1] : 0.0),
                                                Add(), shared.doubles);
                const double drawn_at = draw.uniform * all;
                const int skipped = (at < some && sums[0] <= drawn_at) + (at + 1 < some && sums[1] <= drawn_at);
                const int token = max(min(block_reduce(skipped, Add(), shared.ints), some - 1), 0);
                if (token / 2 == (int)threadIdx.x)
                    drawn[blockIdx.x] = make_uint4(
                        (u32)candidates.id(token), __float_as_uint((f32)(candidates.logit(token) - highest - log(total))),
                        __float_as_uint((f32)log((double)(token % 2 ? w[1] : w[0]) / all)), 1);
                return;
            }
        }
    }
    if (has_top_k) {
        const int k = (int)draw.top_k;
        auto count_at = [&](u32 cut) {
            int count = 0;
            row.each([&](int, f32 l) { count += key(l) >= cut; });
            return block_reduce(count, Add(), shared.ints);
        };
        const u32 cut = largest_key(row.is_short(), [&](u32 cut) { return count_at(cut) >= k; });
        f32 lowest = highest;
        row.each([&](int, f32 l) { lowest = key(l) >= cut ? fminf(lowest, l) : lowest; });
        lowest = block_reduce(lowest, Smaller(), shared.floats);
        int above = 0;
        row.each([&](int, f32 l) { above += l > lowest; });
        above = block_reduce(above, Add(), shared.ints);
        kept = first_of_equal(row, kept, lowest, k - above, shared.ints);
    }
    if (has_top_p) {
        auto mass_at = [&](u32 cut) {
            f32 mass = 0.0f;
            row.each([&](int id, f32 l) { mass += kept.has(id, l) && key(l) >= cut ? weight(l) : 0.0f; });
            return block_reduce((double)mass, Add(), shared.doubles);
        };
        const double target = mass_at(0) * (double)draw.top_p;
        const u32 cut = largest_key(row.is_short(), [&](u32 cut) { return mass_at(cut) >= target; });
        f32 lowest = highest;
        row.each([&](int id, f32 l) { lowest = kept.has(id, l) && key(l) >= cut ? fminf(lowest, l) : lowest; });
        lowest = block_reduce(lowest, Smaller(), shared.floats);
        f32 above = 0.0f;
        row.each([&](int, f32 l) { above += l > lowest ? weight(l) : 0.0f; });
        const double missing = target - block_reduce((double)above, Add(), shared.doubles);
        const double some = ceil(missing / (double)weight(lowest));
        kept = first_of_equal(row, kept, lowest, (int)fmin(fmax(some, 1.0), (double)vocab), shared.ints);
    }
    auto share = [&](int id, f32 l) {
        const f32 w = weight(l);
        return kept.has(id, l) && w >= draw.min_p ? w : 0.0f;
    };
    if (is_filtered) {
        own = 0.0f;
        row.each([&](int id, f32 l) { own += share(id, l); });
    }
    double all;
    const double before = block_scan((double)own, shared.doubles, all);
    const double target = draw.uniform * all;
    if (threadIdx.x == 0) chosen = 0;
    __syncthreads();
    // The last thread that begins at the target or below, and has any weight.
    if (own > 0.0f && before <= target) atomicMax(&chosen, (int)threadIdx.x);
    __syncthreads();
    if (chosen != (int)threadIdx.x) return;
    double left = target - before;
    int id = vocab;
    f32 at = highest, w_at = 1.0f;
    bool done = false;
    row.each([&](int i, f32 l) {
        const f32 w = share(i, l);
        if (done || w <= 0.0f) return;
        id = i, at = l, w_at = w;
        left -= w;
        done = left < 0.0;
    });
    if (id == vocab) id = (int)(u32)first;
    drawn[blockIdx.x] = make_uint4((u32)id, __float_as_uint((f32)(at - highest - log(total))),
                                   __float_as_uint((f32)log((double)w_at / all)), 1);
}
