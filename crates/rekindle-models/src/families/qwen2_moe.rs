//! Qwen2 with mixtures of experts: biases on queries, keys and values, and an expert that every token uses, behind a
//! sigmoid of its own.

use super::dimensions::{ClassDefaults, Dimensions};
use super::moe::{MoeKeys, with_sparse_layers};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::{AttentionBiases, AttentionMask, AttentionSpec, RoutingForm, SharedExpertSpec};

/// As in transformers' `Qwen2MoeForCausalLM`.
pub(super) const FAMILY: Family = Family {
    architecture: "Qwen2MoeForCausalLM",
    model_type: "qwen2_moe",
    section: None,
    names: TensorNames::LLAMA,
    spec,
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, ClassDefaults::default());
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: config.flag("qkv_bias", true), o: false },
        ..dimensions.attention()
    };
    let intermediate_size = config.size("shared_expert_intermediate_size", None);
    let keys = MoeKeys {
        experts: &["num_experts"],
        intermediate_size: "moe_intermediate_size",
        routing: RoutingForm::SoftmaxTopK { normalize: config.flag("norm_topk_prob", false) },
        shared: Some(SharedExpertSpec { intermediate_size, gated: true }),
    };
    let moe = keys.read(config);
    let layer = dimensions.layer(attention, dimensions.gated());
    // Which layers have the window is not what it is for Qwen2.
    config.only("use_sliding_window", false);
    let masks = vec![AttentionMask::Full; dimensions.num_hidden_layers];
    let model = dimensions.model(&layer, masks);
    with_sparse_layers(config, model, moe)
}
