//! Qwen3.5 and 3.6, dense: three of four layers are gated delta layers, the others have softmax attention with an output gate.
//! Of the multimodal checkpoints the text part is computed; the vision part and the layers for multi-token prediction are kept
//! as they are when such a model is saved.

use serde_json::Value;

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::{
    AttentionBiases, AttentionMask, AttentionSpec, GatedDeltaSpec, MixerSpec, NormWeight, OutputGate, QkNormSpec,
};

/// As in transformers' `Qwen3_5ForCausalLM`.
pub(super) const TEXT: Family = Family {
    architecture: "Qwen3_5ForCausalLM",
    model_type: "qwen3_5_text",
    section: None,
    names: TensorNames { kept: &["mtp."], ..TensorNames::LLAMA },
    spec,
};

/// As in transformers' `Qwen3_5ForConditionalGeneration`.
pub(super) const MULTIMODAL: Family = Family {
    architecture: "Qwen3_5ForConditionalGeneration",
    model_type: "qwen3_5",
    section: Some("text_config"),
    names: MULTIMODAL_NAMES,
    spec,
};

/// The names of the text part of multimodal checkpoints.
pub(super) const MULTIMODAL_NAMES: TensorNames = TensorNames {
    stored: TensorNames::LLAMA.stored,
    kept: &["model.visual.", "mtp."],
    ..TensorNames::multimodal(TensorNames::LLAMA)
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults {
        hidden_size: Some(4096),
        intermediate_size: Some(12_288),
        num_hidden_layers: Some(32),
        num_key_value_heads: Some(4),
        ..class_defaults()
    };
    hybrid(config, defaults)
}

/// Returns the defaults that the dense class and that of mixtures share.
pub(super) fn class_defaults() -> ClassDefaults {
    ClassDefaults {
        vocab_size: Some(248_320),
        num_attention_heads: Some(16),
        head_dim: Some(256),
        max_position_embeddings: 32_768,
        norm_weight: NormWeight::OnePlus,
        partial_rotary_factor: Some(0.25),
        ..ClassDefaults::default()
    }
}

/// The model with gated feed-forward halves in all layers.
pub(super) fn hybrid(config: &mut ConfigReader<'_>, defaults: ClassDefaults) -> ModelSpec {
    let dimensions = Dimensions::read(config, defaults);
    let bias = config.flag("attention_bias", false);
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: bias, o: bias },
        qk_norm: Some(QkNormSpec { norm: dimensions.norm(), full_width: false, after_rope: false }),
        output_gate: Some(OutputGate::InQueries),
        ..dimensions.attention()
    };
    let delta = delta(config, dimensions.rms_norm_eps);
    let layers = dimensions.num_hidden_layers;
    let linear = linear_layers(config, layers);
    let layer = dimensions.layer(attention, dimensions.gated());
    let mut model = dimensions.model(&layer, vec![AttentionMask::Full; layers]);
    for (layer, _) in model.layers.iter_mut().zip(linear).filter(|(_, linear)| *linear) {
        layer.mixer = MixerSpec::GatedDelta(delta);
    }
    model
}

/// The layers of linear attention.
fn delta(config: &mut ConfigReader<'_>, eps: f64) -> GatedDeltaSpec {
    let key_heads = config.size("linear_num_key_heads", Some(16));
    let value_heads = config.size("linear_num_value_heads", Some(32));
    if !value_heads.is_multiple_of(key_heads) {
        config.problem(format!(
            "linear_num_value_heads {value_heads} is no multiple of linear_num_key_heads {key_heads}"
        ));
    }
    GatedDeltaSpec {
        key_heads,
        value_heads,
        key_dim: config.size("linear_key_head_dim", Some(128)),
        value_dim: config.size("linear_value_head_dim", Some(128)),
        conv_width: config.size("linear_conv_kernel_dim", Some(4)),
        eps,
    }
}

/// Returns for each layer if it has linear attention: from `layer_types`, or all but every `full_attention_interval`th.
fn linear_layers(config: &mut ConfigReader<'_>, layers: usize) -> Vec<bool> {
    let Some(value) = config.get("layer_types") else {
        let interval = config.size("full_attention_interval", Some(4));
        return (1..=layers).map(|number| !number.is_multiple_of(interval)).collect();
    };
    let entry = |value: &Value| match value.as_str() {
        Some("linear_attention") => Some(true),
        Some("full_attention") => Some(false),
        _ => None,
    };
    let entries = value.as_array().and_then(|list| list.iter().map(entry).collect::<Option<Vec<bool>>>());
    match entries {
        Some(entries) if entries.len() == layers => entries,
        _ => {
            let expected = format!("a list of {layers} entries of \"linear_attention\" or \"full_attention\"");
            config.wrong("layer_types", value, &expected, vec![false; layers])
        }
    }
}
