//! Qwen2 and Qwen2.5: biases on `q_proj`, `k_proj` and `v_proj`.

use crate::config::Biases;
use crate::family::{Family, even_share};

/// As in transformers' `Qwen2ForCausalLM`.
pub(crate) const FAMILY: Family = Family {
    architecture: "Qwen2ForCausalLM",
    model_type: "qwen2",
    qk_norm: false,
    default_head_dim: even_share,
    biases: |_| Biases { qkv: true, o: false, mlp: false },
};
