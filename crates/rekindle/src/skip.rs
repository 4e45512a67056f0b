//! The check of `skip_modules` against the modules of a model.

use rekindle_lora::BLOCK_LINEARS;
use rekindle_models::{ModelConfig, ParameterSpec};
use rekindle_quant::QuantFormat;
use rekindle_quant::bnb::QuantizationConfig;

use crate::Error;

/// Refuses entries that match no module of the model, whose intended modules would be quantized.
pub(crate) fn check(skip_modules: &[String], config: &ModelConfig) -> Result<(), Error> {
    let parameters = config.parameters();
    let modules = || parameters.iter().map(ParameterSpec::module).chain([HEAD]);
    let idle = |entry: &&String| {
        let alone = QuantizationConfig::new(QuantFormat::Int8, rekindle_hub::Dtype::F32, Some(vec![(*entry).clone()]));
        !modules().any(|module| alone.skips(module))
    };
    let idle: Vec<String> = skip_modules.iter().filter(idle).map(|entry| format!("{entry:?}")).collect();
    if idle.is_empty() {
        return Ok(());
    }
    Err(Error::Argument(format!(
        "skip_modules {} matches no module of this model; name linears ({}, {HEAD}) or a path from the start, such as \
         \"model.layers.0.mlp\"",
        idle.join(", "),
        BLOCK_LINEARS.join(", "),
    )))
}

/// The head, which tied models do not have and lists name nevertheless.
const HEAD: &str = "lm_head";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_must_match_something() {
        let json = serde_json::json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 12, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
            "vocab_size": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 8,
            "tie_word_embeddings": true, "hidden_act": "silu"
        });
        let config = ModelConfig::from_json(&json).unwrap();
        let check = |entries: &[&str]| check(&entries.iter().map(ToString::to_string).collect::<Vec<_>>(), &config);
        check(&[]).unwrap();
        check(&["lm_head", "embed_tokens", "down_proj", "model.layers.11", r"model\.layers\.\d+\.mlp"]).unwrap();
        let error = check(&["q_porj", "v_proj", "model.layers.12", "mlp"]).unwrap_err().to_string();
        assert!(
            error.starts_with("skip_modules \"q_porj\", \"model.layers.12\", \"mlp\" matches no module"),
            "{error}"
        );
        assert!(error.contains("q_proj") && error.contains("lm_head"), "{error}");
    }
}
