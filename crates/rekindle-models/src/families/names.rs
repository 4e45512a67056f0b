//! Names of tensors and modules in a checkpoint.

use crate::parameters::{LayerRole, LinearRole, Role};

/// The module names of one family. Defaults are Llama's ([`LLAMA`](Self::LLAMA)).
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorNames {
    pub(crate) embedding: &'static str,
    pub(crate) final_norm: &'static str,
    pub(crate) head: &'static str,
    /// What stands before a layer's index.
    pub(crate) layers: &'static str,
    pub(crate) pre_attention_norm: &'static str,
    pub(crate) query_norm: &'static str,
    pub(crate) key_norm: &'static str,
    pub(crate) sinks: &'static str,
    pub(crate) pre_feed_forward_norm: &'static str,
    pub(crate) linear: fn(LinearRole) -> &'static str,
}

impl TensorNames {
    /// Those of `LlamaForCausalLM`, with the fused linears of Phi-3.
    pub(crate) const LLAMA: Self = Self {
        embedding: "model.embed_tokens",
        final_norm: "model.norm",
        head: "lm_head",
        layers: "model.layers",
        pre_attention_norm: "input_layernorm",
        query_norm: "self_attn.q_norm",
        key_norm: "self_attn.k_norm",
        sinks: "self_attn.sinks",
        pre_feed_forward_norm: "post_attention_layernorm",
        linear: |role| match role {
            LinearRole::Query => "self_attn.q_proj",
            LinearRole::Key => "self_attn.k_proj",
            LinearRole::Value => "self_attn.v_proj",
            LinearRole::Qkv => "self_attn.qkv_proj",
            LinearRole::Output => "self_attn.o_proj",
            LinearRole::Gate => "mlp.gate_proj",
            LinearRole::Up => "mlp.up_proj",
            LinearRole::GateUp => "mlp.gate_up_proj",
            LinearRole::Down => "mlp.down_proj",
        },
    };

    /// The full name of a tensor.
    pub(crate) fn tensor(&self, role: Role) -> String {
        let module = self.module(role);
        match role {
            Role::Layer(_, LayerRole::Bias(_)) => format!("{module}.bias"),
            // A parameter of the attention module itself.
            Role::Layer(_, LayerRole::Sinks) => module,
            _ => format!("{module}.weight"),
        }
    }

    /// The full name of the module that a tensor belongs to.
    pub(crate) fn module(&self, role: Role) -> String {
        let (layer, part) = match role {
            Role::Embedding => return self.embedding.to_owned(),
            Role::FinalNorm => return self.final_norm.to_owned(),
            Role::Head => return self.head.to_owned(),
            Role::Layer(layer, part) => (layer, part),
        };
        let part = match part {
            LayerRole::PreAttentionNorm => self.pre_attention_norm,
            LayerRole::QueryNorm => self.query_norm,
            LayerRole::KeyNorm => self.key_norm,
            LayerRole::Sinks => self.sinks,
            LayerRole::PreFeedForwardNorm => self.pre_feed_forward_norm,
            LayerRole::Weight(linear) | LayerRole::Bias(linear) => (self.linear)(linear),
        };
        format!("{}.{part}", self.layer(layer))
    }

    /// The full name of a layer.
    pub(crate) fn layer(&self, layer: usize) -> String {
        format!("{}.{layer}", self.layers)
    }
}
