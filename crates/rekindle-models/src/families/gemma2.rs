//! Gemma 2: (1 + w) norms before and after both halves, GeGLU, a scaled embedding, soft-capped scores and logits, and a
//! window in every other layer.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::spec::{
    Activation, AttentionBiases, AttentionMask, AttentionSpec, EmbeddingSpec, LayerNorms, NormSpec, NormWeight,
};
use crate::{LayerSpec, ModelSpec};

/// As in transformers' `Gemma2ForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "Gemma2ForCausalLM", model_type: "gemma2", section: None, names: NAMES, spec };

/// `post_attention_layernorm` is the norm of the result of attention here, not the one before the feed-forward half.
pub(super) const NAMES: TensorNames = TensorNames {
    post_attention_norm: "post_attention_layernorm",
    pre_feed_forward_norm: "pre_feedforward_layernorm",
    post_feed_forward_norm: "post_feedforward_layernorm",
    ..TensorNames::LLAMA
};

/// Those of `Gemma2Config`, most of which Gemma 3 has too.
pub(super) fn defaults() -> ClassDefaults {
    ClassDefaults {
        hidden_size: Some(2304),
        intermediate_size: Some(9216),
        num_hidden_layers: Some(26),
        num_attention_heads: Some(8),
        head_dim: Some(256),
        num_key_value_heads: Some(4),
        vocab_size: Some(256_000),
        max_position_embeddings: 8192,
        norm_weight: NormWeight::OnePlus,
        activation: Activation::GeluTanh,
        tie_word_embeddings: true,
        ..ClassDefaults::default()
    }
}

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, defaults());
    let attention = AttentionSpec {
        softcap: config.optional_number("attn_logit_softcapping", Some(50.0)),
        ..attention(config, &dimensions)
    };
    let layer = layer(&dimensions, attention);
    let window = config.window(AttentionMask::Sliding(4096));
    let sliding = config.sliding_layers(dimensions.num_hidden_layers, |layer| layer.is_multiple_of(2));
    let masks = sliding.into_iter().map(|sliding| if sliding { window } else { AttentionMask::Full }).collect();
    let embedding = embedding(&dimensions);
    let mut model = ModelSpec { embedding, ..dimensions.model(&layer, masks) };
    model.head.softcap = config.optional_number("final_logit_softcapping", Some(30.0));
    model
}

/// Attention with the scale of `query_pre_attn_scalar`.
pub(super) fn attention(config: &mut ConfigReader<'_>, dimensions: &Dimensions) -> AttentionSpec {
    config.only("use_bidirectional_attention", false);
    let bias = config.flag("attention_bias", false);
    let scalar = config.number("query_pre_attn_scalar", 256.0);
    if !(scalar.is_finite() && scalar > 0.0) {
        config.problem(format!("query_pre_attn_scalar is {scalar}; expected a number above 0"));
    }
    AttentionSpec {
        biases: AttentionBiases { qkv: bias, o: bias },
        scale: scalar.sqrt().recip() as f32,
        ..dimensions.attention()
    }
}

/// A layer with all four norms.
pub(super) fn layer(dimensions: &Dimensions, attention: AttentionSpec) -> LayerSpec {
    let norm: Option<NormSpec> = Some(dimensions.norm());
    let norms =
        LayerNorms { pre_attention: norm, post_attention: norm, pre_feed_forward: norm, post_feed_forward: norm };
    LayerSpec { norms, ..dimensions.layer(attention, dimensions.gated()) }
}

/// The embedding, scaled with √hidden_size.
pub(super) fn embedding(dimensions: &Dimensions) -> EmbeddingSpec {
    let multiplier = (dimensions.hidden_size as f64).sqrt();
    EmbeddingSpec { multiplier: Some(multiplier), rounds_multiplier: true, per_layer_input: None }
}
