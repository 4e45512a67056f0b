//! Granite MoE, as in Granite 3's 1B-A400M and 3B-A800M: Granite with a mixture of experts in every layer.

use super::dimensions::{ClassDefaults, Dimensions};
use super::moe::MoeKeys;
use super::names::ExpertTensorNames;
use super::{ConfigReader, Family, TensorNames, granite};
use crate::ModelSpec;
use crate::parameters::{ExpertStack, LinearRole};
use crate::spec::{FeedForwardSpec, RoutingForm};

/// As in transformers' `GraniteMoeForCausalLM`. Its modules have other names than the tensors of its files.
pub(super) const FAMILY: Family =
    Family { architecture: "GraniteMoeForCausalLM", model_type: "granitemoe", section: None, names: NAMES, spec };

const NAMES: TensorNames = TensorNames {
    linear: |role| match role {
        LinearRole::Router => "block_sparse_moe.router",
        other => (TensorNames::LLAMA.linear)(other),
    },
    experts: ExpertTensorNames {
        module: "block_sparse_moe.experts",
        stacked: |stack| match stack {
            ExpertStack::GateUp => "block_sparse_moe.experts.gate_up_proj",
            ExpertStack::Down => "block_sparse_moe.experts.down_proj",
        },
        only_stacked: true,
        ..TensorNames::LLAMA.experts
    },
    stored_parts: &[
        (".block_sparse_moe.input_linear.weight", ".block_sparse_moe.experts.gate_up_proj"),
        (".block_sparse_moe.output_linear.weight", ".block_sparse_moe.experts.down_proj"),
        (".block_sparse_moe.router.layer.weight", ".block_sparse_moe.router.weight"),
    ],
    ..TensorNames::LLAMA
};

fn spec(config: &mut ConfigReader<'_>) -> ModelSpec {
    let dimensions = Dimensions::read(config, ClassDefaults::default());
    let keys = MoeKeys {
        experts: &["num_local_experts"],
        intermediate_size: "intermediate_size",
        routing: RoutingForm::TopKSoftmax,
        shared: None,
    };
    let moe = keys.read(config);
    let gated = dimensions.gated();
    let mut model = granite::model(config, dimensions, gated);
    for layer in &mut model.layers {
        layer.feed_forward = FeedForwardSpec::Moe(moe);
    }
    model
}
