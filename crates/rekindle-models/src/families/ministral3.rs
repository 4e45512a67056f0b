//! Ministral 3: Mistral with YaRN and queries that grow with the position. Multimodal checkpoints of Ministral 3 and of
//! Mistral Small 3 are computed without their vision part, whose tensors are saved unchanged.

use serde_json::Value;

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames, mistral};
use crate::ModelSpec;
use crate::spec::{AttentionMask, AttentionSpec, QueryScale};

/// As in transformers' `Ministral3ForCausalLM`.
pub(super) const TEXT: Family = Family {
    architecture: "Ministral3ForCausalLM",
    model_type: "ministral3",
    section: None,
    names: TensorNames::LLAMA,
    spec,
};

/// As in transformers' `Mistral3ForConditionalGeneration`, whose text part is a Mistral or a Ministral 3.
pub(super) const MULTIMODAL: Family = Family {
    architecture: "Mistral3ForConditionalGeneration",
    model_type: "mistral3",
    section: Some("text_config"),
    names: TensorNames::multimodal(TensorNames::LLAMA),
    spec: |config| match config.get("model_type").and_then(Value::as_str) {
        Some("mistral") => mistral::spec(config),
        _ => spec(config),
    },
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults {
        head_dim: Some(128),
        num_key_value_heads: Some(8),
        max_position_embeddings: 262_144,
        rms_norm_eps: 1e-5,
        ..ClassDefaults::default()
    };
    let dimensions = Dimensions::read(config, defaults);
    let growth = config.query_growth();
    let query_scale = growth.map(|growth| QueryScale { beta: growth.beta, window: growth.window, offset: 0 });
    let attention = AttentionSpec { query_scale, ..dimensions.attention() };
    let layer = dimensions.layer(attention, dimensions.gated());
    let masks = vec![config.window(AttentionMask::Full); dimensions.num_hidden_layers];
    dimensions.model(&layer, masks)
}
