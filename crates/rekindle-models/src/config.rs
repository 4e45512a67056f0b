//! The contents of a `config.json`.

use rekindle_hub::Checkpoint;
use rekindle_rope::{ContextExtension, RopeConfig, RopeScaling, extend_context};
use serde_json::Value;

use crate::families::{self, ConfigReader, SCORE, TIED, TensorNames};
use crate::parameters::{LayerRole, ParameterSpec};
use crate::spec::{AttentionSpec, FeedForwardSpec, HeadSpec};
use crate::{Error, LayerSpec, ModelSpec, Role};

/// A checkpoint's `config.json`: the decoder that it describes, and the file itself.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The entry of `architectures`, such as `Qwen3ForCausalLM`.
    pub architecture: String,
    /// The decoder.
    pub spec: ModelSpec,
    /// The longest sequence that the checkpoint was trained for.
    pub max_position_embeddings: usize,
    /// The whole file, written back by `save_pretrained`.
    pub json: Value,
    /// The key of the file under which the decoder is described; `None` for the file itself.
    section: Option<&'static str>,
    /// True if `rope_scaling` cannot extend the rotary embedding.
    has_fixed_context: bool,
    /// True for a reward model, whose head is a score.
    has_score_head: bool,
    /// The family's tensor names.
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
        if let Some(decoder) = families::decoder_of(json).map_err(|problem| vec![problem])? {
            return Self::from_json(&decoder)?.with_score_head().map_err(|error| vec![error.to_string()]);
        }
        let family = families::of(json).map_err(|problem| vec![problem])?;
        let decoder = match family.section {
            None => json.clone(),
            Some(key) => {
                let mut decoder = json.get(key).ok_or_else(|| vec![format!("{key} is missing")])?.clone();
                // Some wrappers alone say it.
                if let (Value::Object(fields), Some(tied)) = (&mut decoder, json.get(TIED)) {
                    fields.entry(TIED).or_insert_with(|| tied.clone());
                }
                decoder
            }
        };
        let mut reader = ConfigReader::new(&decoder);
        let spec = (family.spec)(&mut reader);
        let max_position_embeddings = reader.positions();
        let has_fixed_context = reader.has_fixed_context();
        let written = reader.finish()?;
        let json = match family.section {
            None => written,
            Some(key) => {
                let mut json = json.clone();
                json[key] = written;
                json
            }
        };
        Ok(Self {
            architecture: family.architecture.to_owned(),
            spec,
            max_position_embeddings,
            json,
            section: family.section,
            has_fixed_context,
            has_score_head: false,
            names: family.names,
        })
    }

    /// Returns the configuration of the reward model on this decoder: a head that gives one score, without a vocabulary.
    /// That of a reward model is unchanged.
    ///
    /// # Errors
    /// [`Error::Argument`] for an architecture of which transformers has no reward models.
    pub fn with_score_head(mut self) -> Result<Self, Error> {
        if self.has_score_head {
            return Ok(self);
        }
        let Some(classifier) = families::classifier_of(&self.architecture) else {
            return Err(Error::Argument(families::no_classifier(&self.architecture)));
        };
        self.architecture = classifier.to_owned();
        self.spec.head = HeadSpec { tied: false, multiplier: None, softcap: None };
        self.names.head = SCORE;
        families::describe_score(&mut self.json, classifier);
        self.has_score_head = true;
        Ok(self)
    }

    /// Returns true for a reward model, whose head is a score instead of the vocabulary.
    pub fn has_score_head(&self) -> bool {
        self.has_score_head
    }

    /// Returns the shape of the head: a row for each token id, or one for a score.
    pub(crate) fn head_shape(&self) -> [usize; 2] {
        [if self.has_score_head { 1 } else { self.spec.vocab_size }, self.spec.hidden_size]
    }

    /// Returns the id of padding, which is never scored.
    pub(crate) fn pad_token_id(&self) -> Option<u32> {
        let id = self.json.get("pad_token_id")?.as_u64()?;
        u32::try_from(id).ok()
    }

    /// Returns the standard deviation of new weights.
    pub(crate) fn initializer_range(&self) -> f64 {
        self.json.get("initializer_range").and_then(Value::as_f64).unwrap_or(0.02)
    }

    /// Returns the reason why models of this family cannot be trained in f16, if there is one.
    pub fn f16_training_obstacle(&self) -> Option<&'static str> {
        families::f16_training_obstacle(&self.architecture)
    }

    /// Returns this configuration for documents of up to `length` tokens, and the context extension. Within the model's
    /// window there is none, unless `rope_scaling` is a table. The rules are those of [`extend_context`].
    ///
    /// # Errors
    /// [`Error::Argument`] for a length that `rope_scaling` does not reach.
    pub fn with_context_length(
        mut self,
        length: usize,
        rope_scaling: &RopeScaling,
    ) -> Result<(Self, Option<ContextExtension>), Error> {
        let argument = |error: rekindle_rope::Error| Error::Argument(error.to_string());
        if self.has_fixed_context {
            return if *rope_scaling == RopeScaling::Auto && length <= self.max_position_embeddings {
                Ok((self, None))
            } else {
                Err(Error::Argument(format!(
                    "rope_scaling cannot extend the rotary embedding of {}; remove it, and set max_seq_length to at \
                     most {}",
                    self.architecture, self.max_position_embeddings
                )))
            };
        }
        let json = self.section.map_or(&self.json, |section| &self.json[section]);
        let extension = extend_context(json, self.head_dim(), self.max_position_embeddings, length, rope_scaling);
        let extension = extension.map_err(argument)?;
        if let Some(extension) = &extension {
            self.spec.ropes = vec![extension.positions.rope(self.head_dim()).map_err(argument)?];
            self.max_position_embeddings = extension.positions.max_position_embeddings();
            extension.positions.apply(self.decoder_json_mut());
        }
        Ok((self, extension))
    }

    /// The part of the file that describes the decoder.
    pub(crate) fn decoder_json_mut(&mut self) -> &mut Value {
        match self.section {
            None => &mut self.json,
            Some(section) => &mut self.json[section],
        }
    }

    /// Sets a key that describes the decoder.
    pub(crate) fn set_json(&mut self, key: &str, value: Value) {
        // A key that a wrapper repeats stays the same in both places.
        let outside = self.section.is_none() || self.json.get(key).is_some();
        if let Value::Object(fields) = self.decoder_json_mut() {
            fields.insert(key.to_owned(), value.clone());
        }
        if let (true, Value::Object(fields)) = (outside, &mut self.json) {
            fields.insert(key.to_owned(), value);
        }
    }

    /// Returns the number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.spec.vocab_size
    }

    /// Returns the width of the residual stream.
    pub fn hidden_size(&self) -> usize {
        self.spec.hidden_size
    }

    /// Returns the number of decoder layers.
    pub fn num_hidden_layers(&self) -> usize {
        self.spec.layers.len()
    }

    /// Returns the width of the first layer's feed-forward half; of a mixture, the total width of a token's experts.
    pub fn intermediate_size(&self) -> usize {
        match &self.spec.layers[0].feed_forward {
            FeedForwardSpec::Gated(gated) => gated.intermediate_size,
            FeedForwardSpec::Plain { intermediate_size, .. } => *intermediate_size,
            FeedForwardSpec::Moe(moe) => {
                moe.top_k * moe.intermediate_size + moe.shared.map_or(0, |shared| shared.intermediate_size)
            }
        }
    }

    /// The tensor of all experts of a layer in the place of the first of its linears, and none in that of the others. Any
    /// other parameter is as it is.
    pub(crate) fn stacked_parameter(&self, parameter: ParameterSpec) -> Option<ParameterSpec> {
        let (Role::Layer(layer, _), Some((role, expert))) = (parameter.role, parameter.role.expert()) else {
            return Some(parameter);
        };
        let (stack, place) = role.place();
        if expert > 0 || place > 0 {
            return None;
        }
        let FeedForwardSpec::Moe(moe) = &self.spec.layers[layer].feed_forward else { return Some(parameter) };
        let ([rows, input], role) = (moe.stack_shape(stack, self.hidden_size()), LayerRole::Experts(stack));
        let (role, mut shape) = (Role::Layer(layer, role), vec![moe.experts, rows / moe.experts, input]);
        if self.names.experts.transposed {
            shape.swap(1, 2);
        }
        Some(ParameterSpec { name: self.names.tensor(role), role, shape })
    }

    /// The share of tokens that a parameter computes with: 1, or top_k of all experts for the linears of one.
    pub fn active_share(&self, role: Role) -> f64 {
        match (role, role.expert()) {
            (Role::Layer(layer, _), Some(_)) => match &self.spec.layers[layer].feed_forward {
                FeedForwardSpec::Moe(moe) => moe.top_k as f64 / moe.experts as f64,
                _ => 1.0,
            },
            _ => 1.0,
        }
    }

    /// The first softmax attention.
    fn attention(&self) -> Option<&AttentionSpec> {
        self.spec.layers.iter().find_map(LayerSpec::attention)
    }

    /// Query heads of the first layer with softmax attention.
    pub fn num_attention_heads(&self) -> usize {
        self.attention().map_or(0, |attention| attention.heads)
    }

    /// Key/value heads of the first layer with softmax attention.
    pub fn num_key_value_heads(&self) -> usize {
        self.attention().map_or(0, |attention| attention.kv_heads)
    }

    /// Channels of a head in the first layer with softmax attention.
    pub fn head_dim(&self) -> usize {
        self.attention().map_or(0, |attention| attention.head_dim)
    }

    /// The modules that stay dense when linears are quantized: those that are asked for or else the head, and the routers
    /// of mixtures, whose choice a rounded weight would change. `None` where that is the head alone.
    pub(crate) fn skip_modules(&self, asked: Option<&[String]>) -> Option<Vec<String>> {
        let mut routers: Vec<String> = Vec::new();
        for layer in &self.spec.layers {
            let names = layer.linears(self.hidden_size()).into_iter().map(|linear| linear.role);
            let names = names.filter(|role| role.is_router()).map(|role| (self.names.linear)(role).to_owned());
            routers.extend(names.filter(|name| !routers.contains(name)).collect::<Vec<_>>());
        }
        if asked.is_none() && routers.is_empty() {
            return None;
        }
        let asked = asked.map_or_else(|| vec!["lm_head".to_owned()], <[String]>::to_vec);
        routers.retain(|router| !asked.contains(router));
        Some(asked.into_iter().chain(routers).collect())
    }

    /// Returns true if the output layer is the embedding table.
    pub fn tie_word_embeddings(&self) -> bool {
        self.spec.head.tied
    }

    /// Returns the rotary position embedding; the first one if layers differ.
    pub fn rope(&self) -> &RopeConfig {
        &self.spec.ropes[0]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{AttentionBiases, AttentionMask};
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
        let attention = |json: &Value| ModelConfig::from_json(json).unwrap().attention().unwrap().clone();
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

    /// The file of google/gemma-3-4b-it leaves out what the class has; older text models spell out the rest.
    #[test]
    fn gemma_3_is_read_in_every_spelling() {
        let multimodal = json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "vision_config": {},
            "text_config": {
                "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text", "num_hidden_layers": 34,
                "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "sliding_window": 1024
            }
        });
        let older = json!({
            "architectures": ["Gemma3ForCausalLM"], "hidden_size": 2560, "intermediate_size": 10240,
            "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
            "vocab_size": 262208, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
            "rope_scaling": { "factor": 8.0, "rope_type": "linear" }, "sliding_window": 1024,
            "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256, "max_position_embeddings": 131072
        });
        let mut newer = older.clone();
        let fields = newer.as_object_mut().unwrap();
        fields.remove("sliding_window_pattern");
        let kind = |layer| if layer % 6 == 5 { "full_attention" } else { "sliding_attention" };
        fields.insert("layer_types".to_owned(), (0..34).map(kind).collect());
        let [multimodal, older, newer] = [multimodal, older, newer].map(|json| ModelConfig::from_json(&json).unwrap());
        assert_eq!(multimodal.spec, older.spec);
        assert_eq!(newer.spec, older.spec);
        assert_eq!([multimodal.max_position_embeddings, older.max_position_embeddings], [131_072; 2]);
        let thetas: Vec<f64> = older.spec.ropes.iter().map(RopeConfig::theta).collect();
        assert_eq!(thetas, [1e6, 1e4]);
        let sixth = older.spec.layers[5].attention().unwrap();
        assert_eq!((sixth.mask, sixth.rope.unwrap().id.0, sixth.scale), (AttentionMask::Full, 0, 0.0625));
        let first = older.spec.layers[0].attention().unwrap();
        assert_eq!((first.mask, first.rope.unwrap().id.0), (AttentionMask::Sliding(1024), 1));
    }

    /// A key of the decoder is set in its section, and outside of it where the wrapper repeats it.
    #[test]
    fn a_wrapper_keeps_its_own_keys() {
        let json = json!({
            "architectures": ["Gemma3ForConditionalGeneration"], "tie_word_embeddings": true,
            "text_config": { "num_hidden_layers": 2, "vocab_size": 100 }
        });
        let mut config = ModelConfig::from_json(&json).unwrap().resized(112).unwrap();
        config.set_json("tie_word_embeddings", json!(false));
        assert_eq!(config.json["text_config"]["vocab_size"], 112);
        assert!(config.json.get("vocab_size").is_none());
        assert_eq!(config.json["tie_word_embeddings"], false);
        assert_eq!(config.json["text_config"]["tie_word_embeddings"], false);
        let longer = config.with_context_length(200_000, &RopeScaling::Auto).unwrap_err().to_string();
        assert!(longer.contains("rope_scaling cannot extend"), "{longer}");
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
        json["architectures"] = json!(["Qwen3XForCausalLM"]);
        let text = ModelConfig::from_json(&json).unwrap_err().join("; ");
        assert!(text.contains("\"Qwen3XForCausalLM\" is not supported; nearest: Qwen3ForCausalLM; "), "{text}");
        json["architectures"] = json!(["GPT2LMHeadModel"]);
        let text = ModelConfig::from_json(&json).unwrap_err().join("; ");
        assert!(text.contains("GPT2LMHeadModel\" is not supported; supported: Qwen3ForCausalLM"), "{text}");
    }
}
