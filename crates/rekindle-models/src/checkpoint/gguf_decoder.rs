//! From a spec to the description of a decoder in a GGUF file.

use rekindle_gguf::{
    GgufArchitecture, GgufDecoder, GgufDelta, GgufDescription, GgufExperts, GgufLayer, GgufPart, GgufRope,
    GgufRopeScaling,
};
use rekindle_rope::{RopeConfig, Scaling};

use crate::parameters::{ExpertRole, ExpertStack};
use crate::spec::{
    Activation, AttentionMask, AttentionSpec, FeedForwardSpec, GatedDeltaSpec, MixerSpec, MoeSpec, NormKind, NormSpec,
    NormWeight, RoutingForm,
};
use crate::{Error, LayerRole, LinearRole, ModelConfig, Role, families};

/// A model as a GGUF file has it.
pub(super) struct GgufModelSpec {
    pub(super) architecture: GgufArchitecture,
    pub(super) decoder: GgufDecoder,
    pub(super) description: GgufDescription,
}

impl GgufModelSpec {
    /// Describes a model whose output layer is the embedding table (`is_tied`) or its own.
    pub(super) fn new(config: &ModelConfig, is_tied: bool) -> Result<Self, Error> {
        let architecture = architecture(config)?;
        let decoder = GgufDecoder { is_tied, ..decoder(config)? };
        let description = architecture.describe(&decoder)?;
        Ok(Self { architecture, decoder, description })
    }
}

/// Returns the architecture of a model, by the `model_type` of the decoder's part of its configuration.
pub(super) fn architecture(config: &ModelConfig) -> Result<GgufArchitecture, Error> {
    let family = families::of(&config.json).map_err(Error::Argument)?;
    let section = family.section.map_or(&config.json, |section| &config.json[section]);
    let model_type = section["model_type"].as_str().unwrap_or(family.model_type);
    Ok(GgufArchitecture::of_model_type(model_type)?)
}

/// Returns the name of a tensor in a GGUF file. The linears of all experts of a layer are one tensor there.
///
/// # Errors
/// [`Error::Argument`] for a parameter that is several tensors of a file.
pub(super) fn tensor_name(architecture: &GgufArchitecture, role: Role) -> Result<String, Error> {
    let (layer, part) = match role {
        Role::Embedding => return Ok(GgufPart::Embedding.tensor_name("weight")),
        Role::FinalNorm => return Ok(GgufPart::OutputNorm.tensor_name("weight")),
        Role::Head => return Ok(GgufPart::Output.tensor_name("weight")),
        Role::Layer(layer, part) => (layer, part),
    };
    let linear = |role| match role {
        LinearRole::Query => GgufPart::Query(layer),
        LinearRole::Key => GgufPart::Key(layer),
        LinearRole::Value => GgufPart::Value(layer),
        LinearRole::Qkv => GgufPart::QueryKeyValue(layer),
        LinearRole::Output => GgufPart::AttentionOutput(layer),
        LinearRole::Gate => GgufPart::Gate(layer),
        LinearRole::Up | LinearRole::GateUp => GgufPart::Up(layer),
        LinearRole::Down => GgufPart::Down(layer),
        LinearRole::Router => GgufPart::Router(layer),
        LinearRole::SharedGate => GgufPart::SharedGate(layer),
        LinearRole::SharedUp => GgufPart::SharedUp(layer),
        LinearRole::SharedDown => GgufPart::SharedDown(layer),
        LinearRole::SharedExpertGate => GgufPart::SharedExpertGate(layer),
        LinearRole::DeltaQkv => GgufPart::QueryKeyValue(layer),
        LinearRole::DeltaGate => GgufPart::AttentionGate(layer),
        LinearRole::DeltaBeta => GgufPart::UpdateStrength(layer),
        LinearRole::DeltaDecay => GgufPart::DecayInput(layer),
        LinearRole::DeltaOutput => GgufPart::DeltaOutput(layer),
    };
    let (part, kind) = match part {
        LayerRole::PreAttentionNorm => (GgufPart::AttentionNorm(layer), "weight"),
        LayerRole::Weight(role) => (linear(role), "weight"),
        LayerRole::Bias(role) => (linear(role), "bias"),
        LayerRole::QueryNorm => (GgufPart::QueryNorm(layer), "weight"),
        LayerRole::KeyNorm => (GgufPart::KeyNorm(layer), "weight"),
        LayerRole::Sinks => (GgufPart::Sinks(layer), "weight"),
        LayerRole::PostAttentionNorm => (GgufPart::PostAttentionNorm(layer), "weight"),
        LayerRole::PreFeedForwardNorm => (architecture.feed_forward_norm(layer), "weight"),
        LayerRole::PostFeedForwardNorm => (GgufPart::PostFeedForwardNorm(layer), "weight"),
        LayerRole::Expert(ExpertRole::Gate, _) => (GgufPart::ExpertGates(layer), "weight"),
        LayerRole::Expert(ExpertRole::Up, _) => (GgufPart::ExpertUps(layer), "weight"),
        LayerRole::Expert(ExpertRole::Down, _) => (GgufPart::ExpertDowns(layer), "weight"),
        LayerRole::ExpertBias(ExpertStack::Down) => (GgufPart::ExpertDowns(layer), "bias"),
        LayerRole::ShortConv => (GgufPart::ShortConvolution(layer), "weight"),
        LayerRole::DecayRate => (GgufPart::DecayRate(layer), ""),
        LayerRole::DecayBias => (GgufPart::DecayBias(layer), "bias"),
        LayerRole::GatedNorm => (GgufPart::DeltaNorm(layer), "weight"),
        LayerRole::Expert(ExpertRole::GateUp, _)
        | LayerRole::Experts(_)
        | LayerRole::ExpertBias(_)
        | LayerRole::OutputScalar => {
            return Err(Error::Argument(format!("{part:?} of layer {layer} is not one tensor of a GGUF file")));
        }
    };
    Ok(part.tensor_name(kind))
}

/// Returns the norm that a tensor is the weight of.
pub(super) fn norm(config: &ModelConfig, role: Role) -> Option<NormSpec> {
    let Role::Layer(layer, part) = role else {
        return (role == Role::FinalNorm).then_some(config.spec.final_norm);
    };
    let layer = &config.spec.layers[layer];
    match part {
        LayerRole::PreAttentionNorm => layer.norms.pre_attention,
        LayerRole::PostAttentionNorm => layer.norms.post_attention,
        LayerRole::PreFeedForwardNorm => layer.norms.pre_feed_forward,
        LayerRole::PostFeedForwardNorm => layer.norms.post_feed_forward,
        LayerRole::QueryNorm | LayerRole::KeyNorm => layer.attention()?.qk_norm.map(|qk| qk.norm),
        _ => None,
    }
}

/// Returns the number that a file has added to a norm's weight: 1 where the model multiplies with 1 + w.
pub(super) fn norm_shift(config: &ModelConfig, role: Role) -> f32 {
    match norm(config, role) {
        Some(NormSpec { weight: NormWeight::OnePlus, .. }) => 1.0,
        _ => 0.0,
    }
}

/// Returns true if the rows of a tensor are those of queries or keys.
pub(super) fn is_rotated(role: Role) -> bool {
    use LinearRole::{Key, Query};
    matches!(role, Role::Layer(_, LayerRole::Weight(Query | Key) | LayerRole::Bias(Query | Key)))
}

fn decoder(config: &ModelConfig) -> Result<GgufDecoder, Error> {
    let spec = &config.spec;
    let refuse = |what: &str| Error::Argument(format!("a GGUF file cannot describe {what}"));
    let first = spec.layers.first().ok_or_else(|| refuse("a model without layers"))?;
    let attention = spec.layers.iter().find_map(|layer| layer.attention());
    let attention = attention.ok_or_else(|| refuse("a model without softmax attention"))?;
    let delta = spec.layers.iter().find_map(|layer| match layer.mixer {
        MixerSpec::GatedDelta(delta) => Some(delta),
        MixerSpec::Attention(_) => None,
    });
    let same = |other: &AttentionSpec| {
        (other.heads, other.kv_heads, other.head_dim, other.scale, other.softcap)
            == (attention.heads, attention.kv_heads, attention.head_dim, attention.scale, attention.softcap)
    };
    let (width, experts) = match &first.feed_forward {
        FeedForwardSpec::Gated(gated) => (gated.intermediate_size, None),
        FeedForwardSpec::Moe(moe) => (moe.intermediate_size, Some(experts(moe)?)),
        FeedForwardSpec::Plain { .. } => return Err(refuse("this model's feed-forward layers yet")),
    };
    let uniform = spec.layers.iter().all(|layer| {
        let same_mixer = match &layer.mixer {
            MixerSpec::Attention(attention) => same(attention),
            MixerSpec::GatedDelta(other) => Some(*other) == delta,
        };
        same_mixer
            && match (&layer.feed_forward, &first.feed_forward) {
                (FeedForwardSpec::Gated(gated), FeedForwardSpec::Gated(_)) => gated.intermediate_size == width,
                (FeedForwardSpec::Moe(moe), FeedForwardSpec::Moe(other)) => moe == other,
                _ => false,
            }
            && layer.residual_multiplier == first.residual_multiplier
    });
    if !uniform {
        return Err(refuse("layers that differ in their sizes"));
    }
    let layers = spec.layers.iter().map(|layer| {
        let Some(attention) = layer.attention() else {
            return Ok(GgufLayer { window: None, rope: None, is_linear: true });
        };
        let window = match attention.mask {
            AttentionMask::Full => None,
            AttentionMask::Sliding(window) => Some(window as u64),
            AttentionMask::Chunked(_) => return Err(refuse("attention in chunks yet")),
        };
        Ok(GgufLayer { window, rope: attention.rope.map(|rope| rope.id.0), is_linear: false })
    });
    let eps = spec.final_norm.eps;
    Ok(GgufDecoder {
        vocab_size: spec.vocab_size as u64,
        context_length: config.max_position_embeddings as u64,
        embedding_length: spec.hidden_size as u64,
        feed_forward_length: width as u64,
        experts,
        delta: delta.map(linear_attention),
        heads: attention.heads as u64,
        kv_heads: attention.kv_heads as u64,
        head_dim: attention.head_dim as u64,
        norm_epsilon: eps,
        is_parallel: first.parallel && spec.final_norm.kind == NormKind::Layer,
        is_tied: spec.head.tied,
        has_attention_biases: attention.biases.qkv || attention.biases.o,
        attention_scale: attention.scale.into(),
        attention_softcap: attention.softcap,
        logit_softcap: spec.head.softcap,
        embedding_scale: spec.embedding.multiplier,
        residual_scale: first.residual_multiplier,
        logit_multiplier: spec.head.multiplier,
        query_growth: attention.query_scale.map(|scale| (scale.beta, scale.window as u64)),
        layers: layers.collect::<Result<_, _>>()?,
        ropes: spec.ropes.iter().map(rope).collect::<Result<_, _>>()?,
    })
}

fn linear_attention(delta: GatedDeltaSpec) -> GgufDelta {
    GgufDelta {
        key_heads: delta.key_heads as u64,
        value_heads: delta.value_heads as u64,
        key_dim: delta.key_dim as u64,
        value_dim: delta.value_dim as u64,
        conv_width: delta.conv_width as u64,
    }
}

fn experts(moe: &MoeSpec) -> Result<GgufExperts, Error> {
    let normalizes = match moe.routing {
        RoutingForm::SoftmaxTopK { normalize } => normalize,
        RoutingForm::TopKSoftmax => true,
        RoutingForm::Sigmoid => {
            return Err(Error::Argument("a GGUF file cannot describe this model's router yet".to_owned()));
        }
    };
    let is_clamped = match moe.activation {
        Activation::ClampedSwiglu { alpha, limit } if moe.bias => {
            if (alpha, limit) != (1.702, 7.0) {
                return Err(Error::Argument(format!(
                    "llama.cpp computes a clamped SwiGLU with swiglu_alpha 1.702 and swiglu_limit 7, and this model has \
                     {alpha} and {limit}"
                )));
            }
            true
        }
        Activation::Silu if !moe.bias => false,
        _ => return Err(Error::Argument("a GGUF file cannot describe this model's experts yet".to_owned())),
    };
    if moe.shared.is_some_and(|shared| !shared.gated) {
        return Err(Error::Argument("a GGUF file cannot describe a shared expert without a gate yet".to_owned()));
    }
    Ok(GgufExperts {
        count: moe.experts as u64,
        used: moe.top_k as u64,
        shared_feed_forward_length: moe.shared.map(|shared| shared.intermediate_size as u64),
        normalizes,
        is_clamped,
    })
}

fn rope(rope: &RopeConfig) -> Result<GgufRope, Error> {
    let f32s = |values: &[f64]| values.iter().map(|&value| value as f32).collect();
    let scaling = match rope.scaling() {
        Scaling::Default => GgufRopeScaling::None,
        Scaling::Linear { factor } => GgufRopeScaling::Linear { factor: *factor },
        &Scaling::Yarn { factor, original, attention_factor, beta_fast, beta_slow, truncate } => {
            GgufRopeScaling::Yarn {
                factor,
                original: original as u64,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
            }
        }
        &Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original } => {
            let bands = [factor, low_freq_factor, high_freq_factor, original as f64].map(|x| x as f32);
            GgufRopeScaling::Divisors(llama3_divisors(rope.theta() as f32, rope.rotary_dim(), bands))
        }
        // The same divisors for every length.
        Scaling::LongRope { short_factor, long_factor, attention_factor: 1.0, .. } if short_factor == long_factor => {
            GgufRopeScaling::Divisors(f32s(short_factor))
        }
        Scaling::LongRope { short_factor, long_factor, original, attention_factor } => GgufRopeScaling::Long {
            short: f32s(short_factor),
            long: f32s(long_factor),
            original: *original as u64,
            attention_factor: *attention_factor,
        },
        other => {
            return Err(Error::Argument(format!(
                "llama.cpp does not compute rotary positions of the type {}; train with rope_scaling = \"yarn\" or \
                 \"linear\"",
                other.name()
            )));
        }
    };
    Ok(GgufRope { base: rope.theta(), dimensions: rope.rotary_dim() as u64, scaling })
}

/// The divisors of the frequencies of Llama 3.1, in f32 step by step as llama.cpp's converter computes them: 1 for short
/// waves, the factor for long ones, and a harmonic mean between them.
fn llama3_divisors(theta: f32, dimensions: usize, [factor, low, high, original]: [f32; 4]) -> Vec<f32> {
    let divisor = |pair: usize| {
        let frequency = 1.0 / theta.powf(2.0 * pair as f32 / dimensions as f32);
        let wave = core::f32::consts::TAU / frequency;
        if wave < original / high {
            1.0
        } else if wave > original / low {
            factor
        } else {
            let smooth = (original / wave - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    };
    (0..dimensions / 2).map(divisor).collect()
}
