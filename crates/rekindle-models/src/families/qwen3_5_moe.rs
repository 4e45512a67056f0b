//! Qwen3.5 and 3.6 with mixtures of experts: the layers of the dense models with a mixture and a shared expert in each.

use super::dimensions::ClassDefaults;
use super::moe::MoeKeys;
use super::qwen3_5::{self, MULTIMODAL_NAMES};
use super::{ConfigReader, Family};
use crate::ModelSpec;
use crate::spec::{FeedForwardSpec, RoutingForm, SharedExpertSpec};

/// As in transformers' `Qwen3_5MoeForCausalLM`.
pub(super) const TEXT: Family =
    Family { architecture: "Qwen3_5MoeForCausalLM", model_type: "qwen3_5_moe_text", spec, ..qwen3_5::TEXT };

/// As in transformers' `Qwen3_5MoeForConditionalGeneration`.
pub(super) const MULTIMODAL: Family = Family {
    architecture: "Qwen3_5MoeForConditionalGeneration",
    model_type: "qwen3_5_moe",
    section: Some("text_config"),
    names: MULTIMODAL_NAMES,
    spec,
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults {
        hidden_size: Some(2048),
        // No layer has a dense half.
        intermediate_size: Some(0),
        num_hidden_layers: Some(40),
        num_key_value_heads: Some(2),
        ..qwen3_5::class_defaults()
    };
    let mut model = qwen3_5::hybrid(config, defaults);
    let intermediate_size = config.size("shared_expert_intermediate_size", Some(512));
    let keys = MoeKeys {
        experts: &["num_experts"],
        intermediate_size: "moe_intermediate_size",
        routing: RoutingForm::SoftmaxTopK { normalize: true },
        shared: Some(SharedExpertSpec { intermediate_size, gated: true }),
    };
    let moe = keys.read(config);
    for layer in &mut model.layers {
        layer.feed_forward = FeedForwardSpec::Moe(moe);
    }
    model
}
