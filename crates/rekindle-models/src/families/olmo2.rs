//! OLMo 2: norms after both halves instead of before them, and one norm over all queries and one over all keys.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::spec::{AttentionBiases, AttentionMask, AttentionSpec, LayerNorms, NormWeight, QkNormSpec};
use crate::{LayerSpec, ModelSpec};

/// As in transformers' `Olmo2ForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "Olmo2ForCausalLM", model_type: "olmo2", section: None, names: NAMES, spec };

/// `post_attention_layernorm` is the norm of the result of attention here, not the one before the feed-forward half.
pub(super) const NAMES: TensorNames = TensorNames {
    post_attention_norm: "post_attention_layernorm",
    post_feed_forward_norm: "post_feedforward_layernorm",
    ..TensorNames::LLAMA
};

/// Those of `Olmo2Config` and `Olmo3Config`.
pub(super) fn defaults() -> ClassDefaults {
    ClassDefaults { rms_norm_eps: 1e-5, norm_weight: NormWeight::RoundedAfter, ..ClassDefaults::default() }
}

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, defaults());
    let layer = layer(config, &dimensions);
    let masks = vec![AttentionMask::Full; dimensions.num_hidden_layers];
    dimensions.model(&layer, masks)
}

/// A layer of OLMo 2 and 3.
pub(super) fn layer(config: &mut ConfigReader<'_>, dimensions: &Dimensions) -> LayerSpec {
    let (norm, bias) = (dimensions.norm(), config.flag("attention_bias", false));
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: bias, o: bias },
        qk_norm: Some(QkNormSpec { norm, full_width: true, after_rope: false }),
        ..dimensions.attention()
    };
    let norms = LayerNorms { post_attention: Some(norm), post_feed_forward: Some(norm), ..LayerNorms::default() };
    LayerSpec { norms, ..dimensions.layer(attention, dimensions.gated()) }
}
