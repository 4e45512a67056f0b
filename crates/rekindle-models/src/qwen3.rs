//! Qwen3: per-head norms on queries and keys, no biases unless the configuration asks for them.

use crate::config::Biases;
use crate::family::Family;

/// As in transformers' `Qwen3ForCausalLM`.
pub(crate) const FAMILY: Family = Family {
    architecture: "Qwen3ForCausalLM",
    model_type: "qwen3",
    qk_norm: true,
    default_head_dim: |_, _| 128,
    biases: |config| {
        let attention = config.flag("attention_bias", false);
        Biases { qkv: attention, o: attention, mlp: false }
    },
};
