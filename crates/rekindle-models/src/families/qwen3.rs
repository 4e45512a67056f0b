//! Qwen3: per-head norms on queries and keys, no biases unless the configuration asks for them.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::{AttentionBiases, AttentionSpec, QkNormSpec};

/// As in transformers' `Qwen3ForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "Qwen3ForCausalLM", model_type: "qwen3", section: None, names: TensorNames::LLAMA, spec };

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, ClassDefaults { head_dim: Some(128), ..ClassDefaults::default() });
    let bias = config.flag("attention_bias", false);
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: bias, o: bias },
        qk_norm: Some(QkNormSpec { norm: dimensions.norm(), full_width: false, after_rope: false }),
        ..dimensions.attention()
    };
    let layer = dimensions.layer(attention, dimensions.gated());
    let masks = config.masks(dimensions.num_hidden_layers);
    dimensions.model(&layer, masks)
}
