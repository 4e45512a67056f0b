//! Mistral 7B, Nemo and Small: no biases, a head width of its own, and in v0.1 a sliding window over all layers.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::AttentionMask;

/// As in transformers' `MistralForCausalLM`.
pub(super) const FAMILY: Family = Family {
    architecture: "MistralForCausalLM",
    model_type: "mistral",
    section: None,
    names: TensorNames::LLAMA,
    spec,
};

pub(super) fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults { num_key_value_heads: Some(8), ..ClassDefaults::default() };
    let dimensions = Dimensions::read(config, defaults);
    let layer = dimensions.layer(dimensions.attention(), dimensions.gated());
    // The class has a window of 4096; from v0.2 on the files turn it off with null.
    let masks = vec![config.window(AttentionMask::Sliding(4096)); dimensions.num_hidden_layers];
    dimensions.model(&layer, masks)
}
