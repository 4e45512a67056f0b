//! Hunyuan 0.5B to 7B: norms of each head after the rotation, whose base is raised by a fixed `alpha`.

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
    dimensions.ropes = match config.rope_with_alpha(dimensions.head_dim) {
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
