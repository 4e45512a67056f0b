//! The keys that most families share.

use rekindle_rope::RopeConfig;

use super::ConfigReader;
use crate::spec::{
    Activation, AttentionMask, AttentionSpec, EmbeddingSpec, FeedForwardSpec, GatedSpec, HeadSpec, LayerNorms,
    LayerSpec, MixerSpec, ModelSpec, NormSpec, NormWeight, RopeId, RotarySpec,
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
    pub(crate) norm_weight: NormWeight,
    pub(crate) activation: Activation,
    pub(crate) tie_word_embeddings: bool,
    /// One entry, or none where it could not be read.
    pub(crate) ropes: Vec<RopeConfig>,
}

/// Values that a family's configuration class has where `config.json` has none.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ClassDefaults {
    /// `None` for a class whose files always have it.
    pub(crate) hidden_size: Option<usize>,
    /// `None` for a class whose files always have it.
    pub(crate) intermediate_size: Option<usize>,
    /// `None` for a class whose files always have it.
    pub(crate) num_hidden_layers: Option<usize>,
    /// `None` for a class whose files always have it.
    pub(crate) num_attention_heads: Option<usize>,
    /// `None` is `hidden_size / num_attention_heads`.
    pub(crate) head_dim: Option<usize>,
    /// `None` is `num_attention_heads`.
    pub(crate) num_key_value_heads: Option<usize>,
    /// `None` for a class whose files always have it.
    pub(crate) vocab_size: Option<usize>,
    pub(crate) max_position_embeddings: usize,
    pub(crate) rms_norm_eps: f64,
    /// The form of the norms' weights; `config.json` does not state it.
    pub(crate) norm_weight: NormWeight,
    /// The nonlinearity, the only one of the class.
    pub(crate) activation: Activation,
    pub(crate) tie_word_embeddings: bool,
    /// `None` is 10,000.
    pub(crate) rope_theta: Option<f64>,
    /// `None` is 1.
    pub(crate) partial_rotary_factor: Option<f64>,
}

impl Default for ClassDefaults {
    /// Those of most classes.
    fn default() -> Self {
        Self {
            hidden_size: None,
            intermediate_size: None,
            num_hidden_layers: None,
            num_attention_heads: None,
            head_dim: None,
            num_key_value_heads: None,
            vocab_size: None,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            norm_weight: NormWeight::Plain,
            activation: Activation::Silu,
            tie_word_embeddings: false,
            rope_theta: None,
            partial_rotary_factor: None,
        }
    }
}

impl Dimensions {
    /// Reads the sizes and the rotary embedding, and refuses another activation than the class's and dropout of attention.
    pub(crate) fn read(config: &mut ConfigReader<'_>, defaults: ClassDefaults) -> Self {
        let dimensions = Self::without_ropes(config, defaults);
        let ropes = config.ropes(dimensions.head_dim, defaults.rope_theta, defaults.partial_rotary_factor);
        Self { ropes, ..dimensions }
    }

    /// [`read`](Self::read) for a family with several rotary embeddings.
    pub(crate) fn without_ropes(config: &mut ConfigReader<'_>, defaults: ClassDefaults) -> Self {
        config.set_default_positions(defaults.max_position_embeddings);
        let hidden_size = config.size("hidden_size", defaults.hidden_size);
        let num_attention_heads = config.size("num_attention_heads", defaults.num_attention_heads);
        let even_share = hidden_size / num_attention_heads.max(1);
        let head_dim = config.size("head_dim", Some(defaults.head_dim.unwrap_or(even_share)));
        let default_kv_heads = defaults.num_key_value_heads.unwrap_or(num_attention_heads);
        let num_key_value_heads = config.size("num_key_value_heads", Some(default_kv_heads));
        if !num_attention_heads.is_multiple_of(num_key_value_heads.max(1)) {
            config.problem(format!(
                "num_attention_heads {num_attention_heads} is not a multiple of num_key_value_heads \
                 {num_key_value_heads}"
            ));
        }
        match defaults.activation {
            // Older files have another entry in `hidden_act`, which transformers does not read.
            Activation::GeluTanh => config.only("hidden_activation", "gelu_pytorch_tanh"),
            _ => config.only("hidden_act", "silu"),
        }
        config.only("attention_dropout", 0.0);
        let rms_norm_eps = config.number("rms_norm_eps", defaults.rms_norm_eps);
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            config.problem(format!("rms_norm_eps is {rms_norm_eps}; expected at least 0"));
        }
        Self {
            hidden_size,
            intermediate_size: config.size("intermediate_size", defaults.intermediate_size),
            num_hidden_layers: config.layers(defaults.num_hidden_layers),
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size: config.size("vocab_size", defaults.vocab_size),
            rms_norm_eps,
            norm_weight: defaults.norm_weight,
            activation: defaults.activation,
            tie_word_embeddings: config.flag("tie_word_embeddings", defaults.tie_word_embeddings),
            ropes: Vec::new(),
        }
    }

    /// Every norm of the model.
    pub(crate) fn norm(&self) -> NormSpec {
        NormSpec { weight: self.norm_weight, ..NormSpec::rms(self.rms_norm_eps) }
    }

    /// Full attention with rotary positions, without biases.
    pub(crate) fn attention(&self) -> AttentionSpec {
        let rope = RotarySpec { id: RopeId(0), interleaved: false };
        AttentionSpec::new(self.num_attention_heads, self.num_key_value_heads, self.head_dim, Some(rope))
    }

    /// The gated half with the class's activation, without biases.
    pub(crate) fn gated(&self) -> GatedSpec {
        let Self { intermediate_size, activation, .. } = *self;
        GatedSpec { intermediate_size, activation, fused: false, bias: false }
    }

    /// A layer with norms before both halves.
    pub(crate) fn layer(&self, attention: AttentionSpec, gated: GatedSpec) -> LayerSpec {
        LayerSpec {
            mixer: MixerSpec::Attention(attention),
            feed_forward: FeedForwardSpec::Gated(gated),
            norms: LayerNorms::pre(self.norm()),
            residual_multiplier: None,
            parallel: false,
            output_scalar: false,
        }
    }

    /// A model whose sliding layers have a window and the second rotary embedding, and whose other layers have the first.
    pub(crate) fn model_by_layer_type(self, layer: &LayerSpec, sliding: &[bool], window: AttentionMask) -> ModelSpec {
        let masks = sliding.iter().map(|&sliding| if sliding { window } else { AttentionMask::Full }).collect();
        let mut model = self.model(layer, masks);
        for (layer, &sliding) in model.layers.iter_mut().zip(sliding) {
            let id = RopeId(usize::from(sliding));
            if let Some(attention) = layer.attention_mut() {
                attention.rope = attention.rope.map(|rope| RotarySpec { id, ..rope });
            }
        }
        model
    }

    /// A model with a layer for each mask, alike otherwise.
    pub(crate) fn model(self, layer: &LayerSpec, masks: Vec<AttentionMask>) -> ModelSpec {
        let masked = |mask| {
            let mut layer = layer.clone();
            if let Some(attention) = layer.attention_mut() {
                attention.mask = mask;
            }
            layer
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
