// The sigmoid gate on the result of attention whose logits lie behind each head's queries; kernels/src/ops/output_gate.
//
// A row of qg holds, for each head, `width` queries and `width` logits g. y = o ∘ σ(g); d_o = dy ∘ σ(g); the gradient to qg
// holds dq and dy ∘ o ∘ σ(g)·(1 − σ(g)).
//
// Layout: qg [tokens, heads · 2 · width], the others [tokens, heads · width] of T, row-major with row strides in elements, rows
// 16-byte aligned, width a multiple of 8.
//
// Launch: grid (ceil(tokens·heads·width / N / 256)), block (256), dynamic shared memory 0; N = 8 for 16-bit T, 4 for f32.
//   output_gate_queries(qg, q, i32 tokens, heads, width, ldqg, ldq)
//   output_gate_fwd(o, qg, y, i32 tokens, heads, width, ldo, ldqg, ldy): y may be o; with dy for o it makes d_o.
//   output_gate_join(dq, dy, o, qg, dqg, i32 tokens, heads, width, lddq, lddy, ldo, ldqg, lddqg): dqg may be qg.

static const int N = Vec<T>::N;

// 16-bit results hide what the approximate units lose.
DEVICE f32 sigmoid(f32 x) {
    if (sizeof(T) == 4) return 1.0f / (1.0f + expf(-x));
    return __fdividef(1.0f, 1.0f + __expf(-x));
}

// A thread's 16 bytes: its token, its column in [heads · width] and that of its queries in qg.
struct Piece {
    u32 token;
    int col, pair;
    bool in;
    DEVICE Piece(int tokens, int heads, int width) {
        const u32 i = blockIdx.x * 256 + threadIdx.x, pieces = heads * width / N;
        token = i / pieces;
        col = (int)(i % pieces) * N;
        pair = col / width * 2 * width + col % width;
        in = token < (u32)tokens;
    }
};

extern "C" __global__ void __launch_bounds__(256)
output_gate_queries(const T* qg, T* q, int tokens, int heads, int width, int ldqg, int ldq) {
    const Piece p(tokens, heads, width);
    if (!p.in) return;
    *reinterpret_cast<uint4*>(at(q, p.token, ldq, p.col)) = *reinterpret_cast<const uint4*>(at(qg, p.token, ldqg, p.pair));
}

extern "C" __global__ void __launch_bounds__(256)
output_gate_fwd(const T* o, const T* qg, T* y, int tokens, int heads, int width, int ldo, int ldqg, int ldy) {
    const Piece p(tokens, heads, width);
    if (!p.in) return;
    f32 v[N], g[N];
    load16<T>(at(o, p.token, ldo, p.col), v);
    load16<T>(at(qg, p.token, ldqg, p.pair + width), g);
#pragma unroll
    for (int e = 0; e < N; e++) v[e] *= sigmoid(g[e]);
    store16<T>(at(y, p.token, ldy, p.col), v);
}

extern "C" __global__ void __launch_bounds__(256)
output_gate_join(const T* dq, const T* dy, const T* o, const T* qg, T* dqg, int tokens, int heads, int width, int lddq, int lddy,
                 int ldo, int ldqg, int lddqg) {
    const Piece p(tokens, heads, width);
    if (!p.in) return;
    f32 d[N], v[N], g[N];
    const uint4 queries = *reinterpret_cast<const uint4*>(at(dq, p.token, lddq, p.col));
    load16<T>(at(dy, p.token, lddy, p.col), d);
    load16<T>(at(o, p.token, ldo, p.col), v);
    load16<T>(at(qg, p.token, ldqg, p.pair + width), g);
#pragma unroll
    for (int e = 0; e < N; e++) {
        const f32 s = sigmoid(g[e]);
        d[e] *= v[e] * s * (1.0f - s);
    }
    *reinterpret_cast<uint4*>(at(dqg, p.token, lddqg, p.pair)) = queries;
    store16<T>(at(dqg, p.token, lddqg, p.pair + width), d);
}
