//! The names and shapes of a model's tensors in a checkpoint.

use crate::ModelConfig;

/// A tensor that the model needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Needed {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
}

pub(crate) const EMBED: &str = "model.embed_tokens.weight";
pub(crate) const NORM: &str = "model.norm.weight";
pub(crate) const HEAD: &str = "lm_head.weight";

/// The module of a weight.
pub(crate) fn module(weight: &str) -> &str {
    weight.trim_end_matches(".weight")
}

/// A linear of one block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    pub(crate) const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Full name of the linear in block `layer`, without `.weight`.
    pub(crate) fn module(self, layer: usize) -> String {
        let part = match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        };
        format!("model.layers.{layer}.{part}")
    }

    /// Whether `name` is the weight of a linear of some block.
    pub(crate) fn is_linear(name: &str) -> bool {
        let parts = name.strip_prefix("model.layers.").and_then(|rest| rest.split_once('.'));
        parts.is_some_and(|(layer, _)| {
            let layer = layer.parse().unwrap_or(usize::MAX);
            Self::ALL.iter().any(|p| name.strip_suffix(".weight") == Some(&p.module(layer)))
        })
    }

    /// `[out, in]`.
    pub(crate) fn shape(self, c: &ModelConfig) -> [usize; 2] {
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        match self {
            Self::Q => [q, c.hidden_size],
            Self::K | Self::V => [kv, c.hidden_size],
            Self::O => [c.hidden_size, q],
            Self::Gate | Self::Up => [c.intermediate_size, c.hidden_size],
            Self::Down => [c.hidden_size, c.intermediate_size],
        }
    }

    pub(crate) fn has_bias(self, c: &ModelConfig) -> bool {
        match self {
            Self::Q | Self::K | Self::V => c.biases.qkv,
            Self::O => c.biases.o,
            Self::Gate | Self::Up | Self::Down => c.biases.mlp,
        }
    }
}

/// A norm of one block.
pub(crate) fn norm(layer: usize, name: &str) -> String {
    format!("model.layers.{layer}.{name}.weight")
}

/// Every tensor of the model, in the order of the forward pass.
pub(crate) fn needed(c: &ModelConfig) -> Vec<Needed> {
    let mut list = Vec::new();
    let mut push = |name: String, shape: &[usize]| list.push(Needed { name, shape: shape.to_vec() });
    push(EMBED.to_owned(), &[c.vocab_size, c.hidden_size]);
    for layer in 0..c.num_hidden_layers {
        push(norm(layer, "input_layernorm"), &[c.hidden_size]);
        for projection in Projection::ALL {
            let shape = projection.shape(c);
            let module = projection.module(layer);
            push(format!("{module}.weight"), &shape);
            if projection.has_bias(c) {
                push(format!("{module}.bias"), &shape[..1]);
            }
        }
        if c.qk_norm {
            push(norm(layer, "self_attn.q_norm"), &[c.head_dim]);
            push(norm(layer, "self_attn.k_norm"), &[c.head_dim]);
        }
        push(norm(layer, "post_attention_layernorm"), &[c.hidden_size]);
    }
    push(NORM.to_owned(), &[c.hidden_size]);
    if !c.tie_word_embeddings {
        push(HEAD.to_owned(), &[c.vocab_size, c.hidden_size]);
    }
    list
}
