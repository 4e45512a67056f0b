//! Granite 3 and the dense Granite 4: multipliers on the embedding, the scores, the residual stream and the logits.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::spec::{AttentionBiases, AttentionMask, AttentionSpec, GatedSpec};
use crate::{LayerSpec, ModelSpec};

/// As in transformers' `GraniteForCausalLM`.
pub(super) const FAMILY: Family = Family {
    architecture: "GraniteForCausalLM",
    model_type: "granite",
    section: None,
    names: TensorNames::LLAMA,
    spec,
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, ClassDefaults::default());
    let gated = GatedSpec { bias: config.flag("mlp_bias", false), ..dimensions.gated() };
    model(config, dimensions, gated)
}

/// Reads the multipliers, which Granite's mixtures have too.
pub(super) fn model(config: &mut ConfigReader<'_>, dimensions: Dimensions, gated: GatedSpec) -> ModelSpec {
    let bias = config.flag("attention_bias", false);
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: bias, o: bias },
        // In the place of head_dim^-½, also where the file does not say.
        scale: config.number("attention_multiplier", 1.0) as f32,
        ..dimensions.attention()
    };
    let layer = LayerSpec {
        residual_multiplier: multiplier(config.number("residual_multiplier", 1.0)),
        ..dimensions.layer(attention, gated)
    };
    let masks = vec![AttentionMask::Full; dimensions.num_hidden_layers];
    let mut model = dimensions.model(&layer, masks);
    model.embedding.multiplier = multiplier(config.number("embedding_multiplier", 1.0));
    let logits_scaling = config.number("logits_scaling", 1.0);
    if !(logits_scaling.is_finite() && logits_scaling > 0.0) {
        config.problem(format!("logits_scaling is {logits_scaling}; expected a number above 0"));
    }
    model.head.multiplier = multiplier(logits_scaling.recip());
    model
}

/// A factor, unless it is 1.
fn multiplier(factor: f64) -> Option<f64> {
    (factor != 1.0).then_some(factor)
}
