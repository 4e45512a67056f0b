//! The keys that most families share.

use rekindle_rope::RopeConfig;

use super::ConfigReader;
use crate::spec::{
    Activation, AttentionMask, AttentionSpec, EmbeddingSpec, FeedForwardSpec, GatedSpec, HeadSpec, LayerNorms,
    LayerSpec, ModelSpec, NormSpec, RopeId, RotarySpec,
};

/// Sizes and switches under the names that Llama gave them.
pub(crate) struct Dimensions {
    pub(crate) hidden_size: usize,
    pub(crate) intermediate_size: usize,
    pub(crate) num_hidden_layers: usize,
    pub(crate) num_attention_heads: usize,
    pub(crate) num_key_value_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) vocab_size: usize,
    pub(crate) rms_norm_eps: f64,
    pub(crate) tie_word_embeddings: bool,
    /// One entry, or none where it could not be read.
    pub(crate) ropes: Vec<RopeConfig>,
}

/// Values that a family's configuration class has where `config.json` has none.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ClassDefaults {
    /// `None` is `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
    /// `None` is `num_attention_heads`.
    pub(crate) num_key_value_heads: Option<usize>,
    /// `None` is 1e-6.
    pub(crate) rms_norm_eps: Option<f64>,
    pub(crate) tie_word_embeddings: bool,
    /// `None` is 10,000.
    pub(crate) rope_theta: Option<f64>,
}

impl Dimensions {
    /// Reads the sizes, and refuses another activation than SiLU and dropout of attention.
    pub(crate) fn read(config: &mut ConfigReader<'_>, defaults: ClassDefaults) -> Self {
        let hidden_size = config.size("hidden_size", None);
        let num_attention_heads = config.size("num_attention_heads", None);
        let even_share = hidden_size / num_attention_heads.max(1);
        let head_dim = config.size("head_dim", Some(defaults.head_dim.unwrap_or(even_share)));
        let default_kv_heads = defaults.num_key_value_heads.unwrap_or(num_attention_heads);
        let num_key_value_heads = config.size("num_key_value_heads", Some(default_kv_heads));
        if !num_attention_heads.is_multiple_of(num_key_value_heads.max(1)) {
            config.problem(format!(
                "num_attention_heads {num_attention_heads} is no multiple of num_key_value_heads {num_key_value_heads}"
            ));
        }
        config.only("hidden_act", "silu");
        config.only("attention_dropout", 0.0);
        let rms_norm_eps = config.number("rms_norm_eps", defaults.rms_norm_eps.unwrap_or(1e-6));
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            config.problem(format!("rms_norm_eps is {rms_norm_eps}; expected at least 0"));
        }
        Self {
            hidden_size,
            intermediate_size: config.size("intermediate_size", None),
            num_hidden_layers: config.layers(),
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: config.size("vocab_size", None),
            rms_norm_eps,
            tie_word_embeddings: config.flag("tie_word_embeddings", defaults.tie_word_embeddings),
            ropes: config.ropes(head_dim, defaults.rope_theta),
        }
    }

    /// Every norm of the model.
    pub(crate) fn norm(&self) -> NormSpec {
        NormSpec::rms(self.rms_norm_eps)
    }

    /// Full attention with rotary positions, without biases.
    pub(crate) fn attention(&self) -> AttentionSpec {
        let rope = RotarySpec { id: RopeId(0), interleaved: false };
        AttentionSpec::new(self.num_attention_heads, self.num_key_value_heads, self.head_dim, Some(rope))
    }

    /// SwiGLU, without biases.
    pub(crate) fn gated(&self) -> GatedSpec {
        let intermediate_size = self.intermediate_size;
        GatedSpec { intermediate_size, activation: Activation::Silu, fused: false, bias: false }
    }

    /// A layer with norms before both halves.
    pub(crate) fn layer(&self, attention: AttentionSpec, gated: GatedSpec) -> LayerSpec {
        LayerSpec {
            attention,
            feed_forward: FeedForwardSpec::Gated(gated),
            norms: LayerNorms::pre(self.norm()),
            residual_multiplier: None,
            parallel: false,
            output_scalar: false,
        }
    }

    /// A model with a layer for each mask, alike otherwise.
    pub(crate) fn model(self, layer: &LayerSpec, masks: Vec<AttentionMask>) -> ModelSpec {
        let masked = |mask| {
            let attention = AttentionSpec { mask, ..layer.attention.clone() };
            LayerSpec { attention, ..layer.clone() }
        };
        ModelSpec {
            vocab_size: self.vocab_size,
            hidden_size: self.hidden_size,
            embedding: EmbeddingSpec::default(),
            layers: masks.into_iter().map(masked).collect(),
            final_norm: self.norm(),
            head: HeadSpec { tied: self.tie_word_embeddings, multiplier: None, softcap: None },
            ropes: self.ropes,
        }
    }
}
