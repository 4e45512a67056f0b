//! Command R7B and its relatives: LayerNorm without a bias, both halves of a layer on one norm, interleaved rotary positions in
//! the layers with a window and none in the others, and a factor on the logits.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::spec::{
    AttentionBiases, AttentionMask, AttentionSpec, LayerNorms, NormKind, NormSpec, NormWeight, RopeId, RotarySpec,
};
use crate::{LayerSpec, ModelSpec};

/// As in transformers' `Cohere2ForCausalLM`.
pub(super) const FAMILY: Family = Family {
    architecture: "Cohere2ForCausalLM",
    model_type: "cohere2",
    section: None,
    names: TensorNames::LLAMA,
    spec,
};

/// Those of `Cohere2Config`.
fn defaults() -> ClassDefaults {
    ClassDefaults {
        hidden_size: Some(8192),
        intermediate_size: Some(22_528),
        num_hidden_layers: Some(40),
        num_attention_heads: Some(64),
        vocab_size: Some(256_000),
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        ..ClassDefaults::default()
    }
}

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, defaults());
    let eps = config.number("layer_norm_eps", 1e-5);
    if !(eps.is_finite() && eps >= 0.0) {
        config.problem(format!("layer_norm_eps is {eps}; expected at least 0"));
    }
    let norm = NormSpec { kind: NormKind::Layer, eps, weight: NormWeight::RoundedAfter };
    let bias = config.flag("attention_bias", false);
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: bias, o: bias },
        rope: Some(RotarySpec { id: RopeId(0), interleaved: true }),
        ..dimensions.attention()
    };
    let layer = LayerSpec {
        norms: LayerNorms { pre_attention: Some(norm), ..LayerNorms::default() },
        parallel: true,
        ..dimensions.layer(attention, dimensions.gated())
    };
    let window = config.window(AttentionMask::Sliding(4096));
    let pattern = config.size("sliding_window_pattern", Some(4)).max(1);
    let sliding = config.sliding_layers(dimensions.num_hidden_layers, |layer| !(layer + 1).is_multiple_of(pattern));
    if window == AttentionMask::Full && sliding.contains(&true) {
        config.problem("sliding_window is null, and layer_types has layers with a window".to_owned());
    }
    let masks = sliding.iter().map(|&sliding| if sliding { window } else { AttentionMask::Full }).collect();
    let mut model = dimensions.model(&layer, masks);
    for (attention, sliding) in model.layers.iter_mut().filter_map(LayerSpec::attention_mut).zip(sliding) {
        attention.rope = attention.rope.filter(|_| sliding);
    }
    model.final_norm = norm;
    model.head.multiplier = Some(config.number("logit_scale", 0.0625));
    model
}
