//! gpt-oss: sinks and biases in attention, a window in every other layer, and experts with biases and a clamped SwiGLU, which
//! its checkpoints have in MXFP4.

use super::dimensions::{ClassDefaults, Dimensions};
use super::moe::MoeKeys;
use super::names::ExpertTensorNames;
use super::{ConfigReader, Family, TensorNames};
use crate::ModelSpec;
use crate::parameters::LinearRole;
use crate::spec::{
    Activation, AttentionBiases, AttentionMask, AttentionSpec, FeedForwardSpec, MoeSpec, NormWeight, RoutingForm,
};

/// As in transformers' `GptOssForCausalLM`.
pub(super) const FAMILY: Family =
    Family { architecture: "GptOssForCausalLM", model_type: "gpt_oss", section: None, names: NAMES, spec };

const NAMES: TensorNames = TensorNames {
    linear: |role| match role {
        LinearRole::Router => "mlp.router",
        other => (TensorNames::LLAMA.linear)(other),
    },
    experts: ExpertTensorNames { transposed: true, only_stacked: true, ..TensorNames::LLAMA.experts },
    ..TensorNames::LLAMA
};

/// Those of `GptOssConfig`, which are the larger model's.
fn defaults() -> ClassDefaults {
    ClassDefaults {
        hidden_size: Some(2880),
        intermediate_size: Some(2880),
        num_hidden_layers: Some(36),
        num_attention_heads: Some(64),
        head_dim: Some(64),
        num_key_value_heads: Some(8),
        vocab_size: Some(201_088),
        max_position_embeddings: 131_072,
        rms_norm_eps: 1e-5,
        norm_weight: NormWeight::RoundedAfter,
        rope_theta: Some(150_000.0),
        ..ClassDefaults::default()
    }
}

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, defaults());
    config.require_rope();
    let bias = config.flag("attention_bias", true);
    let attention =
        AttentionSpec { biases: AttentionBiases { qkv: bias, o: bias }, sinks: true, ..dimensions.attention() };
    let keys = MoeKeys {
        experts: &["num_local_experts", "num_experts"],
        intermediate_size: "intermediate_size",
        routing: RoutingForm::TopKSoftmax,
        shared: None,
    };
    let [alpha, limit] = [("swiglu_alpha", 1.702), ("swiglu_limit", 7.0)].map(|(key, default)| {
        let value = config.number(key, default);
        if !(value.is_finite() && value > 0.0) {
            config.problem(format!("{key} is {value}; expected a number above 0"));
        }
        value
    });
    let moe = MoeSpec { bias: true, activation: Activation::ClampedSwiglu { alpha, limit }, ..keys.read(config) };
    let layer = dimensions.layer(attention, dimensions.gated());
    let window = config.window(AttentionMask::Sliding(128));
    let sliding = config.sliding_layers(dimensions.num_hidden_layers, |layer| layer.is_multiple_of(2));
    let masks = sliding.into_iter().map(|sliding| if sliding { window } else { AttentionMask::Full }).collect();
    let mut model = dimensions.model(&layer, masks);
    for layer in &mut model.layers {
        layer.feed_forward = FeedForwardSpec::Moe(moe);
    }
    model
}
