//! Reward models: the classes of sequence classification that transformers has for the families.

use serde_json::{Value, json};

use super::nearest;

/// The module of a score head.
pub(crate) const SCORE: &str = "score";

/// The class of a decoder and that of its reward models. Granite, Qwen3.5's mixtures and multimodal models have none here.
const CLASSIFIERS: [(&str, &str); 18] = [
    ("Qwen3ForCausalLM", "Qwen3ForSequenceClassification"),
    ("Qwen2ForCausalLM", "Qwen2ForSequenceClassification"),
    ("LlamaForCausalLM", "LlamaForSequenceClassification"),
    ("MistralForCausalLM", "MistralForSequenceClassification"),
    ("Phi3ForCausalLM", "Phi3ForSequenceClassification"),
    ("SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"),
    ("Gemma2ForCausalLM", "Gemma2ForSequenceClassification"),
    ("Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    ("Olmo2ForCausalLM", "Olmo2ForSequenceClassification"),
    ("Olmo3ForCausalLM", "Olmo3ForSequenceClassification"),
    ("Exaone4ForCausalLM", "Exaone4ForSequenceClassification"),
    ("GlmForCausalLM", "GlmForSequenceClassification"),
    ("Glm4ForCausalLM", "Glm4ForSequenceClassification"),
    ("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1ForSequenceClassification"),
    ("Ministral3ForCausalLM", "Ministral3ForSequenceClassification"),
    ("Qwen3MoeForCausalLM", "Qwen3MoeForSequenceClassification"),
    ("Qwen2MoeForCausalLM", "Qwen2MoeForSequenceClassification"),
    ("MixtralForCausalLM", "MixtralForSequenceClassification"),
];

/// Returns the class of the reward models of a decoder.
pub(crate) fn classifier_of(architecture: &str) -> Option<&'static str> {
    CLASSIFIERS.iter().find(|(decoder, _)| *decoder == architecture).map(|(_, classifier)| *classifier)
}

/// Returns the `config.json` of the decoder of a reward model, or `None` for any other file. More than one label is an
/// error.
pub(crate) fn decoder_of(json: &Value) -> Result<Option<Value>, String> {
    let named = json.get("architectures").and_then(|list| list.get(0)).and_then(Value::as_str).unwrap_or_default();
    let Some((decoder, _)) = CLASSIFIERS.iter().find(|(_, classifier)| *classifier == named) else { return Ok(None) };
    // transformers writes the labels instead of their number, whose default is 2.
    let labels = json.get("id2label").and_then(Value::as_object).map(|labels| labels.len() as u64);
    let labels = labels.or_else(|| json.get("num_labels").and_then(Value::as_u64)).unwrap_or(2);
    if labels != 1 {
        return Err(format!("{named} has {labels} labels; a reward model has 1 (num_labels = 1)"));
    }
    let mut json = json.clone();
    json["architectures"] = json!([decoder]);
    Ok(Some(json))
}

/// Changes the `config.json` of a decoder to that of its reward model of the class `classifier`.
pub(crate) fn describe_score(json: &mut Value, classifier: &str) {
    json["architectures"] = json!([classifier]);
    json["id2label"] = json!({"0": "LABEL_0"});
    json["label2id"] = json!({"LABEL_0": 0});
    if let Value::Object(fields) = json {
        fields.remove("num_labels");
    }
}

/// Returns the message for an architecture without reward models.
pub(crate) fn no_classifier(architecture: &str) -> String {
    let supported: Vec<&str> = CLASSIFIERS.iter().map(|(decoder, _)| *decoder).collect();
    let near = nearest(architecture).filter(|near| *near != architecture && classifier_of(near).is_some());
    let near = near.map_or_else(String::new, |near| format!("nearest: {near}; "));
    format!(
        "method \"reward\" needs a class for sequence classification, and transformers has none that reads a reward model \
         of {architecture}; {near}supported: {}",
        supported.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::families::FAMILIES;

    #[test]
    fn every_decoder_is_a_family() {
        for (decoder, classifier) in CLASSIFIERS {
            assert!(FAMILIES.iter().any(|family| family.architecture == decoder), "{decoder}");
            assert_eq!(classifier_of(decoder), Some(classifier));
        }
        assert_eq!(classifier_of("GraniteForCausalLM"), None);
        assert!(no_classifier("GraniteForCausalLM").contains("of GraniteForCausalLM; supported: Qwen3ForCausalLM"));
    }

    #[test]
    fn a_reward_model_has_one_label() {
        let json = json!({"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}});
        let decoder = decoder_of(&json).unwrap().unwrap();
        assert_eq!(decoder["architectures"], json!(["LlamaForCausalLM"]));
        let two = json!({"architectures": ["LlamaForSequenceClassification"]});
        assert!(decoder_of(&two).unwrap_err().contains("has 2 labels; a reward model has 1"));
        assert_eq!(decoder_of(&json!({"architectures": ["LlamaForCausalLM"]})), Ok(None));
    }
}
