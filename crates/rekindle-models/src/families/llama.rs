//! Llama 2 and 3.x, and models in their shape (SmolLM2, Falcon 3, TinyLlama): biases only where the configuration asks
//! for them.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::{AttentionBiases, AttentionSpec, GatedSpec};

/// As in transformers' `LlamaForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "LlamaForCausalLM", model_type: "llama", section: None, names: TensorNames::LLAMA, spec };

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, ClassDefaults::default());
    let bias = config.flag("attention_bias", false);
    let attention = AttentionSpec { biases: AttentionBiases { qkv: bias, o: bias }, ..dimensions.attention() };
    let gated = GatedSpec { bias: config.flag("mlp_bias", false), ..dimensions.gated() };
    let layer = dimensions.layer(attention, gated);
    let masks = config.masks(dimensions.num_hidden_layers);
    dimensions.model(&layer, masks)
}
