//! Gemma 4, dense: windows in five of six layers; in the others wider heads, whose keys are also the values in the largest
//! checkpoints; norms of queries, keys and values; scores without a scale, and a stored factor on the output of each layer. Of the
//! multimodal checkpoints, the text part is computed; the other tensors are saved unchanged.

use serde_json::Value;

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames, gemma2};
use crate::ModelSpec;
use crate::spec::{
    AttentionBiases, AttentionMask, AttentionSpec, NormSpec, NormWeight, Projections, QkNormSpec, RopeId, RotarySpec,
};

/// As in transformers' `Gemma4ForCausalLM`.
pub(super) const TEXT: Family =
    Family { architecture: "Gemma4ForCausalLM", model_type: "gemma4_text", section: None, names: gemma2::NAMES, spec };

/// As in transformers' `Gemma4ForConditionalGeneration`.
pub(super) const MULTIMODAL: Family = Family {
    architecture: "Gemma4ForConditionalGeneration",
    model_type: "gemma4",
    section: Some("text_config"),
    names: TensorNames {
        stored: TensorNames::LLAMA.stored,
        kept: &["model.vision_tower.", "model.embed_vision.", "model.audio_tower.", "model.embed_audio."],
        ..TensorNames::multimodal(gemma2::NAMES)
    },
    spec,
};

/// Width of the per-layer embeddings where the file does not name it.
const PER_LAYER_INPUT: usize = 256;

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults {
        vocab_size: Some(262_144),
        num_hidden_layers: Some(30),
        max_position_embeddings: 131_072,
        norm_weight: NormWeight::RoundedAfter,
        ..gemma2::defaults()
    };
    let mut dimensions = Dimensions::without_ropes(config, defaults);
    config.only("enable_moe_block", false);
    if config.get("use_bidirectional_attention") != Some(&Value::from("vision")) {
        config.only("use_bidirectional_attention", Value::Null);
    }
    config.require_rope();
    let layers = dimensions.num_hidden_layers;
    let mut sliding = config.sliding_layers(layers, |layer| !(layer + 1).is_multiple_of(6));
    if let Some(last) = sliding.last_mut() {
        *last = false;
    }
    let keys_are_values = config.flag("attention_k_eq_v", false);
    let [full_dim, full_kv_heads] = full_heads(config, &dimensions, &sliding, keys_are_values);
    dimensions.ropes = config.ropes_by_layer_type([full_dim, dimensions.head_dim], 1e6, "rope_local_base_freq", 1e4);

    let bias = config.flag("attention_bias", false);
    let norm = dimensions.norm();
    let attention = AttentionSpec {
        scale: 1.0,
        qk_norm: Some(QkNormSpec { norm, full_width: false, after_rope: false }),
        value_norm: Some(NormSpec { weight: NormWeight::None, ..norm }),
        biases: AttentionBiases { qkv: bias, o: bias },
        ..dimensions.attention()
    };
    let mut layer = gemma2::layer(&dimensions, attention);
    layer.output_scalar = true;
    let window = config.window(AttentionMask::Sliding(512));
    let mut embedding = gemma2::embedding(&dimensions);
    // 0 and null turn it off, and `size` accepts neither.
    embedding.per_layer_input = match config.get("hidden_size_per_layer_input") {
        Some(width) if width.as_u64() == Some(0) => None,
        Some(_) => Some(config.size("hidden_size_per_layer_input", None)),
        None if config.has("hidden_size_per_layer_input") => None,
        None => Some(PER_LAYER_INPUT),
    };
    let shared = config.get("num_kv_shared_layers").and_then(Value::as_u64).unwrap_or(0) as usize;
    let mut model = ModelSpec { embedding, ..dimensions.model_by_layer_type(&layer, &sliding, window) };
    model.head.softcap = config.optional_number("final_logit_softcapping", None);
    let first_shared = layers.saturating_sub(shared);
    for (index, layer) in model.layers.iter_mut().enumerate() {
        let Some(attention) = layer.attention_mut() else { continue };
        if !sliding[index] {
            (attention.head_dim, attention.kv_heads) = (full_dim, full_kv_heads);
            attention.rope = Some(RotarySpec { id: RopeId(0), interleaved: false });
            if keys_are_values {
                attention.projections = Projections::ValuesAreKeys;
            }
        }
        if index >= first_shared {
            let like = |&earlier: &usize| sliding[earlier] == sliding[index];
            let producer = (0..first_shared).rev().find(like).unwrap_or(0);
            attention.projections = Projections::SharedKeys { layer: producer };
        }
    }
    model
}

/// Channels and key/value heads of full layers. transformers writes them layer by layer, in `per_layer_config`.
fn full_heads(
    config: &mut ConfigReader<'_>,
    dimensions: &Dimensions,
    sliding: &[bool],
    keys_are_values: bool,
) -> [usize; 2] {
    let own = [dimensions.head_dim, dimensions.num_key_value_heads];
    let Some(by_layer) = config.get("per_layer_config") else {
        let head_dim = config.size("global_head_dim", Some(512));
        let kv_heads = config.size("num_global_key_value_heads", Some(own[1]));
        return [head_dim, if keys_are_values { kv_heads } else { own[1] }];
    };
    let of = |layer: usize| {
        let layer = by_layer.get(layer.to_string());
        let value = |key: &str, default: usize| {
            layer.and_then(|layer| layer.get(key)?.as_u64()).map_or(default, |value| value as usize)
        };
        [value("head_dim", own[0]), value("num_key_value_heads", own[1])]
    };
    let of_kind = |kind: bool| -> Vec<[usize; 2]> {
        (0..sliding.len()).filter(|&layer| sliding[layer] == kind).map(of).collect()
    };
    let (full, windowed) = (of_kind(false), of_kind(true));
    let heads = full.first().copied().unwrap_or(own);
    let divides = heads[1] > 0 && dimensions.num_attention_heads.is_multiple_of(heads[1]);
    if full.iter().any(|other| *other != heads) || windowed.into_iter().any(|other| other != own) || !divides {
        config.problem("per_layer_config has layers of one kind that differ in their heads".to_owned());
        return own;
    }
    heads
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ModelConfig;

    fn config(differs: &[(&str, Value)]) -> ModelConfig {
        let mut text = json!({
            "model_type": "gemma4_text", "hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 12,
            "num_attention_heads": 32, "num_key_value_heads": 16, "num_global_key_value_heads": 4,
            "attention_k_eq_v": true, "sliding_window": 1024, "hidden_size_per_layer_input": 0,
            "use_bidirectional_attention": "vision", "final_logit_softcapping": 30.0,
            "rope_parameters": {
                "full_attention": { "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25 },
                "sliding_attention": { "rope_type": "default", "rope_theta": 1e4 }
            }
        });
        for (key, value) in differs {
            text[key] = value.clone();
        }
        let json =
            json!({ "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "text_config": text });
        ModelConfig::from_json(&json).expect("valid")
    }

    #[test]
    fn every_sixth_layer_has_wide_heads_and_values_from_keys() {
        let config = config(&[]);
        assert_eq!(config.spec.unsupported(1 << 17), [""; 0]);
        let heads = |layer: usize| {
            let attention = config.spec.layers[layer].attention().expect("softmax attention");
            (attention.head_dim, attention.kv_heads, attention.mask, attention.projections)
        };
        assert_eq!(heads(4), (256, 16, AttentionMask::Sliding(1024), Projections::Separate));
        assert_eq!(heads(5), (512, 4, AttentionMask::Full, Projections::ValuesAreKeys));
        let turning = config.spec.ropes[0].inv_freq(1).iter().filter(|&&f| f > 0.0).count();
        assert_eq!((config.spec.ropes[0].rotary_dim(), turning), (512, 64));
        let names: Vec<String> = config.parameters().into_iter().map(|parameter| parameter.name).collect();
        assert!(names.contains(&"model.language_model.layers.5.layer_scalar".to_owned()), "{names:?}");
        assert!(!names.contains(&"model.language_model.layers.5.self_attn.v_proj.weight".to_owned()));
    }

    #[test]
    fn what_is_not_computed_is_named() {
        let small = [("hidden_size_per_layer_input", json!(256)), ("num_kv_shared_layers", json!(6))];
        assert_eq!(
            config(&small).spec.unsupported(4096),
            ["per-layer embeddings", "keys and values shared between layers"]
        );
        let experts = json!({ "architectures": ["Gemma4ForCausalLM"], "enable_moe_block": true });
        let error = ModelConfig::from_json(&experts).expect_err("experts").join("; ");
        assert!(error.contains("enable_moe_block is true; only false is supported"), "{error}");
        assert!(error.contains("rope_parameters is missing"), "{error}");
    }
}
