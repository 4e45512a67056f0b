//! The layers of a decoder: pairs of functions, forward and backward, with a visible saved state.
//!
//! Nothing is recorded: `forward` returns what the backward needs as a value, and `backward` takes it. Layers work on
//! documents that lie one after another, `[tokens, hidden]`; there is no batch axis and no padding. Another crate can use
//! them by itself: every layer needs a [`Context`] and its weights.
//!
//! | layer | computes |
//! |---|---|
//! | [`RmsNorm`] | g ∘ x / √(mean(x²) + eps), g = w or 1 + w; LayerNorm too |
//! | [`Attention`] | causal grouped-query attention with its projections |
//! | [`GatedDeltaNet`] | linear attention by the gated delta rule with its projections |
//! | [`GatedMlp`] | down(act(gate(x)) ∘ up(x)) |
//! | [`Moe`] | Σ w·(a gated feed-forward half) over the experts of a token |
//! | [`Block`] | both halves with their norms around the residual stream |

mod attention;
mod block;
mod checkpointed;
mod feed_forward;
mod gated_delta_net;
mod gated_mlp;
mod layer_state;
mod mixer;
mod moe;
mod norm;
mod shared_expert;

pub use attention::{Attention, AttentionPending, AttentionSaved, QkNormPlace};
pub use block::{Block, BlockNorms, BlockSaved};
pub use checkpointed::Checkpointed;
pub use feed_forward::{FeedForward, FeedForwardSaved};
pub use gated_delta_net::{GatedDeltaNet, GatedDeltaNetPending, GatedDeltaNetSaved};
pub use gated_mlp::{GatedMlp, GatedMlpSaved};
pub use layer_state::{LayerState, RecurrentStates};
pub use mixer::{Mixer, MixerCheckpoint, MixerPending, MixerSaved};
pub(crate) use moe::expert_names;
pub use moe::{Moe, MoeSaved};
pub use norm::RmsNorm;
pub(crate) use norm::plain_head_norm;
use rekindle_kernels::attention::Documents;
use rekindle_kernels::gated_delta::Sequences;
use rekindle_kernels::rope::{Angles, HeadNorm};
use rekindle_kernels::{Params, Weight};
use rekindle_lora::{AdapterRows, Dropout, LinearContext};
pub use shared_expert::{SharedExpert, SharedExpertSaved};

use crate::RouterPass;
use crate::parameters::{ExpertStack, LayerRole, ParameterSpec};
use crate::spec::{MoeSpec, RopeId};

/// Everything that the layers share while a batch goes through.
///
/// The states of sequences are no part of it: each layer has its own, and only [`Block::decode`] changes one.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// The trained parameters.
    pub params: &'a Params,
    /// The angles of the batch's tokens, by [`RopeId`].
    pub ropes: &'a [Angles],
    /// The batch's documents, by [`Attention::layout`]; empty while decoding.
    pub documents: &'a [Documents],
    /// The batch's documents for gated delta layers; `None` while decoding.
    pub sequences: Option<&'a Sequences>,
    /// Dropout before adapters; `None` outside training.
    pub dropout: Option<Dropout<'a>>,
    /// True if adapters take part.
    pub adapters: bool,
    /// Adapters of some of the batch's tokens each, while decoding; empty otherwise.
    pub rows: &'a [AdapterRows<'a>],
    /// The part in the auxiliary loss of mixtures.
    pub router: RouterPass<'a>,
}

impl<'a> Context<'a> {
    /// The part that linears need.
    pub fn linear(&self) -> LinearContext<'a> {
        LinearContext { params: self.params, dropout: self.dropout, adapters: self.adapters, rows: self.rows }
    }

    fn angles(&self, rope: RopeId) -> &'a Angles {
        &self.ropes[rope.0]
    }

    fn sequences(&self) -> &'a Sequences {
        self.sequences.expect("a batch has its documents for gated delta layers")
    }

    fn documents(&self, layout: usize) -> &'a Documents {
        self.documents.get(layout).expect("a batch has its documents for every layout of attention")
    }
}

/// Receives the weights of a layer with their roles, in the order in which they were built.
pub type VisitWeights<'v, 'a> = &'v mut dyn FnMut(LayerRole, &'a Weight);

/// The source of a model's weights while it is built.
pub(crate) trait WeightSource {
    /// Returns the weight of a tensor; called once for each, in the order of the forward pass.
    fn weight(&mut self, tensor: &ParameterSpec) -> Result<Weight, crate::Error>;

    /// Returns a norm of heads whose factor is 1.
    fn ones(&self, head_dim: usize, eps: f64) -> HeadNorm;

    /// Returns one weight with the rows of several tensors; called once, as [`weight`](Self::weight).
    fn stacked(&mut self, stack: &StackedTensors) -> Result<Weight, crate::Error>;
}

/// Tensors of one shape that become one weight, the rows of each below those of the one before.
pub(crate) struct StackedTensors {
    /// The weight.
    pub(crate) whole: ParameterSpec,
    /// The tensors.
    pub(crate) parts: Vec<ParameterSpec>,
}

/// Builds the weights of one layer.
pub(crate) struct LayerBuilder<'a> {
    pub(crate) source: &'a mut dyn WeightSource,
    pub(crate) names: &'a crate::families::TensorNames,
    pub(crate) layer: usize,
}

impl LayerBuilder<'_> {
    fn weight(&mut self, role: LayerRole, shape: &[usize]) -> Result<Weight, crate::Error> {
        let role = crate::Role::Layer(self.layer, role);
        self.source.weight(&ParameterSpec { name: self.names.tensor(role), role, shape: shape.to_vec() })
    }

    /// The linears of all experts as one weight.
    fn stacked(&mut self, spec: &MoeSpec, stack: ExpertStack, hidden: usize) -> Result<Weight, crate::Error> {
        let tensor = |role: LayerRole, shape: [usize; 2]| {
            let role = crate::Role::Layer(self.layer, role);
            ParameterSpec { name: self.names.tensor(role), role, shape: shape.to_vec() }
        };
        let shape = spec.expert_shape(stack, hidden);
        let roles = spec.roles(stack);
        let of = |expert: usize| roles.iter().map(move |&role| LayerRole::Expert(role, expert));
        let parts = (0..spec.experts).flat_map(of).map(|role| tensor(role, shape)).collect();
        let whole = tensor(LayerRole::Experts(stack), spec.stack_shape(stack, hidden));
        self.source.stacked(&StackedTensors { whole, parts })
    }
}
