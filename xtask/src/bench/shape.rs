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
}

impl Shape {
    /// Returns the `config.json` of the model with this name, without Llama's RoPE scaling, which costs nothing.
    pub(crate) fn config(self) -> Value {
        let (hidden, intermediate, layers, heads) = match self {
            Self::Qwen3_0_6b => (1024, 3072, 28, 16),
            Self::Qwen3_4b => (2560, 9728, 36, 32),
            Self::Llama3_1_8b => (4096, 14_336, 32, 32),
        };
        let mut config = json!({
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
        });
        if let Self::Llama3_1_8b = self {
            let differs = json!({
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "vocab_size": 128_256,
                "rms_norm_eps": 1e-5,
                "rope_theta": 5e5,
                "max_position_embeddings": 131_072,
                "tie_word_embeddings": false
            });
            if let (Value::Object(config), Value::Object(differs)) = (&mut config, differs) {
                config.extend(differs);
            }
        }
        config
    }
}
