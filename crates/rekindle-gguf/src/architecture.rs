//! Architectures of llama.cpp: the names of tensors, the metadata that describes a decoder, and the limits of both.
//!
//! A family is one row of `rows.rs`. Tensors are named by their place in the decoder, which gives the same
//! names in every architecture.

mod describe;
mod part;
mod read;
mod rows;

pub use part::GgufPart;

use self::rows::ARCHITECTURES;
use crate::{Error, MetadataValue};

/// A decoder, as metadata describes it. Values are those of the original model.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufDecoder {
    /// Number of token ids.
    pub vocab_size: u64,
    /// Tokens that the model was trained for.
    pub context_length: u64,
    /// Width of the residual stream.
    pub embedding_length: u64,
    /// Width of the feed-forward half; of an expert in a mixture.
    pub feed_forward_length: u64,
    /// The mixture of experts in every layer; `None` for a dense model.
    pub experts: Option<GgufExperts>,
    /// Linear attention, in the layers that have it.
    pub delta: Option<GgufDelta>,
    /// Query heads.
    pub heads: u64,
    /// Key/value heads.
    pub kv_heads: u64,
    /// Channels of a head.
    pub head_dim: u64,
    /// The constant in norms.
    pub norm_epsilon: f64,
    /// True if both halves of a layer have the result of one LayerNorm as their input (Cohere 2).
    pub is_parallel: bool,
    /// True if the output layer is the embedding table.
    pub is_tied: bool,
    /// True if the linears of attention have biases.
    pub has_attention_biases: bool,
    /// The factor on attention scores.
    pub attention_scale: f64,
    /// c in c·tanh(scores / c).
    pub attention_softcap: Option<f64>,
    /// c in c·tanh(logits / c).
    pub logit_softcap: Option<f64>,
    /// A factor on embeddings.
    pub embedding_scale: Option<f64>,
    /// A factor on what each half adds to the residual stream.
    pub residual_scale: Option<f64>,
    /// A factor on logits.
    pub logit_multiplier: Option<f64>,
    /// β and w of queries that grow as 1 + β·ln(1 + ⌊position / w⌋).
    pub query_growth: Option<(f64, u64)>,
    /// The layers.
    pub layers: Vec<GgufLayer>,
    /// The rotary embeddings that layers refer to.
    pub ropes: Vec<GgufRope>,
}

/// A mixture of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufExperts {
    /// Number of experts.
    pub count: u64,
    /// Experts for each token.
    pub used: u64,
    /// Width of the expert that every token uses, if there is one.
    pub shared_feed_forward_length: Option<u64>,
    /// True if the weights of the chosen experts sum to 1.
    pub normalizes: bool,
    /// True for gpt-oss's experts: with biases, and a SwiGLU whose gate has the slope 1.702 and the bound 7.
    pub is_clamped: bool,
}

/// Linear attention by the gated delta rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufDelta {
    /// Heads of queries and keys.
    pub key_heads: u64,
    /// Heads of values; a multiple of `key_heads`.
    pub value_heads: u64,
    /// Channels of a query or key.
    pub key_dim: u64,
    /// Channels of a value.
    pub value_dim: u64,
    /// Taps of the convolution.
    pub conv_width: u64,
}

/// A layer of a decoder.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GgufLayer {
    /// Keys that a query sees; `None` for all.
    pub window: Option<u64>,
    /// The index of its rotary embedding; `None` for a layer without positions.
    pub rope: Option<usize>,
    /// True for a layer of linear attention, which has neither a window nor positions.
    pub is_linear: bool,
}

/// A rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufRope {
    /// The base of the frequencies.
    pub base: f64,
    /// Channels of a head that rotate.
    pub dimensions: u64,
    /// The change of the frequencies.
    pub scaling: GgufRopeScaling,
}

/// A change of rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum GgufRopeScaling {
    /// No change.
    None,
    /// All frequencies are divided by a factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// YaRN.
    Yarn {
        /// The factor.
        factor: f64,
        /// The context length before the extension.
        original: u64,
        /// The factor on rotated queries and keys.
        attention_factor: f64,
        /// Rotations at which interpolation begins.
        beta_fast: f64,
        /// Rotations at which interpolation is complete.
        beta_slow: f64,
        /// True if the dimensions between which it changes are rounded.
        truncate: bool,
    },
    /// Each frequency is divided by a factor of its own (Llama 3).
    Divisors(Vec<f32>),
    /// Divisors for short and for long contexts (LongRoPE).
    Long {
        /// Divisors up to the original context length.
        short: Vec<f32>,
        /// Divisors beyond it.
        long: Vec<f32>,
        /// The context length before the extension.
        original: u64,
        /// The factor on rotated queries and keys.
        attention_factor: f64,
    },
}

/// Layers with a window.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Windows {
    /// llama.cpp ignores windows: texts up to the window's length have the same result.
    Ignored,
    /// The file lists the layers with a window.
    Listed,
    /// As listed, in models of 64 layers; others have none.
    ListedIn64Layers,
}

/// Layers with rotary positions.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rotation {
    /// All of them.
    All,
    /// All but every layer with this number.
    AllButEvery(usize),
    /// Those with a window.
    Windowed,
    /// Those with a window in models with windows, and all in others.
    WindowedIfAny,
}

/// The factors on embeddings, residuals and logits that a file has.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Factors {
    /// None.
    None,
    /// Those on embeddings and residuals, and the divisor of logits.
    All,
    /// The one on logits.
    Logits,
}

/// The factor on attention scores.
#[derive(Clone, Copy, PartialEq, Eq)]
enum AttentionScale {
    /// 1 / √head_dim.
    HeadDim,
    /// The file has it.
    Stored,
    /// 1 / √(embedding_length / heads) in models of this many layers, otherwise 1 / √head_dim.
    Gemma(usize),
}

/// The mixtures of experts that an architecture computes. Files do not say if the weights of chosen experts are normalized.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mixtures {
    /// Dense models only.
    None,
    /// Experts of the width of a dense feed-forward half, with weights that sum to 1.
    Mixtral,
    /// Experts of a width of their own; `true` if their weights sum to 1.
    Qwen(bool),
    /// gpt-oss's, with weights that sum to 1.
    GptOss,
}

/// An architecture of llama.cpp.
#[derive(Clone, Copy)]
pub struct GgufArchitecture {
    /// The value of `model_type` in a `config.json`.
    model_type: &'static str,
    /// The value of `general.architecture`.
    name: &'static str,
    /// True if channels 2i and 2i + 1 of queries and keys rotate together.
    rotates_pairs: bool,
    windows: Windows,
    attention_scale: AttentionScale,
    /// True if the file can divide each frequency by a factor of its own.
    has_divisors: bool,
    rotation: Rotation,
    factors: Factors,
    mixtures: Mixtures,
    /// True if every token uses an expert beside the chosen ones.
    has_shared_expert: bool,
    /// True if layers without positions may have linear attention, and rotary dimensions are listed by axis (Qwen3.5).
    has_linear_layers: bool,
    /// True if the norm before the feed-forward half has the name of the one after attention.
    names_post_attention_norm: bool,
    /// True if layers with a window have the scaled rotary positions of the others.
    scales_windowed: bool,
    /// True for layers with one LayerNorm before both halves, without biases, and with the embedding table as the output
    /// layer.
    is_parallel: bool,
}

/// The description of a decoder in a file.
#[derive(Clone, Debug, PartialEq)]
pub struct GgufDescription {
    /// Keys and values.
    pub metadata: Vec<(String, MetadataValue)>,
    /// Vectors beside the model's own tensors: divisors of rotary frequencies.
    pub vectors: Vec<(String, Vec<f32>)>,
    /// Differences that llama.cpp's computation has, as sentences for a user.
    pub notices: Vec<String>,
}

impl GgufArchitecture {
    /// Returns the architecture of a `model_type` of a `config.json`.
    ///
    /// # Errors
    /// [`Error::Model`] for a family that has none here.
    pub fn of_model_type(model_type: &str) -> Result<Self, Error> {
        let found = ARCHITECTURES.iter().find(|architecture| architecture.model_type == model_type);
        found.copied().ok_or_else(|| {
            let names: Vec<_> = ARCHITECTURES.iter().map(|architecture| architecture.model_type).collect();
            let names = names.join(", ");
            Error::Model(format!("models of type \"{model_type}\" cannot be exported to GGUF; supported: {names}"))
        })
    }

    /// Returns the value of `model_type` in a `config.json`.
    pub fn model_type(&self) -> &'static str {
        self.model_type
    }

    /// Returns the value of `general.architecture`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Returns true if the decoder is one that llama.cpp counts as 70B.
    pub fn is_70b(&self, decoder: &GgufDecoder) -> bool {
        let has_groups = self.name == "qwen2" || decoder.heads != decoder.kv_heads;
        ["llama", "qwen2"].contains(&self.name) && decoder.layers.len() == 80 && has_groups
    }

    /// Returns true if channels 2i and 2i + 1 of queries and keys rotate together. The rows of a model whose halves
    /// rotate together are permuted then ([`interleave_rows`]).
    pub fn rotates_pairs(&self) -> bool {
        self.rotates_pairs
    }

    /// Returns the norm before the feed-forward half of a layer.
    pub fn feed_forward_norm(&self, layer: usize) -> GgufPart {
        if self.names_post_attention_norm {
            GgufPart::PostAttentionNorm(layer)
        } else {
            GgufPart::FeedForwardNorm(layer)
        }
    }

    /// Returns the key of the constant in norms.
    fn epsilon_key(&self) -> &'static str {
        if self.is_parallel { "attention.layer_norm_epsilon" } else { "attention.layer_norm_rms_epsilon" }
    }

    /// Returns true if a layer has rotary positions, in a model with windows or without.
    fn rotates(&self, layer: usize, is_windowed: bool, has_windows: bool) -> bool {
        match self.rotation {
            Rotation::All => true,
            Rotation::AllButEvery(step) => !(layer + 1).is_multiple_of(step),
            Rotation::Windowed => is_windowed,
            Rotation::WindowedIfAny => is_windowed || !has_windows,
        }
    }

    /// Returns the metadata of a decoder.
    ///
    /// # Errors
    /// [`Error::Model`] for a decoder that llama.cpp's architecture of this name does not compute.
    pub fn describe(&self, decoder: &GgufDecoder) -> Result<GgufDescription, Error> {
        describe::description(self, decoder)
    }
}

/// Returns the source row of each row of queries or keys whose halves rotate together, for a rotation of pairs: row 2i of
/// a head is its row i, and row 2i + 1 its row i + head_dim / 2.
pub fn interleave_rows(rows: usize, head_dim: usize) -> impl Iterator<Item = usize> {
    let half = head_dim / 2;
    (0..rows).map(move |row| {
        let (head, at) = (row / head_dim, row % head_dim);
        head * head_dim + at % 2 * half + at / 2
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoder() -> GgufDecoder {
        GgufDecoder {
            vocab_size: 100,
            context_length: 256,
            embedding_length: 64,
            feed_forward_length: 96,
            experts: None,
            delta: None,
            heads: 4,
            kv_heads: 2,
            head_dim: 16,
            norm_epsilon: 1e-6,
            is_parallel: false,
            is_tied: true,
            has_attention_biases: false,
            attention_scale: 0.25,
            attention_softcap: None,
            logit_softcap: None,
            embedding_scale: None,
            residual_scale: None,
            logit_multiplier: None,
            query_growth: None,
            layers: vec![GgufLayer { window: None, rope: Some(0), is_linear: false }; 4],
            ropes: vec![GgufRope { base: 1e4, dimensions: 16, scaling: GgufRopeScaling::None }],
        }
    }

    fn describe(model_type: &str, decoder: &GgufDecoder) -> Result<GgufDescription, String> {
        let architecture = GgufArchitecture::of_model_type(model_type).map_err(|error| error.to_string())?;
        architecture.describe(decoder).map_err(|error| error.to_string())
    }

    #[test]
    fn what_llama_cpp_does_not_compute_is_refused() {
        assert!(
            describe("bert", &decoder()).unwrap_err().contains("\"bert\" cannot be exported to GGUF; supported: llama")
        );
        let window = GgufDecoder {
            layers: vec![GgufLayer { window: Some(8), rope: Some(0), is_linear: false }; 4],
            ..decoder()
        };
        let long = GgufRopeScaling::Long { short: vec![], long: vec![], original: 8, attention_factor: 1.0 };
        let divisors = GgufRopeScaling::Divisors(vec![1.0; 8]);
        let scaled = |scaling: GgufRopeScaling| {
            let ropes = vec![GgufRope { scaling, ..decoder().ropes.remove(0) }];
            GgufDecoder { ropes, ..decoder() }
        };
        let delta = Some(GgufDelta { key_heads: 2, value_heads: 4, key_dim: 16, value_dim: 32, conv_width: 4 });
        let mut linear = GgufDecoder { delta, ..decoder() };
        linear.layers[0] = GgufLayer { window: None, rope: None, is_linear: true };
        let wide_values = linear.clone();
        let parallel = GgufDecoder { is_parallel: true, ..decoder() };
        let cases = [
            ("qwen3", GgufDecoder { attention_scale: 0.5, ..decoder() }, "multiplied with 0.5 instead of 0.25"),
            ("qwen3", GgufDecoder { attention_softcap: Some(50.0), ..decoder() }, "capped at 50"),
            ("llama", GgufDecoder { logit_softcap: Some(30.0), ..decoder() }, "logits are capped at 30"),
            ("llama", GgufDecoder { residual_scale: Some(0.5), ..decoder() }, "multiplied with a factor"),
            ("gemma2", decoder(), "not capped"),
            ("exaone4", window.clone(), "not 64 layers"),
            ("smollm3", decoder(), "layer 3 has positions"),
            ("qwen3", scaled(divisors), "llama3"),
            ("llama", scaled(long), "longrope"),
            ("llama", GgufDecoder { query_growth: Some((0.1, 8)), ..decoder() }, "queries grow"),
            ("glm", GgufDecoder { embedding_length: 80, ..decoder() }, "heads have 64 channels and the embedding 80"),
            ("qwen3_5", wide_values, "values of 32 channels and keys of 16"),
            ("qwen3", linear, "layer 0 has linear attention"),
            ("cohere2", decoder(), "the halves of layers do not have one LayerNorm before them"),
            ("llama", parallel.clone(), "the halves of layers have one LayerNorm before them"),
            ("cohere2", GgufDecoder { is_tied: false, ..parallel.clone() }, "is not the embedding table"),
            ("cohere2", GgufDecoder { has_attention_biases: true, ..parallel.clone() }, "attention have biases"),
            ("cohere2", parallel, "layer 0 has positions"),
        ];
        for (model_type, decoder, expected) in cases {
            let error = describe(model_type, &decoder).unwrap_err();
            assert!(error.contains(expected), "{error}");
        }
        let notices = describe("mistral", &window).unwrap().notices;
        assert!(notices[0].contains("ignores the attention window of 8 tokens"), "{notices:?}");
    }

    #[test]
    fn metadata_has_the_architectures_name() {
        let granite = GgufDecoder { logit_multiplier: Some(0.125), attention_scale: 0.1, ..decoder() };
        let found = describe("granite", &granite).unwrap().metadata;
        let get = |key: &str| found.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone());
        assert_eq!(get("granite.logit_scale"), Some(8.0_f32.into()));
        assert_eq!(get("granite.attention.scale"), Some(0.1_f32.into()));
        assert_eq!(get("granite.block_count"), Some(4_u32.into()));
    }

    #[test]
    fn halves_become_pairs() {
        let order: Vec<_> = interleave_rows(8, 4).collect();
        assert_eq!(order, [0, 2, 1, 3, 4, 6, 5, 7]);
    }
}
