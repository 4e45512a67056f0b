// How attention's scores come from q·k, for the kernels of kernels/src/ops/attention. The loader puts this text between
// prelude.cuh and them. What a file is compiled with decides; without any of these the code is that of plain scores:
//   WINDOW   a query at position i of its document sees the keys i - window < j <= i
//   SOFTCAP  s = softcap·tanh(scale·q·k / softcap) instead of scale·q·k
//   SINKS    a head's logit is one more term of the softmax's denominator, without a value
// Backward kernels have no use for SINKS: the saved lse has them.

#ifdef WINDOW
static const bool HAS_WINDOW = true;
#else
static const bool HAS_WINDOW = false;
#endif
#ifdef SOFTCAP
static const bool HAS_SOFTCAP = true;
#else
static const bool HAS_SOFTCAP = false;
#endif
#ifdef SINKS
static const bool HAS_SINKS = true;
#else
static const bool HAS_SINKS = false;
#endif

static const f32 LOG2E = 1.4426950408889634f;

// 2^x; 2^-inf is 0.
DEVICE f32 exp2_approx(f32 x) {
    f32 y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE f32 log2_approx(f32 x) {
    f32 y;
    asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// tanh with an error that is small beside one rounding to E. The instruction's is 2^-11 of the value.
template <typename E> DEVICE f32 tanh_for(f32 x);
template <> DEVICE f32 tanh_for<f32>(f32 x) { return tanhf(x); }
template <> DEVICE f32 tanh_for<f16>(f32 x) {
    return 1.0f - __fdividef(2.0f, exp2_approx(fminf(x, 40.0f) * (2.0f * LOG2E)) + 1.0f);
}
template <> DEVICE f32 tanh_for<bf16>(f32 x) {
    f32 y;
    asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A score is factor·shaped(q·k).
struct ScoreScale {
    f32 factor, inner;
    DEVICE ScoreScale(f32 scale, f32 softcap) : factor(HAS_SOFTCAP ? softcap : scale), inner(HAS_SOFTCAP ? scale / softcap : 1.0f) {}
    DEVICE f32 shaped(f32 x) const { return HAS_SOFTCAP ? tanh_for<T>(x * inner) : x; }
    // The derivative of a score by scale·q·k, from shaped(q·k).
    DEVICE f32 slope(f32 shaped) const { return HAS_SOFTCAP ? fmaf(-shaped, shaped, 1.0f) : 1.0f; }
    // The same from a probability and its row's lse, in powers of two; for kernels without registers for both.
    DEVICE f32 slope_at(f32 p, f32 lse_log2) const {
        return p > 0.0f ? slope((log2_approx(p) + lse_log2) * __fdividef(1.0f, factor * LOG2E)) : 0.0f;
    }
};

// The first key that the query at `position` sees.
DEVICE int first_key(int position, int window) { return HAS_WINDOW ? max(0, position + 1 - window) : 0; }

// The end of a softmax: what its sums are multiplied by, and the logarithm of its denominator. `top` is the score that the
// exponentials are relative to, `total` their sum.
struct SoftmaxEnd {
    f32 inverse, lse;
    DEVICE SoftmaxEnd(f32 top, f32 total, const T* sinks, int head) {
        f32 shrink = 1.0f;
        if (HAS_SINKS) {
            const f32 sink = to_f32(sinks[head]), highest = fmaxf(top, sink);
            shrink = exp2f((top - highest) * LOG2E);
            total = fmaf(total, shrink, exp2f((sink - highest) * LOG2E));
            top = highest;
        }
        inverse = shrink / total;
        lse = top + (sizeof(T) == 4 ? logf(total) : __logf(total));
    }
};
