//! GLM-4 and GLM-4-0414: half of each head is rotated, in interleaved pairs; gate and up are one linear; GLM-4-0414 also has
//! norms after both halves.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::spec::{AttentionBiases, AttentionMask, AttentionSpec, GatedSpec, LayerNorms, RopeId, RotarySpec};
use crate::{LayerSpec, ModelSpec};

/// As in transformers' `GlmForCausalLM`.
pub(super) const GLM: Family = Family {
    architecture: "GlmForCausalLM",
    model_type: "glm",
    section: None,
    names: TensorNames::LLAMA,
    spec: |config| spec(config, false),
};

/// As in transformers' `Glm4ForCausalLM`.
pub(super) const GLM4: Family = Family {
    architecture: "Glm4ForCausalLM",
    model_type: "glm4",
    section: None,
    names: TensorNames::LLAMA,
    spec: |config| spec(config, true),
};

fn spec(config: &mut ConfigReader<'_>, post_norms: bool) -> ModelSpec {
    let defaults = ClassDefaults {
        head_dim: Some(128),
        num_key_value_heads: Some(2),
        max_position_embeddings: 131_072,
        rms_norm_eps: 1.5625e-7,
        partial_rotary_factor: Some(0.5),
        ..ClassDefaults::default()
    };
    let dimensions = Dimensions::read(config, defaults);
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: config.flag("attention_bias", true), o: false },
        rope: Some(RotarySpec { id: RopeId(0), interleaved: true }),
        ..dimensions.attention()
    };
    let gated = GatedSpec { fused: true, ..dimensions.gated() };
    let mut layer = dimensions.layer(attention, gated);
    if post_norms {
        let norm = Some(dimensions.norm());
        layer =
            LayerSpec { norms: LayerNorms { post_attention: norm, post_feed_forward: norm, ..layer.norms }, ..layer };
    }
    let masks = vec![AttentionMask::Full; dimensions.num_hidden_layers];
    dimensions.model(&layer, masks)
}
