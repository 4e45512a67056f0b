//! The shapes of models that are measured with random weights.

use clap::ValueEnum;
use serde_json::{Value, json};

/// A model shape.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Shape {
    #[value(name = "qwen3-0.6b")]
    Qwen3_0_6b,
    #[value(name = "qwen3-4b")]
    Qwen3_4b,
    #[value(name = "llama-3.1-8b")]
    Llama3_1_8b,
    #[value(name = "gemma-3-4b")]
    Gemma3_4b,
    /// 12 of the 48 layers of Qwen3-30B-A3B.
    #[value(name = "qwen3-30b-a3b-12")]
    Qwen3_30bA3b12,
    /// All layers of Qwen3-30B-A3B.
    #[value(name = "qwen3-30b-a3b")]
    Qwen3_30bA3b,
    /// Three of four layers are gated delta layers.
    #[value(name = "qwen3.5-4b")]
    Qwen3_5_4b,
    /// With experts in MXFP4.
    #[value(name = "gpt-oss-20b")]
    GptOss20b,
}

impl Shape {
    /// Returns the `config.json` of the model with this name, without Llama's RoPE scaling, which costs nothing.
    pub(crate) fn config(self) -> Value {
        match self {
            Self::Qwen3_0_6b => qwen3(1024, 3072, 28, 16),
            Self::Qwen3_4b => qwen3(2560, 9728, 36, 32),
            Self::Llama3_1_8b => with(
                qwen3(4096, 14_336, 32, 32),
                json!({
                    "architectures": ["LlamaForCausalLM"],
                    "model_type": "llama",
                    "vocab_size": 128_256,
                    "rms_norm_eps": 1e-5,
                    "rope_theta": 5e5,
                    "max_position_embeddings": 131_072,
                    "tie_word_embeddings": false
                }),
            ),
            Self::Gemma3_4b => with(
                qwen3(2560, 10_240, 34, 8),
                json!({
                    "architectures": ["Gemma3ForCausalLM"],
                    "model_type": "gemma3_text",
                    "num_key_value_heads": 4,
                    "head_dim": 256,
                    "vocab_size": 262_208,
                    "max_position_embeddings": 131_072,
                    "hidden_activation": "gelu_pytorch_tanh",
                    "query_pre_attn_scalar": 256,
                    "sliding_window": 1024,
                    "sliding_window_pattern": 6,
                    "rope_local_base_freq": 1e4,
                    "rope_scaling": {"rope_type": "linear", "factor": 8.0}
                }),
            ),
            Self::Qwen3_30bA3b12 => qwen3_moe(12),
            Self::Qwen3_30bA3b => qwen3_moe(48),
            Self::Qwen3_5_4b => with(
                qwen3(2560, 9216, 32, 16),
                json!({
                    "architectures": ["Qwen3_5ForCausalLM"],
                    "model_type": "qwen3_5_text",
                    "num_key_value_heads": 4,
                    "head_dim": 256,
                    "vocab_size": 248_320,
                    "linear_num_key_heads": 16,
                    "linear_num_value_heads": 32,
                    "linear_key_head_dim": 128,
                    "linear_value_head_dim": 128,
                    "linear_conv_kernel_dim": 4,
                    "full_attention_interval": 4
                }),
            ),
            Self::GptOss20b => with(
                qwen3(2880, 2880, 24, 64),
                json!({
                    "architectures": ["GptOssForCausalLM"],
                    "model_type": "gpt_oss",
                    "head_dim": 64,
                    "attention_bias": true,
                    "vocab_size": 201_088,
                    "rms_norm_eps": 1e-5,
                    "rope_theta": 1.5e5,
                    "max_position_embeddings": 131_072,
                    "rope_scaling": {
                        "rope_type": "yarn",
                        "factor": 32.0,
                        "beta_fast": 32.0,
                        "beta_slow": 1.0,
                        "original_max_position_embeddings": 4096,
                        "truncate": false
                    },
                    "sliding_window": 128,
                    "num_local_experts": 32,
                    "num_experts_per_tok": 4,
                    "swiglu_limit": 7.0,
                    "tie_word_embeddings": false,
                    "quantization_config": {"quant_method": "mxfp4"}
                }),
            ),
        }
    }
}

fn qwen3(hidden: usize, intermediate: usize, layers: usize, heads: usize) -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "torch_dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": true,
        "hidden_act": "silu"
    })
}

fn qwen3_moe(layers: usize) -> Value {
    with(
        qwen3(2048, 6144, layers, 32),
        json!({
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "num_key_value_heads": 4,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": true,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "tie_word_embeddings": false
        }),
    )
}

/// Returns `config` with the keys of `differs` replaced or added.
fn with(mut config: Value, differs: Value) -> Value {
    if let (Value::Object(config), Value::Object(differs)) = (&mut config, differs) {
        config.extend(differs);
    }
    config
}
