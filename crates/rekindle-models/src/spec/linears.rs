//! The linears of a layer, as its spec implies them.

use rekindle_kernels::gated_delta::DeltaHeads;

use super::{
    AttentionSpec, FeedForwardSpec, GatedDeltaSpec, GatedSpec, LayerSpec, MixerSpec, MoeSpec, OutputGate, Projections,
    SharedExpertSpec,
};
use crate::parameters::{ExpertRole, ExpertStack, LayerRole, LinearRole};
use crate::spec::Activation;

/// A linear of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// The part that it plays.
    pub role: LinearRole,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// True if it has a bias.
    pub bias: bool,
    /// Widths of its outputs if it is fused, otherwise empty.
    pub outputs: Vec<usize>,
}

impl LinearSpec {
    fn new(role: LinearRole, shape: [usize; 2], bias: bool) -> Self {
        Self { role, shape, bias, outputs: Vec::new() }
    }

    fn fused(role: LinearRole, input: usize, bias: bool, outputs: Vec<usize>) -> Self {
        Self { role, shape: [outputs.iter().sum(), input], bias, outputs }
    }
}

impl AttentionSpec {
    /// The linears that read the normalized input; their outputs are q, k and v, or q and k where
    /// values are keys. Empty for projections that this
    /// version does not compute.
    pub fn inputs(&self, hidden_size: usize) -> Vec<LinearSpec> {
        let bias = self.biases.qkv;
        let [mut q, kv] = [self.heads, self.kv_heads].map(|heads| heads * self.head_dim);
        if self.output_gate == Some(OutputGate::InQueries) {
            q *= 2;
        }
        match self.projections {
            Projections::Separate => [(LinearRole::Query, q), (LinearRole::Key, kv), (LinearRole::Value, kv)]
                .map(|(role, out)| LinearSpec::new(role, [out, hidden_size], bias))
                .to_vec(),
            Projections::Fused => vec![LinearSpec::fused(LinearRole::Qkv, hidden_size, bias, vec![q, kv, kv])],
            Projections::ValuesAreKeys => [(LinearRole::Query, q), (LinearRole::Key, kv)]
                .map(|(role, out)| LinearSpec::new(role, [out, hidden_size], bias))
                .to_vec(),
            Projections::SharedKeys { .. } | Projections::Latent { .. } => Vec::new(),
        }
    }

    /// The linear that reads the result of attention.
    pub fn output(&self, hidden_size: usize) -> LinearSpec {
        LinearSpec::new(LinearRole::Output, [hidden_size, self.heads * self.head_dim], self.biases.o)
    }
}

impl GatedDeltaSpec {
    /// The linears that read the normalized input; their outputs are q, k and v together, z, b and a.
    pub fn inputs(&self, hidden_size: usize) -> Vec<LinearSpec> {
        let (heads, values) = (self.value_heads, self.heads().value_width());
        let widths = [self.heads().width(), values, heads, heads];
        let linear = |(role, out)| LinearSpec::new(role, [out, hidden_size], false);
        LinearRole::DELTA_INPUTS.into_iter().zip(widths).map(linear).collect()
    }

    /// The linear that makes the result.
    pub fn output(&self, hidden_size: usize) -> LinearSpec {
        LinearSpec::new(LinearRole::DeltaOutput, [hidden_size, self.heads().value_width()], false)
    }

    /// Shape of a tensor besides the linears, in a checkpoint.
    pub(crate) fn shape(&self, role: LayerRole) -> Vec<usize> {
        match role {
            LayerRole::ShortConv => vec![self.heads().width(), 1, self.conv_width],
            LayerRole::GatedNorm => vec![self.value_dim],
            _ => vec![self.value_heads],
        }
    }

    /// The heads as the operation takes them.
    pub(crate) fn heads(&self) -> DeltaHeads {
        let Self { key_heads, value_heads, key_dim, value_dim, .. } = *self;
        DeltaHeads { key_heads, value_heads, key_dim, value_dim }
    }
}

impl MixerSpec {
    /// The linears that read the normalized input.
    pub fn inputs(&self, hidden_size: usize) -> Vec<LinearSpec> {
        match self {
            Self::Attention(attention) => attention.inputs(hidden_size),
            Self::GatedDelta(delta) => delta.inputs(hidden_size),
        }
    }

    /// The linear that makes the result.
    pub fn output(&self, hidden_size: usize) -> LinearSpec {
        match self {
            Self::Attention(attention) => attention.output(hidden_size),
            Self::GatedDelta(delta) => delta.output(hidden_size),
        }
    }
}

impl GatedSpec {
    /// The linears that read the normalized input; their outputs are gate and up.
    pub fn inputs(&self, hidden_size: usize) -> Vec<LinearSpec> {
        let inner = self.intermediate_size;
        if self.fused {
            return vec![LinearSpec::fused(LinearRole::GateUp, hidden_size, self.bias, vec![inner, inner])];
        }
        [LinearRole::Gate, LinearRole::Up].map(|role| LinearSpec::new(role, [inner, hidden_size], self.bias)).to_vec()
    }

    /// The linear that reads act(gate) ∘ up.
    pub fn output(&self, hidden_size: usize) -> LinearSpec {
        LinearSpec::new(LinearRole::Down, [hidden_size, self.intermediate_size], self.bias)
    }
}

impl MoeSpec {
    /// The router.
    pub fn router(&self, hidden_size: usize) -> LinearSpec {
        LinearSpec::new(LinearRole::Router, [self.experts, hidden_size], self.bias)
    }

    /// `[out, in]` of a linear of an expert, by the stack that its rows are in.
    pub fn expert_shape(&self, stack: ExpertStack, hidden_size: usize) -> [usize; 2] {
        match stack {
            ExpertStack::GateUp => [2 * self.intermediate_size / self.roles(stack).len(), hidden_size],
            ExpertStack::Down => [hidden_size, self.intermediate_size],
        }
    }

    /// The linears of an expert whose rows a stack holds, in order.
    pub fn roles(&self, stack: ExpertStack) -> &'static [ExpertRole] {
        match (stack, self.activation) {
            (ExpertStack::GateUp, Activation::ClampedSwiglu { .. }) => &[ExpertRole::GateUp],
            (ExpertStack::GateUp, _) => &[ExpertRole::Gate, ExpertRole::Up],
            (ExpertStack::Down, _) => &[ExpertRole::Down],
        }
    }

    /// `[experts, out]` of the biases of a stack.
    pub fn expert_bias_shape(&self, stack: ExpertStack, hidden_size: usize) -> [usize; 2] {
        let [rows, _] = self.stack_shape(stack, hidden_size);
        [self.experts, rows / self.experts]
    }

    /// `[experts · out, in]` of all experts.
    pub fn stack_shape(&self, stack: ExpertStack, hidden_size: usize) -> [usize; 2] {
        let [out, input] = self.expert_shape(stack, hidden_size);
        [self.experts * self.roles(stack).len() * out, input]
    }
}

impl SharedExpertSpec {
    /// The linears that read the normalized input; their outputs are gate and up.
    pub fn inputs(&self, hidden_size: usize) -> Vec<LinearSpec> {
        let linear = |role| LinearSpec::new(role, [self.intermediate_size, hidden_size], false);
        [LinearRole::SharedGate, LinearRole::SharedUp].map(linear).to_vec()
    }

    /// The linear that reads act(gate) ∘ up.
    pub fn output(&self, hidden_size: usize) -> LinearSpec {
        LinearSpec::new(LinearRole::SharedDown, [hidden_size, self.intermediate_size], false)
    }

    /// The linear of the gate on its result, if there is one.
    pub fn gate(&self, hidden_size: usize) -> Option<LinearSpec> {
        self.gated.then(|| LinearSpec::new(LinearRole::SharedExpertGate, [1, hidden_size], false))
    }
}

impl LayerSpec {
    /// The gated feed-forward half, if it is one.
    pub fn gated(&self) -> Option<&GatedSpec> {
        match &self.feed_forward {
            FeedForwardSpec::Gated(gated) => Some(gated),
            FeedForwardSpec::Plain { .. } | FeedForwardSpec::Moe(_) => None,
        }
    }

    /// Returns true if the feed-forward half is a mixture of experts.
    pub fn is_mixture(&self) -> bool {
        matches!(self.feed_forward, FeedForwardSpec::Moe(_))
    }

    /// The layer's linears without those of experts, in the order of the forward pass and in groups that read the same
    /// input.
    pub fn linear_groups(&self, hidden_size: usize) -> Vec<Vec<LinearSpec>> {
        let mut groups = vec![self.mixer.inputs(hidden_size), vec![self.mixer.output(hidden_size)]];
        if let Some(gated) = self.gated() {
            groups.extend([gated.inputs(hidden_size), vec![gated.output(hidden_size)]]);
        }
        if let FeedForwardSpec::Moe(moe) = &self.feed_forward {
            groups.push(vec![moe.router(hidden_size)]);
            if let Some(shared) = &moe.shared {
                groups.extend([shared.inputs(hidden_size), vec![shared.output(hidden_size)]]);
                groups.extend(shared.gate(hidden_size).map(|gate| vec![gate]));
            }
        }
        groups
    }

    /// The layer's linears without those of experts, in the order of the forward pass.
    pub fn linears(&self, hidden_size: usize) -> Vec<LinearSpec> {
        self.linear_groups(hidden_size).into_iter().flatten().collect()
    }
}
