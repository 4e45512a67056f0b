// The gradient of attention's sinks: d_sink = -Σ_i exp(sink - lse[i])·delta[i] over all queries of a head, with
// delta = rowsum(d_o ∘ o). Through the softmax, whose denominator the sink is a term of (gpt-oss); it has no value, so its
// d_o·v is 0. kernels/src/ops/attention.
//
// Layout: lse, delta f32 [heads, tokens]; sinks [heads] of T; d_sinks f32 [heads]. Sums in f32, in a fixed order.
//
// Source: prelude.cuh, this file. Defines: T.
// Launch: attention_bwd_sinks(lse, delta, sinks, d_sinks, i32 tokens), grid (heads), block (256)
//
// Floor: 8·heads·tokens bytes; 4 MB for 64 heads and 8,192 tokens, 1 µs.
// Tests: in full fine-tuning of models with sinks, and against f64 with the gradients of attention_bwd_dq.cu.

extern "C" __global__ void __launch_bounds__(256)
attention_bwd_sinks(const f32* __restrict__ lse, const f32* __restrict__ delta, const T* __restrict__ sinks,
                    f32* __restrict__ d_sinks, int tokens) {
    __shared__ f32 sums[8];
    const long long first = (long long)blockIdx.x * tokens;
    const f32 sink = to_f32(sinks[blockIdx.x]);
    f32 sum = 0.0f;
    for (int i = threadIdx.x; i < tokens; i += 256) sum = fmaf(expf(sink - lse[first + i]), delta[first + i], sum);
    sum = block_sum(sum, sums);
    if (threadIdx.x == 0) d_sinks[blockIdx.x] = -sum;
}
