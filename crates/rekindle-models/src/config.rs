//! A model as its `config.json` describes it.

use rekindle_hub::Checkpoint;
use rekindle_rope::{ContextExtension, RopeConfig, RopeScaling, extend_context};
use serde_json::Value;

use crate::families::{self, ConfigReader, TensorNames};
use crate::{Error, ModelSpec};

/// A checkpoint's `config.json`: the decoder that it describes, and the file itself.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The entry of `architectures`, such as `Qwen3ForCausalLM`.
    pub architecture: String,
    /// The decoder.
    pub spec: ModelSpec,
    /// The longest sequence the checkpoint was made for.
    pub max_position_embeddings: usize,
    /// The whole file, written back by `save_pretrained`.
    pub json: Value,
    /// The key of the file under which the decoder is described; `None` for the file itself.
    section: Option<&'static str>,
    /// What the family calls its tensors.
    pub(crate) names: TensorNames,
}

impl ModelConfig {
    /// Reads the configuration of a checkpoint.
    ///
    /// # Errors
    /// [`Error::Config`] that lists every value which is missing, ill-typed or would change the maths in a
    /// way that is not supported.
    pub fn from_checkpoint(checkpoint: &Checkpoint) -> Result<Self, Error> {
        Self::from_json(checkpoint.config())
            .map_err(|problems| Error::Config { path: checkpoint.path().join("config.json"), problems })
    }

    /// Reads the content of a `config.json`; on failure one sentence for each problem.
    pub fn from_json(json: &Value) -> Result<Self, Vec<String>> {
        let family = families::of(json).map_err(|problem| vec![problem])?;
        let decoder = match family.section {
            None => json,
            Some(key) => json.get(key).ok_or_else(|| vec![format!("{key} is missing")])?,
        };
        let mut reader = ConfigReader::new(decoder);
        let spec = (family.spec)(&mut reader);
        let max_position_embeddings = reader.positions();
        let decoder = reader.finish()?;
        let json = match family.section {
            None => decoder,
            Some(key) => {
                let mut json = json.clone();
                json[key] = decoder;
                json
            }
        };
        Ok(Self {
            architecture: family.architecture.to_owned(),
            spec,
            max_position_embeddings,
            json,
            section: family.section,
            names: family.names,
        })
    }

    /// This model for documents of up to `length` tokens, and how its context was extended: not at all within its
    /// window, unless `rope_scaling` is a table. The rules are those of [`extend_context`].
    ///
    /// # Errors
    /// [`Error::Argument`] for a length that `rope_scaling` does not reach.
    pub fn with_context_length(
        mut self,
        length: usize,
        rope_scaling: &RopeScaling,
    ) -> Result<(Self, Option<ContextExtension>), Error> {
        let argument = |error: rekindle_rope::Error| Error::Argument(error.to_string());
        if self.spec.ropes.len() != 1 {
            return if *rope_scaling == RopeScaling::Auto && length <= self.max_position_embeddings {
                Ok((self, None))
            } else {
                Err(Error::Argument(format!(
                    "{} has a rotary embedding for each kind of layer, and rope_scaling cannot extend it; leave it out, and \
                     set max_seq_length to at most {}",
                    self.architecture, self.max_position_embeddings
                )))
            };
        }
        let extension = extend_context(&self.json, self.head_dim(), self.max_position_embeddings, length, rope_scaling);
        let extension = extension.map_err(argument)?;
        if let Some(extension) = &extension {
            self.spec.ropes = vec![extension.positions.rope(self.head_dim()).map_err(argument)?];
            self.max_position_embeddings = extension.positions.max_position_embeddings();
            extension.positions.apply(&mut self.json);
        }
        Ok((self, extension))
    }

    /// Sets a key that describes the decoder.
    pub(crate) fn set_json(&mut self, key: &str, value: Value) {
        // A key that a wrapper repeats stays the same in both places.
        let outside = self.section.is_none() || self.json.get(key).is_some();
        if let Some(Value::Object(fields)) = self.section.and_then(|section| self.json.get_mut(section)) {
            fields.insert(key.to_owned(), value.clone());
        }
        if let (true, Value::Object(fields)) = (outside, &mut self.json) {
            fields.insert(key.to_owned(), value);
        }
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.spec.vocab_size
    }

    /// Width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.spec.hidden_size
    }

    /// Number of decoder layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.spec.layers.len()
    }

    /// Width of the first layer's gated feed-forward half.
    pub fn intermediate_size(&self) -> usize {
        self.spec.layers[0].gated().map_or(0, |gated| gated.intermediate_size)
    }

    /// Query heads of the first layer.
    pub fn num_attention_heads(&self) -> usize {
        self.spec.layers[0].attention.heads
    }

    /// Key/value heads of the first layer.
    pub fn num_key_value_heads(&self) -> usize {
        self.spec.layers[0].attention.kv_heads
    }

    /// Channels of a head in the first layer.
    pub fn head_dim(&self) -> usize {
        self.spec.layers[0].attention.head_dim
    }

    /// Returns true if the output layer is the embedding table.
    pub fn tie_word_embeddings(&self) -> bool {
        self.spec.head.tied
    }

    /// The rotary position embedding; the first where layers differ.
    pub fn rope(&self) -> &RopeConfig {
        &self.spec.ropes[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::AttentionBiases;
    use serde_json::json;

    fn qwen3() -> Value {
        json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 40, "intermediate_size": 52,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
            "vocab_size": 131, "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "hidden_act": "silu",
            "max_position_embeddings": 256, "rope_theta": 1e6
        })
    }

    #[test]
    fn families_differ_in_norms_and_biases() {
        let attention = |json: &Value| ModelConfig::from_json(json).unwrap().spec.layers.remove(0).attention;
        let qwen = attention(&qwen3());
        assert!(qwen.qk_norm.is_some() && qwen.biases == AttentionBiases::default() && qwen.head_dim == 24);
        let mut json = qwen3();
        json["architectures"] = json!(["Qwen2ForCausalLM"]);
        json.as_object_mut().unwrap().remove("head_dim");
        let qwen = attention(&json);
        assert!(qwen.qk_norm.is_none() && qwen.biases.qkv && !qwen.biases.o && qwen.head_dim == 10);
        json["architectures"] = json!(["LlamaForCausalLM"]);
        json["attention_bias"] = json!(true);
        assert_eq!(attention(&json).biases, AttentionBiases { qkv: true, o: true });
        let layers = ModelConfig::from_json(&json).unwrap().spec.layers;
        assert!(layers.len() == 3 && layers.iter().all(|layer| layer.gated().is_some_and(|gated| !gated.bias)));
    }

    #[test]
    fn every_problem_is_listed_by_name() {
        let mut json = qwen3();
        json["hidden_act"] = json!("gelu");
        json["use_sliding_window"] = json!(true);
        json["vocab_size"] = json!("many");
        json.as_object_mut().unwrap().remove("num_hidden_layers");
        let text = ModelConfig::from_json(&json).unwrap_err().join("; ");
        for part in [
            "hidden_act is \"gelu\"; only \"silu\" is supported",
            "use_sliding_window is true",
            "vocab_size is \"many\"; expected a positive integer",
            "num_hidden_layers is missing",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn an_unknown_architecture_comes_with_the_nearest() {
        let mut json = qwen3();
        json["architectures"] = json!(["Qwen3MoeForCausalLM"]);
        let text = ModelConfig::from_json(&json).unwrap_err().join("; ");
        assert!(text.contains("\"Qwen3MoeForCausalLM\" is not supported; nearest: Qwen3ForCausalLM; "), "{text}");
        json["architectures"] = json!(["GPT2LMHeadModel"]);
        let text = ModelConfig::from_json(&json).unwrap_err().join("; ");
        assert!(text.contains("GPT2LMHeadModel\" is not supported; supported: Qwen3ForCausalLM"), "{text}");
    }
}
