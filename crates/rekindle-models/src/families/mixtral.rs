//! Mixtral: Mistral with a mixture of experts in every layer.

use super::dimensions::{ClassDefaults, Dimensions};
use super::moe::{MoeKeys, with_sparse_layers};
use super::names::ExpertTensorNames;
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::parameters::{ExpertRole, LinearRole};
use crate::spec::{AttentionMask, RoutingForm};

/// As in transformers' `MixtralForCausalLM`, with the tensor names of its files.
pub(super) const FAMILY: Family =
    Family { architecture: "MixtralForCausalLM", model_type: "mixtral", section: None, names: NAMES, spec };

const NAMES: TensorNames = TensorNames {
    linear: |role| match role {
        LinearRole::Router => "block_sparse_moe.gate",
        other => (TensorNames::LLAMA.linear)(other),
    },
    experts: ExpertTensorNames {
        module: "block_sparse_moe.experts",
        linear: |role| match role {
            ExpertRole::Gate => "w1",
            ExpertRole::Up => "w3",
            ExpertRole::Down => "w2",
            other => (TensorNames::LLAMA.experts.linear)(other),
        },
        joined: "w1_w3",
        ..TensorNames::LLAMA.experts
    },
    ..TensorNames::LLAMA
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let defaults = ClassDefaults {
        num_key_value_heads: Some(8),
        rms_norm_eps: 1e-5,
        rope_theta: Some(1e6),
        ..ClassDefaults::default()
    };
    let dimensions = Dimensions::read(config, defaults);
    config.only("router_jitter_noise", 0.0);
    let keys = MoeKeys {
        experts: &["num_local_experts"],
        intermediate_size: "intermediate_size",
        routing: RoutingForm::SoftmaxTopK { normalize: true },
        shared: None,
    };
    let moe = keys.read(config);
    let layer = dimensions.layer(dimensions.attention(), dimensions.gated());
    let window = config.window(AttentionMask::Full);
    let masks = vec![window; dimensions.num_hidden_layers];
    let model = dimensions.model(&layer, masks);
    with_sparse_layers(config, model, moe)
}
