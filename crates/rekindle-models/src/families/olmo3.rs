//! OLMo 3: OLMo 2 with a window in three of four layers, and a rotary embedding for each kind of layer.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, olmo2};
use crate::ModelSpec;
use crate::spec::AttentionMask;

/// As in transformers' `Olmo3ForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "Olmo3ForCausalLM", model_type: "olmo3", section: None, names: olmo2::NAMES, spec };

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    const THETA: f64 = 5e5;
    let mut dimensions = Dimensions::without_ropes(config, ClassDefaults { ..olmo2::defaults() });
    dimensions.ropes = config.ropes_by_layer_type([dimensions.head_dim; 2], THETA, "rope_theta", THETA);
    let layer = olmo2::layer(config, &dimensions);
    let window = config.window(AttentionMask::Sliding(4096));
    let sliding = config.sliding_layers(dimensions.num_hidden_layers, |layer| !(layer + 1).is_multiple_of(4));
    dimensions.model_by_layer_type(&layer, &sliding, window)
}
