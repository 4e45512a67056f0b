// What the gated activations compute for one element; the formulas are in gated_activation.cu.

const int N = Vec<T>::N;

enum Activation { SILU, GELU_TANH, CLAMPED_SWIGLU };

// 16-bit results hide what the approximate units lose (2^-22); f32 takes the exact functions.
DEVICE f32 sigmoid(f32 x) {
    if (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// g as it enters the product, σ(z(g)), 1 − σ(z(g)), and g·z'(g).
struct Gate { f32 g, s, rest, along; };
// σ(z), and 1 − σ(z) without cancellation.
DEVICE Gate logistic(f32 g, f32 z, f32 along) {
    const f32 x = fminf(-z, 80.0f), e = sizeof(T) == 4 ? expf(x) : __expf(x);
    const f32 s = sizeof(T) == 4 ? 1.0f / (1.0f + e) : __fdividef(1.0f, 1.0f + e);
    return {g, s, e * s, along};
}
DEVICE Gate gated(f32 g, f32 alpha, f32 limit) {
    if (ACTIVATION == GELU_TANH) {
        // σ is 0 or 1 in f32 beyond the bound, and the cube of larger gates could overflow.
        const f32 b = fminf(fmaxf(g, -16.0f), 16.0f), square = b * b;
        const f32 slope = 1.5957691f * b;
        return logistic(g, slope * (1.0f + 0.044715f * square), slope * (1.0f + 0.134145f * square));
    }
    if (ACTIVATION == CLAMPED_SWIGLU) {
        g = fminf(g, limit);
        return logistic(g, alpha * g, alpha * g);
    }
    const f32 s = sigmoid(g);
    return {g, s, 1.0f - s, g};
}
DEVICE f32 clamped_up(f32 u, f32 limit) {
    return ACTIVATION == CLAMPED_SWIGLU ? fminf(fmaxf(u, -limit), limit) + 1.0f : u;
}

// The gradients to gate and up, and the result again.
struct GateGrads { f32 gate, up, act; };
DEVICE GateGrads gate_grads(f32 d, f32 gate, f32 up, f32 alpha, f32 limit) {
    const Gate v = gated(gate, alpha, limit);
    const f32 product = v.g * v.s, w = clamped_up(up, limit);
    GateGrads out = {d * w * v.s * (1.0f + v.along * v.rest), d * product, product * w};
    if (ACTIVATION == CLAMPED_SWIGLU) {
        if (gate > limit) out.gate = 0.0f;
        if (fabsf(up) > limit) out.up = 0.0f;
    }
    return out;
}
