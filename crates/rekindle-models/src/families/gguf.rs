//! The `config.json` of a GGUF model: the keys that transformers' class of its family reads.

use rekindle_gguf::{GgufArchitecture, GgufDecoder, GgufModel, GgufRope, GgufRopeScaling};
use serde_json::{Value, json};

use super::FAMILIES;

/// Returns the content of `config.json` for a GGUF model; an error is the reason that there is none.
///
/// # Errors
/// [`rekindle_gguf::Error`] for metadata that is invalid or not supported.
pub(crate) fn config(model: &GgufModel) -> Result<Value, rekindle_gguf::Error> {
    let (architecture, decoder) = GgufArchitecture::read(model)?;
    let has_windows = decoder.layers.iter().any(|layer| layer.window.is_some());
    let model_type = match architecture.name() {
        "olmo2" if has_windows => "olmo3",
        // Files have the text part alone.
        "qwen35" => "qwen3_5_text",
        "qwen35moe" => "qwen3_5_moe_text",
        _ => architecture.model_type(),
    };
    let family = FAMILIES.iter().find(|family| family.model_type == model_type && family.section.is_none());
    let family = family.ok_or_else(|| {
        rekindle_gguf::Error::Model(format!("models of the type {model_type} cannot be loaded from GGUF"))
    })?;
    let has = |tensor: &str| model.tensor(tensor).is_some();
    let attention = decoder.layers.iter().position(|layer| !layer.is_linear).unwrap_or(0);
    let mut json = json!({
        "architectures": [family.architecture],
        "model_type": model_type,
        "dtype": model.tensor(&format!("blk.{attention}.attn_output.weight")).map_or("bfloat16", |tensor| match tensor.kind {
            rekindle_gguf::GgmlType::F32 => "float32",
            rekindle_gguf::GgmlType::F16 => "float16",
            _ => "bfloat16",
        }),
        "vocab_size": decoder.vocab_size,
        "hidden_size": decoder.embedding_length,
        "intermediate_size": decoder.feed_forward_length,
        "num_hidden_layers": decoder.layers.len(),
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "head_dim": decoder.head_dim,
        "max_position_embeddings": decoder.context_length,
        "tie_word_embeddings": decoder.is_tied,
        "attention_bias": has(&format!("blk.{attention}.attn_q.bias")),
        "rope_parameters": rope_parameters(&decoder, model_type),
    });
    let mut set = |key: &str, value: Value| json[key] = value;
    set(if decoder.is_parallel { "layer_norm_eps" } else { "rms_norm_eps" }, decoder.norm_epsilon.into());
    if model_type == "cohere2" {
        set("logit_scale", decoder.logit_multiplier.unwrap_or(1.0).into());
    }
    if model_type.starts_with("gemma") {
        set("hidden_activation", "gelu_pytorch_tanh".into());
        set("query_pre_attn_scalar", ((decoder.attention_scale.powi(-2) * 1e6).round() / 1e6).into());
        set("final_logit_softcapping", decoder.logit_softcap.into());
        set("attn_logit_softcapping", decoder.attention_softcap.into());
    } else {
        set("hidden_act", "silu".into());
    }
    if ["llama", "granite", "smollm3"].contains(&model_type) {
        set("mlp_bias", has("blk.0.ffn_gate.bias").into());
    }
    if let Some(experts) = decoder.experts {
        set("num_experts_per_tok", experts.used.into());
        if ["mixtral", "granitemoe", "gpt_oss"].contains(&model_type) {
            set("num_local_experts", experts.count.into());
        } else {
            set("num_experts", experts.count.into());
            set("moe_intermediate_size", decoder.feed_forward_length.into());
            set("shared_expert_intermediate_size", experts.shared_feed_forward_length.into());
            set("norm_topk_prob", experts.normalizes.into());
        }
    }
    if let Some(delta) = decoder.delta {
        set("linear_num_key_heads", delta.key_heads.into());
        set("linear_num_value_heads", delta.value_heads.into());
        set("linear_key_head_dim", delta.key_dim.into());
        set("linear_value_head_dim", delta.value_dim.into());
        set("linear_conv_kernel_dim", delta.conv_width.into());
        let kind = |is_linear| if is_linear { "linear_attention" } else { "full_attention" };
        set("layer_types", decoder.layers.iter().map(|layer| kind(layer.is_linear)).collect::<Vec<_>>().into());
    }
    if ["granite", "granitemoe"].contains(&model_type) {
        set("attention_multiplier", decoder.attention_scale.into());
        set("residual_multiplier", decoder.residual_scale.unwrap_or(1.0).into());
        set("embedding_multiplier", decoder.embedding_scale.unwrap_or(1.0).into());
        set("logits_scaling", decoder.logit_multiplier.map_or(1.0, f64::recip).into());
    }
    if model_type == "smollm3" {
        let rotated: Vec<u8> = decoder.layers.iter().map(|layer| layer.rope.is_some().into()).collect();
        set("no_rope_layers", rotated.into());
    }
    if ["gemma2", "gemma3_text", "olmo3", "exaone4", "phi3", "cohere2", "gpt_oss"].contains(&model_type) {
        let window = decoder.layers.iter().find_map(|layer| layer.window);
        set("sliding_window", window.into());
        if model_type != "phi3" {
            let kind = |is_windowed| if is_windowed { "sliding_attention" } else { "full_attention" };
            let kinds = decoder.layers.iter().map(|layer| kind(layer.window.is_some()));
            set("layer_types", kinds.collect::<Vec<_>>().into());
        }
    }
    Ok(json)
}

/// Returns the rotary embedding; by the kind of layer in families that have several.
fn rope_parameters(decoder: &GgufDecoder, model_type: &str) -> Value {
    let first = &decoder.ropes[0];
    let mut parameters = parameters(first, decoder.head_dim);
    if let Some((beta, window)) = decoder.query_growth {
        parameters["llama_4_scaling_beta"] = beta.into();
        parameters["original_max_position_embeddings"] = window.into();
    }
    if !["gemma3_text", "olmo3"].contains(&model_type) {
        return parameters;
    }
    let windowed = decoder.ropes.last().unwrap_or(first);
    json!({"full_attention": parameters, "sliding_attention": self::parameters(windowed, decoder.head_dim)})
}

fn parameters(rope: &GgufRope, head_dim: u64) -> Value {
    let mut parameters = match &rope.scaling {
        GgufRopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
        GgufRopeScaling::Yarn { factor, original, attention_factor, beta_fast, beta_slow, truncate } => json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "attention_factor": attention_factor, "beta_fast": beta_fast, "beta_slow": beta_slow, "truncate": truncate,
        }),
        GgufRopeScaling::Divisors(divisors) => divided(rope, divisors),
        GgufRopeScaling::Long { short, long, original, attention_factor } => json!({
            "rope_type": "longrope", "short_factor": decimals(short), "long_factor": decimals(long),
            "original_max_position_embeddings": original, "attention_factor": attention_factor,
        }),
        _ => json!({"rope_type": "default"}),
    };
    parameters["rope_theta"] = rope.base.into();
    if rope.dimensions != head_dim {
        parameters["partial_rotary_factor"] = (rope.dimensions as f64 / head_dim.max(1) as f64).into();
    }
    parameters
}

/// Returns the shortest decimals of numbers in f32.
fn decimals(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| value.to_string().parse().unwrap_or_else(|_| f64::from(*value))).collect()
}

/// Returns the parameters of divided frequencies: Llama 3's rule if it gives these divisors, else LongRoPE with the same
/// divisors for every length.
///
/// Llama 3's rule divides short waves by 1, long ones by f, and one of length λ between them by 1 / ((1 − s) / f + s) with
/// s = (P/λ − l) / (h − l). Two divisors of the third kind give P/(h − l) and l/(h − l); with l = 1, as in all of Meta's
/// models, P and h follow.
fn divided(rope: &GgufRope, divisors: &[f32]) -> Value {
    let factor = divisors.iter().copied().fold(1.0_f32, f32::max);
    let turns = |pair: usize| {
        let frequency = rope.base.powf(-2.0 * pair as f64 / rope.dimensions as f64);
        frequency / std::f64::consts::TAU
    };
    let share = |divisor: f32| {
        let inverse = f64::from(factor).recip();
        (f64::from(divisor).recip() - inverse) / (1.0 - inverse)
    };
    let mut between = (0..divisors.len()).filter(|pair| divisors[*pair] > 1.0 && divisors[*pair] < factor);
    let ends = between.next().zip(between.next_back());
    let solved = ends.map(|(a, b)| {
        let slope = (share(divisors[a]) - share(divisors[b])) / (turns(a) - turns(b));
        let offset = slope * turns(a) - share(divisors[a]);
        ((slope / offset).round(), ((1.0 + offset.recip()) * 1e3).round() / 1e3)
    });
    for (original, high) in solved.into_iter().chain([(8192.0, 4.0)]) {
        let rule = |pair: usize| {
            let share = ((original * turns(pair) - 1.0) / (high - 1.0)).clamp(0.0, 1.0);
            ((1.0 - share) / f64::from(factor) + share).recip()
        };
        let fits = |(pair, divisor): (usize, &f32)| (rule(pair) / f64::from(*divisor) - 1.0).abs() < 1e-4;
        if original >= 1.0 && high > 1.0 && factor > 1.0 && divisors.iter().enumerate().all(fits) {
            return json!({
                "rope_type": "llama3", "factor": decimals(&[factor])[0], "low_freq_factor": 1.0,
                "high_freq_factor": high, "original_max_position_embeddings": original as u64,
            });
        }
    }
    json!({
        "rope_type": "longrope", "short_factor": decimals(divisors), "long_factor": decimals(divisors),
        "original_max_position_embeddings": 1, "attention_factor": 1.0,
    })
}
