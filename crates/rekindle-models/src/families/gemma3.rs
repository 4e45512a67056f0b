//! Gemma 3: Gemma 2 without soft caps, with query and key norms, a window in five of six layers, and a rotary embedding for
//! each kind of layer. Of the multimodal checkpoints (4B and larger) the text part is computed; the vision part is kept as
//! it is when such a model is saved.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames, gemma2};
use crate::ModelSpec;
use crate::spec::{AttentionMask, AttentionSpec, QkNormSpec};

/// As in transformers' `Gemma3ForCausalLM`.
pub(super) const TEXT: Family =
    Family { architecture: "Gemma3ForCausalLM", model_type: "gemma3_text", section: None, names: gemma2::NAMES, spec };

/// As in transformers' `Gemma3ForConditionalGeneration`, which stores the text part under the names of older versions.
pub(super) const MULTIMODAL: Family = Family {
    architecture: "Gemma3ForConditionalGeneration",
    model_type: "gemma3",
    section: Some("text_config"),
    names: TensorNames::multimodal(gemma2::NAMES),
    spec,
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults { vocab_size: Some(262_208), max_position_embeddings: 131_072, ..gemma2::defaults() };
    let mut dimensions = Dimensions::without_ropes(config, defaults);
    dimensions.ropes = config.ropes_by_layer_type([dimensions.head_dim; 2], 1e6, "rope_local_base_freq", 1e4);
    // transformers' modeling code never applies it.
    config.only("attn_logit_softcapping", serde_json::Value::Null);
    let attention = AttentionSpec {
        qk_norm: Some(QkNormSpec { norm: dimensions.norm(), full_width: false, after_rope: false }),
        ..gemma2::attention(config, &dimensions)
    };
    let layer = gemma2::layer(&dimensions, attention);
    let window = config.window(AttentionMask::Sliding(4096));
    let pattern = config.size("sliding_window_pattern", Some(6));
    let sliding = config.sliding_layers(dimensions.num_hidden_layers, |layer| !(layer + 1).is_multiple_of(pattern));
    let embedding = gemma2::embedding(&dimensions);
    let mut model = ModelSpec { embedding, ..dimensions.model_by_layer_type(&layer, &sliding, window) };
    model.head.softcap = config.optional_number("final_logit_softcapping", None);
    model
}
