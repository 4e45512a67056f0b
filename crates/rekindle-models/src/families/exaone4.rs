//! EXAONE 4: norms after both halves, query and key norms, and in the larger model a window in three of four layers, the
//! fourth of which has no rotary positions.

use super::dimensions::{ClassDefaults, Dimensions};
use super::{ConfigReader, Family, olmo2};
use crate::spec::{AttentionMask, AttentionSpec, LayerNorms, QkNormSpec};
use crate::{LayerSpec, ModelSpec};

/// As in transformers' `Exaone4ForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "Exaone4ForCausalLM", model_type: "exaone4", section: None, names: olmo2::NAMES, spec };

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults { num_key_value_heads: Some(32), rms_norm_eps: 1e-5, ..ClassDefaults::default() };
    let dimensions = Dimensions::read(config, defaults);
    let norm = dimensions.norm();
    let attention = AttentionSpec {
        qk_norm: Some(QkNormSpec { norm, full_width: false, after_rope: false }),
        ..dimensions.attention()
    };
    let norms = LayerNorms { post_attention: Some(norm), post_feed_forward: Some(norm), ..LayerNorms::default() };
    let layer = LayerSpec { norms, ..dimensions.layer(attention, dimensions.gated()) };
    let window = config.window(AttentionMask::Sliding(4096));
    let pattern = pattern(config, window == AttentionMask::Full);
    let has_windows = window != AttentionMask::Full;
    let sliding = config
        .sliding_layers(dimensions.num_hidden_layers, |layer| has_windows && !(layer + 1).is_multiple_of(pattern));
    let masks = sliding.iter().map(|&sliding| if sliding { window } else { AttentionMask::Full }).collect();
    let mut model = dimensions.model(&layer, masks);
    for (attention, sliding) in model.layers.iter_mut().filter_map(LayerSpec::attention_mut).zip(sliding) {
        attention.rope = attention.rope.filter(|_| sliding || !has_windows);
    }
    model
}

/// The distance between layers without a window: `sliding_window_pattern`, a number or a text such as "LLLG".
fn pattern(config: &mut ConfigReader<'_>, is_unused: bool) -> usize {
    let value = config.get("sliding_window_pattern");
    match value.and_then(|value| value.as_str()) {
        Some(letters) => letters.len().max(1),
        // transformers writes it for a model without windows.
        None if is_unused && value == Some(&0.into()) => 1,
        None => config.size("sliding_window_pattern", Some(4)),
    }
}
