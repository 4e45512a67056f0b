//! SmolLM3: every fourth layer has no rotary positions (NoPE).

use serde_json::Value;

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::spec::{AttentionBiases, AttentionSpec, GatedSpec};
use crate::{LayerSpec, ModelSpec};

/// As in transformers' `SmolLM3ForCausalLM`.
pub(super) const FAMILY: Family = Family {
    architecture: "SmolLM3ForCausalLM",
    model_type: "smollm3",
    section: None,
    names: TensorNames::LLAMA,
    spec,
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(
        config,
        ClassDefaults {
            num_key_value_heads: Some(4),
            tie_word_embeddings: true,
            rope_theta: Some(2e6),
            ..ClassDefaults::default()
        },
    );
    let bias = config.flag("attention_bias", false);
    let attention = AttentionSpec { biases: AttentionBiases { qkv: bias, o: bias }, ..dimensions.attention() };
    let gated = GatedSpec { bias: config.flag("mlp_bias", false), ..dimensions.gated() };
    let layer = dimensions.layer(attention, gated);
    let rotated = rotated_layers(config, dimensions.num_hidden_layers);
    let masks = config.masks(dimensions.num_hidden_layers);
    let mut model = dimensions.model(&layer, masks);
    for (attention, rotated) in model.layers.iter_mut().filter_map(LayerSpec::attention_mut).zip(rotated) {
        attention.rope = attention.rope.filter(|_| rotated);
    }
    model
}

/// Returns for each layer if it has rotary positions: 1 in `no_rope_layers`, or all but every `no_rope_layer_interval`th.
fn rotated_layers(config: &mut ConfigReader<'_>, layers: usize) -> Vec<bool> {
    let Some(value) = config.get("no_rope_layers") else {
        let interval = config.size("no_rope_layer_interval", Some(4));
        return (1..=layers).map(|number| !number.is_multiple_of(interval)).collect();
    };
    let entry = |value: &Value| match value.as_u64() {
        Some(0) => Some(false),
        Some(1) => Some(true),
        _ => None,
    };
    let entries = value.as_array().and_then(|list| list.iter().map(entry).collect::<Option<Vec<bool>>>());
    match entries {
        Some(entries) if entries.len() == layers => entries,
        _ => {
            config.wrong("no_rope_layers", value, &format!("a list of {layers} entries of 0 or 1"), vec![true; layers])
        }
    }
}
