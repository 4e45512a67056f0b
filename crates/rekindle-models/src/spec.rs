//! A decoder as data: everything in which architectures differ.
//!
//! `families` turns a `config.json` into a [`ModelSpec`]; [`layers`](crate::layers) and
//! `decoder` compute what it says. The spec can describe more than the operations of this version
//! compute: [`ModelSpec::unsupported`] lists the difference, and loading refuses a model with that list.
//!
//! # Residual stream
//! With norms N₁ … N₄ where they are present, attention A, feed-forward F and residual multiplier m, a layer computes
//! h = x + m·N₂(A(N₁(x))), y = h + m·N₄(F(N₃(h))).

mod linears;
mod unsupported;

pub use linears::LinearSpec;
pub use rekindle_kernels::routing::RoutingForm;
use rekindle_rope::RopeConfig;

/// A decoder with its embedding and head.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Number of token ids.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// The embedding of token ids.
    pub embedding: EmbeddingSpec,
    /// The layers in order.
    pub layers: Vec<LayerSpec>,
    /// The norm after the last layer.
    pub final_norm: NormSpec,
    /// The output layer.
    pub head: HeadSpec,
    /// The rotary position embeddings that layers refer to by [`RopeId`].
    pub ropes: Vec<RopeConfig>,
}

/// Index into [`ModelSpec::ropes`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RopeId(pub usize);

/// The embedding of token ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct EmbeddingSpec {
    /// A factor on the rows of the table (Granite's `embedding_multiplier`, Gemma's √hidden_size).
    pub multiplier: Option<f64>,
    /// True if the multiplier is a part of the embedding and rounded to the dtype of the table, as Gemma's is.
    pub rounds_multiplier: bool,
    /// Width of the embedding that each layer mixes in besides its input (Gemma 4 E2B and E4B).
    pub per_layer_input: Option<usize>,
}

/// The output layer: logits = softcap(n·Wᵀ · multiplier).
#[derive(Clone, Debug, PartialEq)]
pub struct HeadSpec {
    /// True if W is the embedding table.
    pub tied: bool,
    /// A factor on the logits (Granite divides by `logits_scaling`, Cohere multiplies with `logit_scale`).
    pub multiplier: Option<f64>,
    /// c in c·tanh(logits / c) (Gemma 2: 30).
    pub softcap: Option<f64>,
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerSpec {
    /// The half that looks across tokens.
    pub mixer: MixerSpec,
    /// The feed-forward half.
    pub feed_forward: FeedForwardSpec,
    /// The norms around both.
    pub norms: LayerNorms,
    /// A factor on what each half adds to the residual stream (Granite's `residual_multiplier`).
    pub residual_multiplier: Option<f64>,
    /// True if both halves read the same normalized input and are added at once (Cohere).
    pub parallel: bool,
    /// True if the layer's output is multiplied with a stored scalar (Gemma 4's `layer_scalar`).
    pub output_scalar: bool,
}

/// The half of a layer that looks across tokens.
#[derive(Clone, Debug, PartialEq)]
#[allow(clippy::large_enum_variant, reason = "one for each layer")]
pub enum MixerSpec {
    /// Softmax attention.
    Attention(AttentionSpec),
    /// Linear attention by the gated delta rule (Qwen3-Next, Qwen3.5).
    GatedDelta(GatedDeltaSpec),
}

/// A gated delta layer.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GatedDeltaSpec {
    /// Heads of queries and keys.
    pub key_heads: usize,
    /// Heads of values; a multiple of `key_heads`.
    pub value_heads: usize,
    /// Channels of a query or key.
    pub key_dim: usize,
    /// Channels of a value.
    pub value_dim: usize,
    /// Taps of the convolution on queries, keys and values.
    pub conv_width: usize,
    /// Added to the mean square in the gated norm.
    pub eps: f64,
}

/// The norms of a layer.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerNorms {
    /// The norm before attention (`input_layernorm` of Llama).
    pub pre_attention: Option<NormSpec>,
    /// The norm of attention's result, before the residual addition.
    pub post_attention: Option<NormSpec>,
    /// The norm before the feed-forward half (`post_attention_layernorm` of Llama).
    pub pre_feed_forward: Option<NormSpec>,
    /// The norm of the feed-forward half's result, before the residual addition.
    pub post_feed_forward: Option<NormSpec>,
}

/// A norm over the last axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NormSpec {
    /// The statistic that rows are divided by.
    pub kind: NormKind,
    /// Added to the mean square or the variance.
    pub eps: f64,
    /// The learned factor.
    pub weight: NormWeight,
}

/// The statistic of a norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    /// Root of the mean square.
    Rms,
    /// Mean and variance, without a bias.
    Layer,
}

/// The learned factor of a norm, and where a 16-bit result is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormWeight {
    /// w, on the rounded normalized row (Llama, Qwen, Mistral).
    Plain,
    /// w, in f32 and rounded afterwards (OLMo 2).
    RoundedAfter,
    /// 1 + w, in f32 and rounded afterwards (Gemma, Qwen3-Next).
    OnePlus,
    /// No weight (Gemma 4's value norm, Llama 4's query and key norms).
    None,
}

/// The attention half of a layer.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Factor on the scores, usually head_dim^-½.
    pub scale: f32,
    /// The keys that a query sees.
    pub mask: AttentionMask,
    /// c in c·tanh(scores / c), before the mask (Gemma 2: 50).
    pub softcap: Option<f64>,
    /// True if each head has a learned logit that takes part in the softmax and is dropped afterwards (gpt-oss).
    pub sinks: bool,
    /// Norms of queries and keys.
    pub qk_norm: Option<QkNormSpec>,
    /// A norm of values (Gemma 4).
    pub value_norm: Option<NormSpec>,
    /// The rotation of queries and keys; `None` for a layer without positions (NoPE).
    pub rope: Option<RotarySpec>,
    /// A factor on queries that grows with the position (Ministral 3, Llama 4).
    pub query_scale: Option<QueryScale>,
    /// The projections that have a bias.
    pub biases: AttentionBiases,
    /// The projections of queries, keys and values.
    pub projections: Projections,
    /// A sigmoid gate on the result (Qwen3-Next, Muse Glimmer).
    pub output_gate: Option<OutputGate>,
}

/// The keys that a query sees, besides that they are of its document and not after it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionMask {
    /// All of them.
    Full,
    /// The last so many, its own included.
    Sliding(usize),
    /// Those of its chunk of so many positions (Llama 4).
    Chunked(usize),
}

/// Norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QkNormSpec {
    /// The norm.
    pub norm: NormSpec,
    /// True if one norm spans the whole width of q or k (OLMo 2) instead of each head.
    pub full_width: bool,
    /// True if it comes after the rotation (Hunyuan, Llama 4) instead of before it.
    pub after_rope: bool,
}

/// The rotation of queries and keys. How many channels rotate is in the [`RopeConfig`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RotarySpec {
    /// The frequencies.
    pub id: RopeId,
    /// True if channels 2i and 2i + 1 rotate together (GLM, Cohere) instead of i and i + half.
    pub interleaved: bool,
}

/// q · (1 + beta · ln(1 + ⌊(position + offset) / window⌋)).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryScale {
    /// The strength.
    pub beta: f64,
    /// Positions without a change.
    pub window: usize,
    /// Added to the position (Llama 4: 1).
    pub offset: usize,
}

impl QueryScale {
    /// The factor at a position.
    pub(crate) fn at(&self, position: usize) -> f32 {
        let windows = (position + self.offset) / self.window;
        (1.0 + self.beta * ((1 + windows) as f64).ln()) as f32
    }
}

/// The projections of attention that have a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttentionBiases {
    /// `q_proj`, `k_proj` and `v_proj`, or the fused `qkv_proj`.
    pub qkv: bool,
    /// `o_proj`.
    pub o: bool,
}

/// The projections of queries, keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Projections {
    /// `q_proj`, `k_proj` and `v_proj`.
    Separate,
    /// One `qkv_proj` with the rows of q, k and v (Phi-3).
    Fused,
    /// `q_proj` and `k_proj`; values are the keys before their norm (Gemma 4's `attention_k_eq_v`).
    ValuesAreKeys,
    /// `q_proj`; keys and values are those of an earlier layer (Gemma 4's `num_kv_shared_layers`).
    SharedKeys {
        /// The layer that computes them.
        layer: usize,
    },
    /// Low-rank latents (DeepSeek's MLA).
    Latent {
        /// Rank of the queries' latent; `None` for a plain `q_proj`.
        q_rank: Option<usize>,
        /// Rank of the keys' and values' latent.
        kv_rank: usize,
        /// Channels of a head without rotation.
        nope_dim: usize,
        /// Channels of a head with rotation.
        rope_dim: usize,
        /// Channels of a value.
        value_dim: usize,
    },
}

/// A sigmoid gate on the result of attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputGate {
    /// The second half of each head's rows of `q_proj` (Qwen3-Next).
    InQueries,
    /// A projection of its own (Muse Glimmer).
    Projection,
}

/// The feed-forward half of a layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardSpec {
    /// down(act(gate(x)) ∘ up(x)).
    Gated(GatedSpec),
    /// down(act(up(x))) (Apertus).
    Plain {
        /// Width of the hidden activations.
        intermediate_size: usize,
        /// The nonlinearity.
        activation: Activation,
    },
    /// A mixture of experts.
    Moe(MoeSpec),
}

/// A gated feed-forward half.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GatedSpec {
    /// Width of the hidden activations.
    pub intermediate_size: usize,
    /// The nonlinearity on the gate.
    pub activation: Activation,
    /// True if gate and up are one `gate_up_proj` (Phi-3, GLM).
    pub fused: bool,
    /// True if all its projections have a bias.
    pub bias: bool,
}

/// A mixture of experts: the outputs of `top_k` gated feed-forward halves, weighted by a router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MoeSpec {
    /// Number of experts.
    pub experts: usize,
    /// Experts for each token.
    pub top_k: usize,
    /// Width of the hidden activations of an expert.
    pub intermediate_size: usize,
    /// The nonlinearity of an expert. With [`Activation::ClampedSwiglu`], gate and up are one linear whose rows alternate.
    pub activation: Activation,
    /// True if experts and router have biases (gpt-oss).
    pub bias: bool,
    /// The formula of the chosen experts' weights from the router's logits.
    pub routing: RoutingForm,
    /// The expert that every token uses, if there is one.
    pub shared: Option<SharedExpertSpec>,
}

/// The expert of a mixture that every token uses.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SharedExpertSpec {
    /// Width of its hidden activations.
    pub intermediate_size: usize,
    /// True if its result is multiplied with the sigmoid of a logit for each token (Qwen2-MoE).
    pub gated: bool,
}

/// The nonlinearity of a feed-forward half.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// x·σ(x).
    Silu,
    /// The tanh form of GELU (Gemma).
    GeluTanh,
    /// gpt-oss: gate clamped from above, up from both sides; gate·σ(alpha·gate)·(up + 1).
    ClampedSwiglu {
        /// The slope in the sigmoid.
        alpha: f64,
        /// The bound.
        limit: f64,
    },
    /// xIELU with learned slopes (Apertus).
    Xielu,
}

impl NormSpec {
    /// An RMSNorm with a plain weight, as Llama's.
    pub fn rms(eps: f64) -> Self {
        Self { kind: NormKind::Rms, eps, weight: NormWeight::Plain }
    }
}

impl LayerSpec {
    /// Returns softmax attention, if the layer has it.
    pub fn attention(&self) -> Option<&AttentionSpec> {
        match &self.mixer {
            MixerSpec::Attention(attention) => Some(attention),
            MixerSpec::GatedDelta(_) => None,
        }
    }

    /// As [`attention`](Self::attention).
    pub fn attention_mut(&mut self) -> Option<&mut AttentionSpec> {
        match &mut self.mixer {
            MixerSpec::Attention(attention) => Some(attention),
            MixerSpec::GatedDelta(_) => None,
        }
    }
}

impl LayerNorms {
    /// Norms before attention and before the feed-forward half, as Llama's.
    pub fn pre(norm: NormSpec) -> Self {
        Self { pre_attention: Some(norm), pre_feed_forward: Some(norm), ..Self::default() }
    }
}

impl AttentionSpec {
    /// Full attention with separate projections, scaled by head_dim^-½: Llama's.
    pub fn new(heads: usize, kv_heads: usize, head_dim: usize, rope: Option<RotarySpec>) -> Self {
        Self {
            heads,
            kv_heads,
            head_dim,
            scale: (head_dim as f32).sqrt().recip(),
            mask: AttentionMask::Full,
            softcap: None,
            sinks: false,
            qk_norm: None,
            value_norm: None,
            rope,
            query_scale: None,
            biases: AttentionBiases::default(),
            projections: Projections::Separate,
            output_gate: None,
        }
    }
}
