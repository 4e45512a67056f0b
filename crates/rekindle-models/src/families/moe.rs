//! The keys that families with mixtures of experts share.

use serde_json::Value;

use super::ConfigReader;
use crate::ModelSpec;
use crate::spec::{Activation, AttentionMask, FeedForwardSpec, MoeSpec, RoutingForm, SharedExpertSpec};

/// The properties of a family's mixtures besides the sizes in `config.json`.
pub(super) struct MoeKeys {
    /// The keys that may hold the number of experts.
    pub(super) experts: &'static [&'static str],
    /// The key of the width of an expert.
    pub(super) intermediate_size: &'static str,
    /// The formula of the router's weights.
    pub(super) routing: RoutingForm,
    /// The expert that every token uses.
    pub(super) shared: Option<SharedExpertSpec>,
}

impl MoeKeys {
    /// Reads the mixture.
    pub(super) fn read(self, config: &mut ConfigReader<'_>) -> MoeSpec {
        let present = self.experts.iter().find(|key| config.get(key).is_some());
        let experts = config.size(present.unwrap_or(&self.experts[0]), None);
        let top_k = config.size("num_experts_per_tok", None);
        if top_k > experts {
            config.problem(format!("num_experts_per_tok is {top_k}, and there are {experts} experts"));
        }
        MoeSpec {
            experts,
            top_k: top_k.min(experts),
            intermediate_size: config.size(self.intermediate_size, None),
            activation: Activation::Silu,
            bias: false,
            routing: self.routing,
            shared: self.shared,
        }
    }
}

/// Replaces the feed-forward halves that `decoder_sparse_step` and `mlp_only_layers` leave to mixtures: every
/// `decoder_sparse_step`-th layer, without those that are listed.
pub(super) fn with_sparse_layers(config: &mut ConfigReader<'_>, mut model: ModelSpec, moe: MoeSpec) -> ModelSpec {
    let step = config.size("decoder_sparse_step", Some(1));
    let dense = dense_layers(config, model.layers.len());
    for (index, layer) in model.layers.iter_mut().enumerate() {
        if (index + 1).is_multiple_of(step) && !dense.contains(&index) {
            layer.feed_forward = FeedForwardSpec::Moe(moe);
        }
    }
    model
}

/// The mask of all layers: a window only with `use_sliding_window`.
pub(super) fn uniform_mask(config: &mut ConfigReader<'_>) -> AttentionMask {
    let uses_window = config.flag("use_sliding_window", false);
    if uses_window { config.window(AttentionMask::Sliding(4096)) } else { AttentionMask::Full }
}

/// The layers of `mlp_only_layers`.
fn dense_layers(config: &mut ConfigReader<'_>, layers: usize) -> Vec<usize> {
    const KEY: &str = "mlp_only_layers";
    let Some(value) = config.get(KEY) else { return Vec::new() };
    let index = |value: &Value| value.as_u64().map(|index| index as usize).filter(|index| *index < layers);
    let read = value.as_array().and_then(|list| list.iter().map(index).collect());
    read.unwrap_or_else(|| config.wrong(KEY, value, &format!("a list of layers below {layers}"), Vec::new()))
}
