//! Names of tensors and modules in a checkpoint.

use std::borrow::Cow;

use rekindle_lora::LoraConfig;

use crate::parameters::{ExpertRole, ExpertStack, LayerRole, LinearRole, Role};

/// The module names of one family. Defaults are Llama's ([`LLAMA`](Self::LLAMA)).
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorNames {
    pub(crate) embedding: &'static str,
    pub(crate) final_norm: &'static str,
    pub(crate) head: &'static str,
    /// The prefix of a layer's index.
    pub(crate) layers: &'static str,
    pub(crate) pre_attention_norm: &'static str,
    pub(crate) query_norm: &'static str,
    pub(crate) key_norm: &'static str,
    pub(crate) sinks: &'static str,
    pub(crate) post_attention_norm: &'static str,
    pub(crate) pre_feed_forward_norm: &'static str,
    pub(crate) post_feed_forward_norm: &'static str,
    pub(crate) linear: fn(LinearRole) -> &'static str,
    pub(crate) experts: ExpertTensorNames,
    /// Beginnings of names in files with what stands in their place in the model, where the two differ.
    pub(crate) stored: &'static [(&'static str, &'static str)],
    /// Parts of names in files with what stands in their place in the model, where the two differ within layers.
    pub(crate) stored_parts: &'static [(&'static str, &'static str)],
    /// Beginnings of names of tensors that are no part of the decoder. They are written as they were read.
    pub(crate) kept: &'static [&'static str],
}

/// The names of a mixture's experts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertTensorNames {
    /// The module that stands before an expert's index.
    pub(crate) module: &'static str,
    /// An expert's linear.
    pub(crate) linear: fn(ExpertRole) -> &'static str,
    /// The tensors of all experts as one, `[experts, out, in]`, in checkpoints that have them.
    pub(crate) stacked: fn(ExpertStack) -> &'static str,
    /// The name of an expert's gate and up together, which adapters on `target_parameters` are on.
    pub(crate) joined: &'static str,
    /// The biases of all experts, `[experts, out]`.
    pub(crate) bias: fn(ExpertStack) -> &'static str,
    /// True if the tensors of all experts are `[experts, in, out]`.
    pub(crate) transposed: bool,
    /// True if the experts have no tensors of their own in checkpoints of other programs.
    pub(crate) only_stacked: bool,
}

impl TensorNames {
    /// The names of a multimodal checkpoint whose text part has the names `text`.
    pub(super) const fn multimodal(text: Self) -> Self {
        Self {
            embedding: "model.language_model.embed_tokens",
            final_norm: "model.language_model.norm",
            layers: "model.language_model.layers",
            stored: Self::STORED_MULTIMODAL,
            kept: Self::KEPT_MULTIMODAL,
            ..text
        }
    }

    /// Those of `LlamaForCausalLM`, with the fused linears of Phi-3, the post norms of GLM-4 and the mixtures of Qwen.
    pub(crate) const LLAMA: Self = Self {
        embedding: "model.embed_tokens",
        final_norm: "model.norm",
        head: "lm_head",
        layers: "model.layers",
        pre_attention_norm: "input_layernorm",
        query_norm: "self_attn.q_norm",
        key_norm: "self_attn.k_norm",
        sinks: "self_attn.sinks",
        post_attention_norm: "post_self_attn_layernorm",
        pre_feed_forward_norm: "post_attention_layernorm",
        post_feed_forward_norm: "post_mlp_layernorm",
        linear: |role| match role {
            LinearRole::Query => "self_attn.q_proj",
            LinearRole::Key => "self_attn.k_proj",
            LinearRole::Value => "self_attn.v_proj",
            LinearRole::Qkv => "self_attn.qkv_proj",
            LinearRole::Output => "self_attn.o_proj",
            LinearRole::DeltaQkv => "linear_attn.in_proj_qkv",
            LinearRole::DeltaGate => "linear_attn.in_proj_z",
            LinearRole::DeltaBeta => "linear_attn.in_proj_b",
            LinearRole::DeltaDecay => "linear_attn.in_proj_a",
            LinearRole::DeltaOutput => "linear_attn.out_proj",
            LinearRole::Gate => "mlp.gate_proj",
            LinearRole::Up => "mlp.up_proj",
            LinearRole::GateUp => "mlp.gate_up_proj",
            LinearRole::Down => "mlp.down_proj",
            LinearRole::Router => "mlp.gate",
            LinearRole::SharedGate => "mlp.shared_expert.gate_proj",
            LinearRole::SharedUp => "mlp.shared_expert.up_proj",
            LinearRole::SharedDown => "mlp.shared_expert.down_proj",
            LinearRole::SharedExpertGate => "mlp.shared_expert_gate",
        },
        experts: ExpertTensorNames {
            module: "mlp.experts",
            linear: |role| match role {
                ExpertRole::Gate => "gate_proj",
                ExpertRole::Up => "up_proj",
                ExpertRole::GateUp => "gate_up_proj",
                ExpertRole::Down => "down_proj",
            },
            stacked: |stack| match stack {
                ExpertStack::GateUp => "mlp.experts.gate_up_proj",
                ExpertStack::Down => "mlp.experts.down_proj",
            },
            bias: |stack| match stack {
                ExpertStack::GateUp => "mlp.experts.gate_up_proj_bias",
                ExpertStack::Down => "mlp.experts.down_proj_bias",
            },
            joined: "gate_up_proj",
            transposed: false,
            only_stacked: false,
        },
        stored: &[],
        stored_parts: &[],
        kept: &[],
    };

    /// The names that transformers gives the parts of a multimodal model in files: those of its first versions.
    pub(crate) const STORED_MULTIMODAL: &'static [(&'static str, &'static str)] = &[
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ];

    /// The parts of a multimodal model beside the decoder.
    pub(crate) const KEPT_MULTIMODAL: &'static [&'static str] =
        &["model.vision_tower.", "model.multi_modal_projector."];

    /// Returns true if checkpoints have tensors that are no part of the decoder.
    pub(crate) fn has_kept(&self) -> bool {
        !self.kept.is_empty()
    }

    /// Returns `lora` with the modules excluded that are no part of the decoder: PEFT looks for targets among them too.
    pub(crate) fn excluding_kept<'a>(&self, lora: &'a LoraConfig) -> Cow<'a, LoraConfig> {
        if self.kept.is_empty() || lora.exclude_modules.is_some() {
            return Cow::Borrowed(lora);
        }
        let patterns: Vec<String> = self.kept.iter().map(|start| format!("{}.*", start.replace('.', r"\."))).collect();
        Cow::Owned(lora.clone().exclude_modules(patterns.join("|").as_str()))
    }

    /// Returns true for a tensor that is no part of the decoder and is written as it was read.
    pub(crate) fn keeps(&self, name: &str) -> bool {
        self.kept.iter().any(|start| name.starts_with(start))
    }

    /// The full name of a tensor.
    pub(crate) fn tensor(&self, role: Role) -> String {
        let module = self.module(role);
        match role {
            Role::Layer(_, LayerRole::Bias(_)) => format!("{module}.bias"),
            // Parameters of the attention module and of the experts' module themselves.
            Role::Layer(
                _,
                LayerRole::Sinks
                | LayerRole::DecayRate
                | LayerRole::DecayBias
                | LayerRole::OutputScalar
                | LayerRole::Experts(_)
                | LayerRole::ExpertBias(_),
            ) => module,
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
            LayerRole::ShortConv => "linear_attn.conv1d",
            LayerRole::DecayRate => "linear_attn.A_log",
            LayerRole::DecayBias => "linear_attn.dt_bias",
            LayerRole::GatedNorm => "linear_attn.norm",
            LayerRole::OutputScalar => "layer_scalar",
            LayerRole::PostAttentionNorm => self.post_attention_norm,
            LayerRole::PreFeedForwardNorm => self.pre_feed_forward_norm,
            LayerRole::PostFeedForwardNorm => self.post_feed_forward_norm,
            LayerRole::Weight(linear) | LayerRole::Bias(linear) => (self.linear)(linear),
            LayerRole::Experts(stack) => (self.experts.stacked)(stack),
            LayerRole::ExpertBias(stack) => (self.experts.bias)(stack),
            LayerRole::Expert(role, expert) => {
                return format!("{}.{expert}.{}", self.experts(layer), (self.experts.linear)(role));
            }
        };
        format!("{}.{part}", self.layer(layer))
    }

    /// The full name of the module that holds the experts of a layer.
    pub(crate) fn experts(&self, layer: usize) -> String {
        format!("{}.{}", self.layer(layer), self.experts.module)
    }

    /// The full name of a layer.
    pub(crate) fn layer(&self, layer: usize) -> String {
        format!("{}.{layer}", self.layers)
    }
}
