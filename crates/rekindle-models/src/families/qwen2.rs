//! Qwen2 and Qwen2.5: biases on `q_proj`, `k_proj` and `v_proj`.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::{AttentionBiases, AttentionSpec};

/// As in transformers' `Qwen2ForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "Qwen2ForCausalLM", model_type: "qwen2", section: None, names: TensorNames::LLAMA, spec };

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, ClassDefaults::default());
    let attention = AttentionSpec { biases: AttentionBiases { qkv: true, o: false }, ..dimensions.attention() };
    let layer = dimensions.layer(attention, dimensions.gated());
    let masks = config.masks(dimensions.num_hidden_layers);
    dimensions.model(&layer, masks)
}
