//! Qwen3 with mixtures of experts: the attention of Qwen3, and routers that take the softmax over all experts.

use super::dimensions::{ClassDefaults, Dimensions};
use super::moe::{MoeKeys, uniform_mask, with_sparse_layers};
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::spec::{AttentionBiases, AttentionSpec, QkNormSpec, RoutingForm};

/// As in transformers' `Qwen3MoeForCausalLM`.
pub(super) const FAMILY: Family = Family {
    architecture: "Qwen3MoeForCausalLM",
    model_type: "qwen3_moe",
    section: None,
    names: TensorNames::LLAMA,
    spec,
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, ClassDefaults::default());
    let bias = config.flag("attention_bias", false);
    let attention = AttentionSpec {
        biases: AttentionBiases { qkv: bias, o: bias },
        qk_norm: Some(QkNormSpec { norm: dimensions.norm(), full_width: false, after_rope: false }),
        ..dimensions.attention()
    };
    let keys = MoeKeys {
        experts: &["num_experts", "num_local_experts"],
        intermediate_size: "moe_intermediate_size",
        routing: RoutingForm::SoftmaxTopK { normalize: config.flag("norm_topk_prob", false) },
        shared: None,
    };
    let moe = keys.read(config);
    let layer = dimensions.layer(attention, dimensions.gated());
    // Unlike Qwen3, every layer has the window where there is one.
    let masks = vec![uniform_mask(config); dimensions.num_hidden_layers];
    let model = dimensions.model(&layer, masks);
    with_sparse_layers(config, model, moe)
}
