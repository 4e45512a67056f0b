//! Roughly what a run takes, from shapes alone: enough to choose between settings, not to promise anything.

use rekindle_lora::BLOCK_LINEARS;
use rekindle_models::ModelConfig;

/// A run with a LoRA adapter on all linears.
pub(super) struct Shape<'a> {
    pub(super) config: &'a ModelConfig,
    /// In 16 bits on an NVIDIA GPU, in 32 elsewhere.
    pub(super) on_cuda: bool,
    /// Whether the linears are in 4-bit codes.
    pub(super) coded: bool,
    /// Whether blocks run again in the backward.
    pub(super) recomputes: bool,
    pub(super) r: usize,
    /// Of one forward and backward pass.
    pub(super) tokens: usize,
}

/// Bits of a weight in NF4 with double quantization, scales included.
const CODE_BITS: f64 = 4.127;
/// The context and the kernels' code on a GPU.
const OUTSIDE: u64 = 512 << 20;
/// Logits of a chunk of rows on a GPU, and elsewhere.
const LOGITS: [u64; 2] = [320 << 20, 64 << 20];

/// Weights, adapter with gradients and both moments, what blocks keep for the backward, a block's work, and logits.
pub(super) fn estimated_bytes(shape: &Shape<'_>) -> u64 {
    let Shape { config, on_cuda, coded, recomputes, r, tokens } = *shape;
    let element = if on_cuda { 2.0 } else { 4.0 };
    let is_linear = |name: &str| {
        let module = name.strip_suffix(".weight").and_then(|name| name.rsplit('.').next());
        module.is_some_and(|module| BLOCK_LINEARS.contains(&module))
    };
    let (mut weights, mut adapter) = (0.0, 0.0);
    for (name, dims) in config.tensors() {
        let numel = dims.iter().product::<usize>() as f64;
        let linear = is_linear(&name);
        weights += numel * if coded && linear { CODE_BITS / 8.0 } else { element };
        if linear {
            adapter += (r * dims.iter().sum::<usize>()) as f64;
        }
    }
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (q, kv) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let norms = if config.qk_norm { 2 } else { 1 };
    let block = 2 * hidden + norms * (q + kv) + kv + q + 2 * inner + 4 * r;
    let kept = if recomputes { config.num_hidden_layers * hidden + block } else { config.num_hidden_layers * block };
    let work = 3 * inner + 4 * hidden;
    let activations = (tokens * (kept + work)) as f64 * element;
    (weights + 16.0 * adapter + activations) as u64 + if on_cuda { LOGITS[0] + OUTSIDE } else { LOGITS[1] }
}
