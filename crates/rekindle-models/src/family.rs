//! Which family a `config.json` belongs to, and what a family is.

use serde_json::Value;

use crate::config::{Biases, Reader};
use crate::{llama, qwen2, qwen3};

/// What tells one family from another.
pub(crate) struct Family {
    /// The entry of `architectures`.
    pub(crate) architecture: &'static str,
    /// The value of `model_type`.
    pub(crate) model_type: &'static str,
    /// Whether queries and keys are normalized head by head.
    pub(crate) qk_norm: bool,
    /// `head_dim` where `config.json` has none, from `hidden_size` and `num_attention_heads`.
    pub(crate) default_head_dim: fn(usize, usize) -> usize,
    /// Which linears carry a bias.
    pub(crate) biases: fn(&mut Reader<'_>) -> Biases,
}

const FAMILIES: [&Family; 3] = [&qwen3::FAMILY, &qwen2::FAMILY, &llama::FAMILY];

/// The family named by `architectures`, or by `model_type` where that is missing.
pub(crate) fn of(json: &Value) -> Result<&'static Family, String> {
    let named = json.get("architectures").and_then(|v| v.get(0)).and_then(Value::as_str);
    let model_type = json.get("model_type").and_then(Value::as_str);
    let found = match named {
        Some(name) => FAMILIES.into_iter().find(|f| f.architecture == name),
        None => FAMILIES.into_iter().find(|f| Some(f.model_type) == model_type),
    };
    found.ok_or_else(|| {
        let known: Vec<&str> = FAMILIES.iter().map(|f| f.architecture).collect();
        match named.or(model_type) {
            Some(name) => format!("architecture \"{name}\" is not supported; supported: {}", known.join(", ")),
            None => format!("architectures is missing; supported: {}", known.join(", ")),
        }
    })
}

/// `hidden_size / num_attention_heads`.
pub(crate) fn even_share(hidden_size: usize, heads: usize) -> usize {
    hidden_size / heads.max(1)
}
