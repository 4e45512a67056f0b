//! The parameters of a model: their roles, names and shapes.
//!
//! [`ModelConfig::parameters`] lists them from the spec, in the order of a checkpoint;
//! [`Decoder::parameters`](crate::Decoder::parameters) visits those of a built model. Loading, saving, memory reports and
//! the search for non-finite numbers all use these two and know no other list.

use rekindle_kernels::Weight;

use crate::families::SCORE;
use crate::spec::{FeedForwardSpec, MixerSpec, NormSpec};
use crate::{LayerSpec, ModelConfig};

/// The part that a tensor plays in a model, whatever its name is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// The table of embeddings.
    Embedding,
    /// A tensor of the layer with this index.
    Layer(usize, LayerRole),
    /// The norm after the last layer.
    FinalNorm,
    /// The output layer, where it is not the embedding table.
    Head,
}

/// The part that a tensor plays in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LayerRole {
    /// The norm before attention.
    PreAttentionNorm,
    /// The weight of a linear.
    Weight(LinearRole),
    /// The bias of a linear.
    Bias(LinearRole),
    /// The norm of queries.
    QueryNorm,
    /// The norm of keys.
    KeyNorm,
    /// The logits of attention's sinks.
    Sinks,
    /// The convolution of a gated delta layer.
    ShortConv,
    /// The logarithm of its decays' rates.
    DecayRate,
    /// The addend of its decays' inputs.
    DecayBias,
    /// The gated norm of its result.
    GatedNorm,
    /// The norm of the result of attention.
    PostAttentionNorm,
    /// The norm before the feed-forward half.
    PreFeedForwardNorm,
    /// The norm of the result of the feed-forward half.
    PostFeedForwardNorm,
    /// The factor on the layer's output, a buffer that no training changes.
    OutputScalar,
    /// A linear of the expert with this index, as checkpoints have it.
    Expert(ExpertRole, usize),
    /// The linears of all experts as one weight, as models have them.
    Experts(ExpertStack),
    /// The biases of all experts, `[experts, out]`.
    ExpertBias(ExpertStack),
}

/// The part that a linear plays in a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearRole {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Queries, keys and values as one linear.
    Qkv,
    /// The result of attention.
    Output,
    /// Queries, keys and values of a gated delta layer.
    DeltaQkv,
    /// The gate of its result.
    DeltaGate,
    /// The strength of its updates.
    DeltaBeta,
    /// The input of its decays.
    DeltaDecay,
    /// Its result.
    DeltaOutput,
    /// The gate of the feed-forward half.
    Gate,
    /// The projection that the gate multiplies.
    Up,
    /// Gate and up as one linear.
    GateUp,
    /// The projection back to the residual stream.
    Down,
    /// The logits of a mixture's router.
    Router,
    /// The gate of the expert that every token uses.
    SharedGate,
    /// The projection that this gate multiplies.
    SharedUp,
    /// The projection back from the expert that every token uses.
    SharedDown,
    /// The gate on the result of the expert that every token uses.
    SharedExpertGate,
}

/// The part that a linear plays in an expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExpertRole {
    /// The gate.
    Gate,
    /// The projection that the gate multiplies.
    Up,
    /// Gate and up as one linear whose rows alternate.
    GateUp,
    /// The projection back to the residual stream.
    Down,
}

/// Linears of all experts that are one weight, expert by expert.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ExpertStack {
    /// The rows of gate, then those of up, of each expert; or both in turn.
    GateUp,
    /// The rows of down.
    Down,
}

impl LinearRole {
    /// Returns true if its result are logits that choose or weigh experts.
    pub(crate) fn is_router(self) -> bool {
        matches!(self, Self::Router | Self::SharedExpertGate)
    }
}

impl ExpertStack {
    /// Both, in the order of the forward pass.
    pub const ALL: [Self; 2] = [Self::GateUp, Self::Down];
}

impl ExpertRole {
    /// The stack with this linear's rows, and its number among those of an expert
    /// ([`MoeSpec::roles`](crate::spec::MoeSpec::roles)).
    pub fn place(self) -> (ExpertStack, usize) {
        match self {
            Self::Gate => (ExpertStack::GateUp, 0),
            Self::Up => (ExpertStack::GateUp, 1),
            Self::GateUp => (ExpertStack::GateUp, 0),
            Self::Down => (ExpertStack::Down, 0),
        }
    }
}

/// A tensor that a model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ParameterSpec {
    /// The name in a checkpoint.
    pub name: String,
    /// The part that it plays.
    pub role: Role,
    /// The shape in a checkpoint.
    pub shape: Vec<usize>,
}

/// A weight of a built model.
#[derive(Clone, Copy, Debug)]
pub struct Parameter<'a> {
    /// The part that it plays.
    pub role: Role,
    /// The weight; with an adapter that trains the module whole, the trained one.
    pub weight: &'a Weight,
}

/// A weight of a built model that one of the configuration's parameters is, or is a part of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WeightPart<'a> {
    pub(crate) weight: &'a Weight,
    /// The index of the part, and the number of equal parts of rows.
    pub(crate) part: (usize, usize),
}

impl WeightPart<'_> {
    /// The rows of the weight.
    pub(crate) fn rows(&self) -> core::ops::Range<usize> {
        let (index, count) = self.part;
        let rows = self.weight.dims()[0] / count;
        index * rows..(index + 1) * rows
    }
}

impl LinearRole {
    /// The linears of a gated delta layer that read its input.
    pub const DELTA_INPUTS: [Self; 4] = [Self::DeltaQkv, Self::DeltaGate, Self::DeltaBeta, Self::DeltaDecay];
}

impl Role {
    /// Returns true if this is the weight of a linear of a layer, which can be quantized.
    pub fn is_linear(self) -> bool {
        matches!(self, Self::Layer(_, LayerRole::Weight(_) | LayerRole::Expert(..) | LayerRole::Experts(_)))
    }

    /// The linear of an expert, and the expert's index.
    pub fn expert(self) -> Option<(ExpertRole, usize)> {
        match self {
            Self::Layer(_, LayerRole::Expert(role, expert)) => Some((role, expert)),
            _ => None,
        }
    }

    /// Returns true for the embedding table and the output layer.
    pub fn is_vocabulary(self) -> bool {
        matches!(self, Self::Embedding | Self::Head)
    }
}

impl ParameterSpec {
    /// Returns the number of scalars.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns true if weight decay applies: to all but norms and biases, as in transformers' Trainer.
    pub fn decays(&self) -> bool {
        !self.is_vector() || matches!(self.role, Role::Layer(_, LayerRole::DecayRate | LayerRole::Sinks))
    }

    /// Returns true for a vector, such as a norm or a bias, and for the biases of all experts.
    pub fn is_vector(&self) -> bool {
        self.shape.len() == 1 || matches!(self.role, Role::Layer(_, LayerRole::ExpertBias(_)))
    }

    /// Returns true for a buffer, which stays frozen where all weights are trained.
    pub(crate) fn is_buffer(&self) -> bool {
        matches!(self.role, Role::Layer(_, LayerRole::OutputScalar))
    }

    /// Returns true for the weight of a score head.
    pub(crate) fn is_score(&self) -> bool {
        self.role == Role::Head && self.module() == SCORE
    }

    /// Returns true for a table with a row for each token id.
    pub(crate) fn is_vocabulary(&self) -> bool {
        self.role.is_vocabulary() && !self.is_score()
    }

    /// Returns the name of the module that it belongs to.
    pub fn module(&self) -> &str {
        self.name.rsplit_once('.').map_or(&self.name, |(module, _)| module)
    }
}

impl LayerSpec {
    /// Returns the tensors of a layer with their shapes, in the order of a checkpoint.
    pub fn parameters(&self, hidden_size: usize) -> Vec<(LayerRole, Vec<usize>)> {
        let mut list = Vec::new();
        let norm = |list: &mut Vec<_>, role, norm: &Option<NormSpec>| {
            if norm.is_some() {
                list.push((role, vec![hidden_size]));
            }
        };
        norm(&mut list, LayerRole::PreAttentionNorm, &self.norms.pre_attention);
        for linear in self.linears(hidden_size) {
            list.push((LayerRole::Weight(linear.role), linear.shape.to_vec()));
            if linear.bias {
                list.push((LayerRole::Bias(linear.role), linear.shape[..1].to_vec()));
            }
        }
        if let FeedForwardSpec::Moe(moe) = &self.feed_forward {
            for stack in ExpertStack::ALL {
                let shape = moe.expert_shape(stack, hidden_size);
                for expert in 0..moe.experts {
                    let roles = moe.roles(stack).iter();
                    list.extend(roles.map(|&role| (LayerRole::Expert(role, expert), shape.to_vec())));
                }
                if moe.bias {
                    list.push((LayerRole::ExpertBias(stack), moe.expert_bias_shape(stack, hidden_size).to_vec()));
                }
            }
        }
        match &self.mixer {
            MixerSpec::Attention(attention) => {
                if attention.qk_norm.is_some() {
                    let [q, k] = attention.qk_norm_widths();
                    list.extend([(LayerRole::QueryNorm, vec![q]), (LayerRole::KeyNorm, vec![k])]);
                }
                if attention.sinks {
                    list.push((LayerRole::Sinks, vec![attention.heads]));
                }
            }
            MixerSpec::GatedDelta(delta) => {
                let roles = [LayerRole::ShortConv, LayerRole::DecayRate, LayerRole::DecayBias, LayerRole::GatedNorm];
                list.extend(roles.map(|role| (role, delta.shape(role))));
            }
        }
        norm(&mut list, LayerRole::PostAttentionNorm, &self.norms.post_attention);
        norm(&mut list, LayerRole::PreFeedForwardNorm, &self.norms.pre_feed_forward);
        norm(&mut list, LayerRole::PostFeedForwardNorm, &self.norms.post_feed_forward);
        if self.output_scalar {
            list.push((LayerRole::OutputScalar, vec![1]));
        }
        list
    }
}

impl ModelConfig {
    /// Returns every tensor of a checkpoint of this model, in the order of the forward pass.
    pub fn parameters(&self) -> Vec<ParameterSpec> {
        let spec = &self.spec;
        let table = || vec![spec.vocab_size, spec.hidden_size];
        let mut list = Vec::new();
        let mut push = |role, shape| list.push(ParameterSpec { name: self.names.tensor(role), role, shape });
        push(Role::Embedding, table());
        for (index, layer) in spec.layers.iter().enumerate() {
            for (role, shape) in layer.parameters(spec.hidden_size) {
                push(Role::Layer(index, role), shape);
            }
        }
        push(Role::FinalNorm, vec![spec.hidden_size]);
        if !spec.head.tied {
            push(Role::Head, self.head_shape().to_vec());
        }
        list
    }
}
