//! Roughly what a run takes, from shapes alone: enough to choose between settings, not to promise anything. Of Qwen3-4B's
//! runs on an H200 in the README it is off by 11 % (everything kept), 2 % (recomputed) and 16 % (QLoRA).

use rekindle_lora::GradientCheckpointing;
use rekindle_models::ModelConfig;

/// A run with a LoRA adapter on all linears.
#[derive(Clone, Copy)]
pub(super) struct Shape<'a> {
    pub(super) config: &'a ModelConfig,
    /// In 16 bits on an NVIDIA GPU, in 32 elsewhere.
    pub(super) on_cuda: bool,
    /// Whether the linears are in 4-bit codes.
    pub(super) coded: bool,
    /// What becomes of activations.
    pub(super) checkpointing: GradientCheckpointing,
    pub(super) r: usize,
    /// Of one forward and backward pass.
    pub(super) tokens: usize,
}

/// Bits of a weight in NF4 with double quantization, scales included.
const CODE_BITS: f64 = 4.127;
/// The context and the kernels' code on a GPU.
const OUTSIDE: u64 = rekindle_kernels::runtime::CUDA_CONTEXT_BYTES as u64;
/// Logits of a chunk of rows on a GPU, and elsewhere.
const LOGITS: [u64; 2] = [320 << 20, 64 << 20];

/// Weights, adapter with gradients and both moments, what blocks keep for the backward, a block's work, and logits.
pub(super) fn estimated_bytes(shape: &Shape<'_>) -> u64 {
    let Shape { config, on_cuda, coded, checkpointing, r, tokens } = *shape;
    let element = if on_cuda { 2.0 } else { 4.0 };
    let (mut weights, mut adapter) = (0.0, 0.0);
    for parameter in config.parameters() {
        let (numel, linear) = (parameter.numel() as f64, parameter.role.is_linear());
        weights += numel * if coded && linear { CODE_BITS / 8.0 } else { element };
        if linear {
            adapter += (r * parameter.shape.iter().sum::<usize>()) as f64;
        }
    }
    let (hidden, inner) = (config.hidden_size(), config.intermediate_size());
    let (q, kv) = (config.num_attention_heads() * config.head_dim(), config.num_key_value_heads() * config.head_dim());
    let norms = if config.spec.layers[0].attention.qk_norm.is_some() { 2 } else { 1 };
    let block = 2 * hidden + norms * (q + kv) + kv + q + 2 * inner + 4 * r;
    let kept = if checkpointing.recomputes() {
        config.num_hidden_layers() * hidden + block
    } else {
        config.num_hidden_layers() * block
    };
    let work = 3 * inner + 4 * hidden;
    let activations = (tokens * (kept + work)) as f64 * element;
    (weights + 16.0 * adapter + activations) as u64 + if on_cuda { LOGITS[0] + OUTSIDE } else { LOGITS[1] }
}

#[cfg(test)]
pub(super) mod tests {
    use serde_json::json;

    use super::*;

    pub(crate) fn qwen3_4b() -> ModelConfig {
        let config = json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_act": "silu", "vocab_size": 151_936,
            "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40_960, "rms_norm_eps": 1e-6,
            "rope_theta": 1_000_000.0, "tie_word_embeddings": true, "attention_bias": false
        });
        ModelConfig::from_json(&config).unwrap()
    }

    pub(crate) fn shape(config: &ModelConfig, tokens: usize) -> Shape<'_> {
        Shape { config, on_cuda: true, coded: false, checkpointing: GradientCheckpointing::Off, r: 16, tokens }
    }

    /// The README's figures of an H200, in GiB, which the driver counts.
    #[test]
    fn near_what_was_measured() {
        let config = qwen3_4b();
        let kept = shape(&config, 4 * 2048);
        let recomputed = Shape { checkpointing: GradientCheckpointing::Block, ..kept };
        for (shape, measured) in [(kept, 35.2), (recomputed, 11.7), (Shape { coded: true, ..recomputed }, 5.5)] {
            let gib = estimated_bytes(&shape) as f64 / f64::from(1 << 30);
            assert!((gib / measured - 1.0).abs() < 0.2, "{gib} for {measured}");
        }
    }
}
