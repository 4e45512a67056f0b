//! The supported families, each described in one file: how its `config.json` becomes a [`ModelSpec`], what its tensors are
//! called, and what it refuses. No other place knows architecture names or their keys.
//!
//! Adding a family takes a file here with a [`Family`], its line in [`FAMILIES`], and goldens.

mod cohere2;
mod dimensions;
mod exaone4;
mod gemma2;
mod gemma3;
mod gemma4;
mod gguf;
mod glm;
mod gpt_oss;
mod granite;
mod granitemoe;
mod hunyuan_v1_dense;
mod llama;
mod ministral3;
mod mistral;
mod mixtral;
mod moe;
mod names;
mod olmo2;
mod olmo3;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_5;
mod qwen3_5_moe;
mod qwen3_moe;
mod reader;
mod score;
mod smollm3;

use serde_json::Value;

pub(crate) use gguf::config as config_of_gguf;
pub(crate) use names::TensorNames;
pub(crate) use reader::ConfigReader;
pub(crate) use score::{SCORE, classifier_of, decoder_of, describe_score, no_classifier};

use crate::ModelSpec;

/// The key of a tied output layer, which multimodal checkpoints may have beside their `text_config`.
pub(crate) const TIED: &str = "tie_word_embeddings";

/// A family of models.
pub(crate) struct Family {
    /// The entry of `architectures`.
    pub(crate) architecture: &'static str,
    /// The value of `model_type`.
    pub(crate) model_type: &'static str,
    /// The key of `config.json` under which the decoder is described; `None` for the file itself.
    pub(crate) section: Option<&'static str>,
    /// The names of its tensors.
    pub(crate) names: TensorNames,
    /// Reads the spec; what is wrong is noted in the reader.
    pub(crate) spec: fn(&mut ConfigReader<'_>) -> ModelSpec,
}

const FAMILIES: &[&Family] = &[
    &qwen3::FAMILY,
    &qwen3_5::TEXT,
    &qwen3_5::MULTIMODAL,
    &qwen3_5_moe::TEXT,
    &qwen3_5_moe::MULTIMODAL,
    &qwen2::FAMILY,
    &llama::FAMILY,
    &mistral::FAMILY,
    &phi3::FAMILY,
    &smollm3::FAMILY,
    &granite::FAMILY,
    &granitemoe::FAMILY,
    &gemma2::FAMILY,
    &gemma3::TEXT,
    &gemma3::MULTIMODAL,
    &gemma4::TEXT,
    &gemma4::MULTIMODAL,
    &olmo2::FAMILY,
    &olmo3::FAMILY,
    &exaone4::FAMILY,
    &cohere2::FAMILY,
    &glm::GLM,
    &glm::GLM4,
    &hunyuan_v1_dense::FAMILY,
    &ministral3::TEXT,
    &ministral3::MULTIMODAL,
    &qwen3_moe::FAMILY,
    &qwen2_moe::FAMILY,
    &mixtral::FAMILY,
    &gpt_oss::FAMILY,
];

/// Returns the family named by `architectures`, or by `model_type` where that is missing.
pub(crate) fn of(json: &Value) -> Result<&'static Family, String> {
    let named = json.get("architectures").and_then(|v| v.get(0)).and_then(Value::as_str);
    let model_type = json.get("model_type").and_then(Value::as_str);
    let found = match named {
        Some(name) => FAMILIES.iter().find(|f| f.architecture == name),
        None => FAMILIES.iter().find(|f| Some(f.model_type) == model_type),
    };
    found.copied().ok_or_else(|| {
        let supported: Vec<&str> = FAMILIES.iter().map(|f| f.architecture).collect();
        let supported = supported.join(", ");
        match named.or(model_type) {
            Some(name) => {
                let nearest = nearest(name).map_or_else(String::new, |nearest| format!("nearest: {nearest}; "));
                format!("architecture \"{name}\" is not supported; {nearest}supported: {supported}")
            }
            None => format!("architectures is missing; supported: {supported}"),
        }
    })
}

/// Returns the reason why models of an architecture cannot be trained in f16, if there is one.
///
/// An f32 residual stream suffices for Qwen3-MoE, where only the gradient along the stream leaves f16.
pub(crate) fn f16_training_obstacle(architecture: &str) -> Option<&'static str> {
    let is = |families: &[&Family]| families.iter().any(|family| family.architecture == architecture);
    if is(&[&gemma3::TEXT, &gemma3::MULTIMODAL]) {
        return Some("the results of its layers exceed 65,504, the largest value of f16");
    }
    if is(&[&gemma4::TEXT, &gemma4::MULTIMODAL]) {
        return Some("its layers have not been compared with f32 in f16");
    }
    if is(&[&gpt_oss::FAMILY]) {
        return Some("gradients within its experts exceed 65,504, the largest value of f16");
    }
    if is(&[&qwen3_5::TEXT, &qwen3_5::MULTIMODAL, &qwen3_5_moe::TEXT, &qwen3_5_moe::MULTIMODAL]) {
        return Some("its gated delta layers have not been compared with f32 in f16");
    }
    None
}

/// The supported architecture whose name shares the longest beginning with `name`, if that is more than a few letters.
fn nearest(name: &str) -> Option<&'static str> {
    let shared = |known: &str| {
        let pairs = known.chars().zip(name.chars());
        pairs.take_while(|(a, b)| a.eq_ignore_ascii_case(b)).count()
    };
    // The first of equal ones.
    let best = FAMILIES.iter().rev().map(|f| f.architecture).max_by_key(|known| shared(known))?;
    (shared(best) >= 4).then_some(best)
}
