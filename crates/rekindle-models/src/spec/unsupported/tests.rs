use rekindle_rope::RopeConfig;
use serde_json::json;

use super::*;
use crate::spec::{
    AttentionBiases, EmbeddingSpec, HeadSpec, LayerNorms, MixerSpec, MoeSpec, OutputGate, QkNormSpec, QueryScale,
    RopeId, RotarySpec, RoutingForm,
};

const HIDDEN: usize = 64;

fn gated(activation: Activation) -> GatedSpec {
    GatedSpec { intermediate_size: 96, activation, fused: false, bias: false }
}

fn rotary(id: usize, interleaved: bool) -> Option<RotarySpec> {
    Some(RotarySpec { id: RopeId(id), interleaved })
}

fn attention(layer: &mut LayerSpec) -> &mut AttentionSpec {
    layer.attention_mut().expect("a layer with softmax attention")
}

/// A Llama of two layers.
fn llama() -> ModelSpec {
    let norm = NormSpec::rms(1e-6);
    let layer = LayerSpec {
        mixer: MixerSpec::Attention(AttentionSpec::new(4, 2, 16, rotary(0, false))),
        feed_forward: FeedForwardSpec::Gated(gated(Activation::Silu)),
        norms: LayerNorms::pre(norm),
        residual_multiplier: None,
        parallel: false,
        output_scalar: false,
    };
    ModelSpec {
        vocab_size: 100,
        hidden_size: HIDDEN,
        embedding: EmbeddingSpec::default(),
        layers: vec![layer.clone(), layer],
        final_norm: norm,
        head: HeadSpec { tied: false, multiplier: None, softcap: None },
        ropes: vec![RopeConfig::from_config(&json!({}), 16).unwrap(); 2],
    }
}

fn llama_with(change: impl Fn(usize, &mut LayerSpec)) -> ModelSpec {
    let mut spec = llama();
    spec.layers.iter_mut().enumerate().for_each(|(index, layer)| change(index, layer));
    spec
}

#[test]
fn everything_that_is_computed_is_supported() {
    assert_eq!(llama().unsupported(4096), [""; 0]);
    let mut granite = llama_with(|index, layer| {
        layer.residual_multiplier = Some(0.22);
        attention(layer).scale = 0.015625;
        attention(layer).projections = Projections::Fused;
        attention(layer).biases = AttentionBiases { qkv: true, o: true };
        attention(layer).sinks = true;
        attention(layer).softcap = Some(50.0);
        layer.feed_forward = FeedForwardSpec::Gated(GatedSpec { fused: true, bias: true, ..gated(Activation::Silu) });
        if index == 1 {
            attention(layer).rope = None;
            attention(layer).mask = AttentionMask::Sliding(128);
        }
    });
    granite.embedding.multiplier = Some(12.0);
    granite.head.multiplier = Some(1.0 / 16.0);
    assert_eq!(granite.unsupported(4096), [""; 0]);

    let norm = |weight| NormSpec { weight, ..NormSpec::rms(1e-6) };
    let gemma3 = llama_with(|_, layer| {
        let norm = norm(NormWeight::OnePlus);
        layer.norms = LayerNorms {
            pre_attention: Some(norm),
            post_attention: Some(norm),
            pre_feed_forward: Some(norm),
            post_feed_forward: Some(norm),
        };
        attention(layer).qk_norm = Some(QkNormSpec { norm, full_width: false, after_rope: false });
        layer.feed_forward = FeedForwardSpec::Gated(gated(Activation::GeluTanh));
    });
    let embedding = EmbeddingSpec { multiplier: Some(8.0), rounds_multiplier: true, per_layer_input: None };
    let gemma3 = ModelSpec { embedding, final_norm: norm(NormWeight::OnePlus), ..gemma3 };
    assert_eq!(gemma3.unsupported(4096), [""; 0]);

    let olmo2 = llama_with(|index, layer| {
        let norm = norm(NormWeight::RoundedAfter);
        layer.norms = LayerNorms { post_attention: Some(norm), post_feed_forward: Some(norm), ..LayerNorms::default() };
        attention(layer).qk_norm = Some(QkNormSpec { norm, full_width: index == 0, after_rope: index == 1 });
        attention(layer).rope = rotary(0, true).filter(|_| index == 0);
    });
    assert_eq!(olmo2.unsupported(4096), [""; 0]);
}

#[test]
fn what_depends_on_positions_is_refused_only_where_a_document_can_reach_them() {
    let chunked = llama_with(|_, layer| attention(layer).mask = AttentionMask::Chunked(4096));
    assert_eq!(chunked.unsupported(4096), [""; 0]);
    assert_eq!(chunked.unsupported(4097), ["chunked attention (chunks of 4096, below max_seq_length 4097)"]);
    let scaled = llama_with(|_, layer| {
        attention(layer).query_scale = Some(QueryScale { beta: 0.1, window: 16_384, offset: 0 });
        attention(layer).rope = None;
    });
    assert_eq!(scaled.unsupported(16_384), [""; 0]);
    assert_eq!(
        scaled.unsupported(16_385),
        ["queries scaled by position in layers without rotary positions or with query and key norms"]
    );
}

/// Each of these is said in the words of a family that needs it, and refused by name.
#[test]
fn what_is_not_computed_is_named() {
    let one_plus = NormSpec { weight: NormWeight::OnePlus, ..NormSpec::rms(1e-6) };
    let mut gemma2 = llama_with(|index, layer| {
        layer.norms = LayerNorms {
            pre_attention: Some(one_plus),
            post_attention: Some(one_plus),
            pre_feed_forward: Some(one_plus),
            post_feed_forward: Some(one_plus),
        };
        attention(layer).softcap = Some(50.0);
        attention(layer).mask = if index == 0 { AttentionMask::Sliding(4096) } else { AttentionMask::Full };
        layer.feed_forward = FeedForwardSpec::Gated(gated(Activation::GeluTanh));
    });
    gemma2.final_norm = one_plus;
    gemma2.head.softcap = Some(30.0);
    gemma2.embedding = EmbeddingSpec { multiplier: Some(8.0), rounds_multiplier: true, per_layer_input: None };
    assert_eq!(gemma2.unsupported(8192), [""; 0]);

    let scaled_post_norms = llama_with(|_, layer| {
        layer.norms.post_attention = layer.norms.pre_attention;
        layer.residual_multiplier = Some(0.5);
    });
    assert_eq!(
        scaled_post_norms.unsupported(4096),
        ["a residual multiplier beside norms after attention or the feed-forward half"]
    );

    let experts = MoeSpec {
        experts: 32,
        top_k: 4,
        intermediate_size: 96,
        activation: Activation::ClampedSwiglu { alpha: 1.702, limit: 7.0 },
        bias: true,
        routing: RoutingForm::TopKSoftmax,
        shared: None,
    };
    let with_experts = |moe: MoeSpec| {
        llama_with(|_, layer| {
            attention(layer).sinks = true;
            layer.feed_forward = FeedForwardSpec::Moe(moe);
        })
    };
    assert_eq!(with_experts(experts).unsupported(4096), [""; 0]);
    for (moe, missing) in [
        (MoeSpec { bias: false, ..experts }, "clamped SwiGLU of experts without biases"),
        (MoeSpec { activation: Activation::Silu, ..experts }, "biases of experts without clamped SwiGLU"),
        (
            MoeSpec { activation: Activation::GeluTanh, bias: false, ..experts },
            "experts with another activation than SiLU or clamped SwiGLU",
        ),
    ] {
        assert_eq!(with_experts(moe).unsupported(4096), [missing]);
    }

    let cohere = llama_with(|_, layer| {
        let norm = NormSpec { kind: NormKind::Layer, ..NormSpec::rms(1e-5) };
        layer.norms = LayerNorms { pre_attention: Some(norm), ..LayerNorms::default() };
        layer.parallel = true;
        attention(layer).rope = rotary(0, true);
    });
    assert_eq!(cohere.unsupported(4096), Vec::<String>::new());

    let gemma4 = llama_with(|index, layer| {
        let weightless = NormSpec { weight: NormWeight::None, ..NormSpec::rms(1e-6) };
        attention(layer).scale = 1.0;
        attention(layer).value_norm = Some(weightless);
        attention(layer).rope = rotary(index, false);
        attention(layer).projections =
            if index == 0 { Projections::ValuesAreKeys } else { Projections::SharedKeys { layer: 0 } };
        layer.output_scalar = true;
    });
    assert_eq!(gemma4.unsupported(4096), ["keys and values shared between layers"]);

    let llama4_and_muse = llama_with(|index, layer| {
        let norm = NormSpec { weight: NormWeight::None, ..NormSpec::rms(1e-6) };
        attention(layer).qk_norm = Some(QkNormSpec { norm, full_width: false, after_rope: index == 0 });
        attention(layer).mask = AttentionMask::Chunked(2048);
        attention(layer).output_gate = (index == 1).then_some(OutputGate::Projection);
        if index == 1 {
            attention(layer).rope = None;
        }
    });
    assert_eq!(
        llama4_and_muse.unsupported(4096),
        [
            "chunked attention (chunks of 2048, below max_seq_length 4096)",
            "norms without a weight",
            "a gate on the result of attention",
        ]
    );

    let deepseek = llama_with(|_, layer| {
        attention(layer).projections =
            Projections::Latent { q_rank: Some(768), kv_rank: 512, nope_dim: 192, rope_dim: 64, value_dim: 256 };
    });
    assert_eq!(deepseek.unsupported(4096), ["multi-head latent attention"]);

    let apertus = llama_with(|_, layer| {
        layer.feed_forward = FeedForwardSpec::Plain { intermediate_size: 96, activation: Activation::Xielu };
    });
    assert_eq!(apertus.unsupported(4096), ["a feed-forward half without a gate", "the activation xIELU"]);
}

/// The sizes of fused linears, by hand.
#[test]
fn fused_linears_have_the_rows_of_their_parts() {
    let mut layer = llama().layers.remove(0);
    let separate: usize = layer.linears(HIDDEN).iter().map(|linear| linear.shape[0] * linear.shape[1]).sum();
    attention(&mut layer).projections = Projections::Fused;
    layer.feed_forward = FeedForwardSpec::Gated(GatedSpec { fused: true, ..gated(Activation::Silu) });
    let fused = layer.linears(HIDDEN);
    let shapes: Vec<_> = fused.iter().map(|linear| (linear.shape, linear.outputs.as_slice())).collect();
    assert_eq!(
        shapes,
        [([64 + 32 + 32, 64], &[64, 32, 32][..]), ([64, 64], &[]), ([192, 64], &[96, 96]), ([64, 96], &[]),]
    );
    assert_eq!(fused.iter().map(|linear| linear.shape[0] * linear.shape[1]).sum::<usize>(), separate);
}
