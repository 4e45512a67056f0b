//! The names of tensors.

/// The part of a decoder that a tensor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum GgufPart {
    /// The embedding table.
    Embedding,
    /// The norm after the last layer.
    OutputNorm,
    /// The output layer.
    Output,
    /// The norm before attention.
    AttentionNorm(usize),
    /// Queries.
    Query(usize),
    /// Keys.
    Key(usize),
    /// Values.
    Value(usize),
    /// Queries, keys and values as one linear.
    QueryKeyValue(usize),
    /// The result of attention.
    AttentionOutput(usize),
    /// The norm of queries.
    QueryNorm(usize),
    /// The norm of keys.
    KeyNorm(usize),
    /// The logits of attention's sinks.
    Sinks(usize),
    /// The norm of attention's result.
    PostAttentionNorm(usize),
    /// The norm before the feed-forward half.
    FeedForwardNorm(usize),
    /// The gate of the feed-forward half.
    Gate(usize),
    /// The linear that the gate multiplies, or both as one.
    Up(usize),
    /// Back to the residual stream.
    Down(usize),
    /// The norm of the feed-forward half's result.
    PostFeedForwardNorm(usize),
    /// The router of a mixture.
    Router(usize),
    /// The gates of all experts, stacked.
    ExpertGates(usize),
    /// The linears that these gates multiply, stacked.
    ExpertUps(usize),
    /// Back to the residual stream from all experts, stacked.
    ExpertDowns(usize),
    /// The gate of the expert that every token uses.
    SharedGate(usize),
    /// The linear that this gate multiplies.
    SharedUp(usize),
    /// Back to the residual stream from this expert.
    SharedDown(usize),
    /// The gate on the result of this expert.
    SharedExpertGate(usize),
    /// The gate on the result of linear attention.
    AttentionGate(usize),
    /// The convolution before linear attention.
    ShortConvolution(usize),
    /// The rates of its decays, which have no kind.
    DecayRate(usize),
    /// The addend of its decays' inputs.
    DecayBias(usize),
    /// The inputs of its decays.
    DecayInput(usize),
    /// The strengths of its updates.
    UpdateStrength(usize),
    /// The norm of its result.
    DeltaNorm(usize),
    /// Its result.
    DeltaOutput(usize),
}

impl GgufPart {
    /// Returns the name of the tensor; `kind` is `weight` or `bias`.
    pub fn tensor_name(self, kind: &str) -> String {
        let (layer, name) = match self {
            Self::Embedding => return format!("token_embd.{kind}"),
            Self::OutputNorm => return format!("output_norm.{kind}"),
            Self::Output => return format!("output.{kind}"),
            Self::AttentionNorm(layer) => (layer, "attn_norm"),
            Self::Query(layer) => (layer, "attn_q"),
            Self::Key(layer) => (layer, "attn_k"),
            Self::Value(layer) => (layer, "attn_v"),
            Self::QueryKeyValue(layer) => (layer, "attn_qkv"),
            Self::AttentionOutput(layer) => (layer, "attn_output"),
            Self::QueryNorm(layer) => (layer, "attn_q_norm"),
            Self::KeyNorm(layer) => (layer, "attn_k_norm"),
            Self::Sinks(layer) => (layer, "attn_sinks"),
            Self::PostAttentionNorm(layer) => (layer, "post_attention_norm"),
            Self::FeedForwardNorm(layer) => (layer, "ffn_norm"),
            Self::Gate(layer) => (layer, "ffn_gate"),
            Self::Up(layer) => (layer, "ffn_up"),
            Self::Down(layer) => (layer, "ffn_down"),
            Self::PostFeedForwardNorm(layer) => (layer, "post_ffw_norm"),
            Self::Router(layer) => (layer, "ffn_gate_inp"),
            Self::ExpertGates(layer) => (layer, "ffn_gate_exps"),
            Self::ExpertUps(layer) => (layer, "ffn_up_exps"),
            Self::ExpertDowns(layer) => (layer, "ffn_down_exps"),
            Self::SharedGate(layer) => (layer, "ffn_gate_shexp"),
            Self::SharedUp(layer) => (layer, "ffn_up_shexp"),
            Self::SharedDown(layer) => (layer, "ffn_down_shexp"),
            Self::SharedExpertGate(layer) => (layer, "ffn_gate_inp_shexp"),
            Self::AttentionGate(layer) => (layer, "attn_gate"),
            Self::ShortConvolution(layer) => (layer, "ssm_conv1d"),
            Self::DecayRate(layer) => return format!("blk.{layer}.ssm_a"),
            Self::DecayBias(layer) => (layer, "ssm_dt"),
            Self::DecayInput(layer) => (layer, "ssm_alpha"),
            Self::UpdateStrength(layer) => (layer, "ssm_beta"),
            Self::DeltaNorm(layer) => (layer, "ssm_norm"),
            Self::DeltaOutput(layer) => (layer, "ssm_out"),
        };
        format!("blk.{layer}.{name}.{kind}")
    }
}
