//! Hunyuan 0.5B to 7B: norms of each head after the rotation, whose base is raised by a fixed `alpha`.

use rekindle_rope::RopeConfig;
use serde_json::{Value, json};

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::{AttentionBiases, AttentionMask, AttentionSpec, QkNormSpec};

/// As in transformers' `HunYuanDenseV1ForCausalLM`.
pub(super) const FAMILY: Family = Family {
    architecture: "HunYuanDenseV1ForCausalLM",
    model_type: "hunyuan_v1_dense",
    section: None,
    names: TensorNames {
        query_norm: "self_attn.query_layernorm",
        key_norm: "self_attn.key_layernorm",
        ..TensorNames::LLAMA
    },
    spec,
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults { rms_norm_eps: 1e-5, ..ClassDefaults::default() };
    let mut dimensions = Dimensions::without_ropes(config, defaults);
    dimensions.ropes = match scaled(config, dimensions.head_dim) {
        Some(rope) => vec![rope],
        None => config.ropes(dimensions.head_dim, None, None),
    };
    let bias = config.flag("attention_bias", false);
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: bias, o: bias },
        qk_norm: Some(QkNormSpec { norm: dimensions.norm(), full_width: false, after_rope: true }),
        ..dimensions.attention()
    };
    let layer = dimensions.layer(attention, dimensions.gated());
    let masks = vec![AttentionMask::Full; dimensions.num_hidden_layers];
    dimensions.model(&layer, masks)
}

/// The type "dynamic" with an `alpha`, which does not depend on lengths: theta becomes theta · alpha^(d / (d − 2)).
fn scaled(config: &mut ConfigReader<'_>, head_dim: usize) -> Option<RopeConfig> {
    let parameters = config.get("rope_parameters").or_else(|| config.get("rope_scaling"))?;
    let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
    let alpha = parameters.get("alpha").and_then(Value::as_f64).filter(|alpha| *alpha > 0.0)?;
    if kind != Some("dynamic") || head_dim <= 2 {
        return None;
    }
    config.fix_context();
    let inner = parameters.get("rope_theta").and_then(Value::as_f64);
    let theta = inner.unwrap_or_else(|| config.number("rope_theta", 1e4));
    let d = head_dim as f64;
    let json = json!({ "rope_theta": theta * alpha.powf(d / (d - 2.0)) });
    RopeConfig::from_config(&json, head_dim).map_err(|error| config.problem(error.to_string())).ok()
}
