//! Llama 2 and 3.x: biases only where the configuration asks for them.

use crate::config::Biases;
use crate::family::{Family, even_share};

/// As in transformers' `LlamaForCausalLM`.
pub(crate) const FAMILY: Family = Family {
    architecture: "LlamaForCausalLM",
    model_type: "llama",
    qk_norm: false,
    default_head_dim: even_share,
    biases: |config| {
        let attention = config.flag("attention_bias", false);
        Biases { qkv: attention, o: attention, mlp: config.flag("mlp_bias", false) }
    },
};
