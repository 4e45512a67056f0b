//! The numbers of a model, from `config.json`.

use rekindle_hub::Checkpoint;
use rekindle_kernels::attention::Heads;
use rekindle_rope::{RopeConfig, RopeScaling, Widened, widen};
use serde_json::Value;

use crate::{Error, family};

/// The numbers that the shared structure is built from. Field names are those of `config.json`.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// The entry of `architectures`, such as `Qwen3ForCausalLM`.
    pub architecture: String,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward half.
    pub intermediate_size: usize,
    /// Number of decoder blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads.
    pub num_key_value_heads: usize,
    /// Channels of a head, not necessarily `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Added to the mean square in every norm.
    pub rms_norm_eps: f64,
    /// Whether the output layer is the embedding table.
    pub tie_word_embeddings: bool,
    /// The longest sequence the checkpoint was made for.
    pub max_position_embeddings: usize,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether queries and keys are normalized head by head.
    pub qk_norm: bool,
    /// Which linears carry a bias.
    pub biases: Biases,
    /// The whole file, written back by `save_pretrained`.
    pub json: Value,
}

/// Far beyond any model; a broken file must not fill the memory with names of layers.
const MOST_LAYERS: usize = 10_000;

/// Which linears of a block carry a bias.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Biases {
    /// `q_proj`, `k_proj` and `v_proj`.
    pub qkv: bool,
    /// `o_proj`.
    pub o: bool,
    /// `gate_proj`, `up_proj` and `down_proj`.
    pub mlp: bool,
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
        let mut reader = Reader { json, problems: Vec::new() };
        let family = match family::of(json) {
            Ok(family) => family,
            Err(problem) => return Err(vec![problem]),
        };
        let hidden_size = reader.size("hidden_size", None);
        let num_attention_heads = reader.size("num_attention_heads", None);
        let head_dim = reader.size("head_dim", Some((family.default_head_dim)(hidden_size, num_attention_heads)));
        let num_key_value_heads = reader.size("num_key_value_heads", Some(num_attention_heads));
        if !num_attention_heads.is_multiple_of(num_key_value_heads.max(1)) {
            reader.problems.push(format!(
                "num_attention_heads {num_attention_heads} is no multiple of num_key_value_heads {num_key_value_heads}"
            ));
        }
        reader.only("hidden_act", &Value::from("silu"));
        reader.only("attention_dropout", &Value::from(0.0));
        reader.only("use_sliding_window", &Value::from(false));
        reader.full_attention_only();
        let biases = (family.biases)(&mut reader);
        let intermediate_size = reader.size("intermediate_size", None);
        let num_hidden_layers = reader.size("num_hidden_layers", None);
        let vocab_size = reader.size("vocab_size", None);
        let rms_norm_eps = reader.number("rms_norm_eps", 1e-6);
        let tie_word_embeddings = reader.flag("tie_word_embeddings", false);
        let max_position_embeddings = reader.size("max_position_embeddings", Some(2048));
        if num_hidden_layers > MOST_LAYERS {
            reader.problems.push(format!("num_hidden_layers is {num_hidden_layers}; expected at most {MOST_LAYERS}"));
        }
        if !(rms_norm_eps.is_finite() && rms_norm_eps >= 0.0) {
            reader.problems.push(format!("rms_norm_eps is {rms_norm_eps}; expected at least 0"));
        }
        let rope = match RopeConfig::from_config(json, head_dim.max(2)) {
            Ok(rope) => Some(rope),
            Err(error) => {
                reader.problems.push(error.to_string());
                None
            }
        };
        let config = rope.map(|rope| Self {
            architecture: family.architecture.to_owned(),
            hidden_size,
            intermediate_size,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            vocab_size,
            rms_norm_eps,
            tie_word_embeddings,
            max_position_embeddings,
            rope,
            qk_norm: family.qk_norm,
            biases,
            json: json.clone(),
        });
        match config {
            Some(config) if reader.problems.is_empty() => Ok(config),
            _ => Err(reader.problems),
        }
    }

    /// This model for documents of up to `length` tokens, and what that took: nothing within its window, unless
    /// `rope_scaling` is a table. The rules are those of [`widen`].
    ///
    /// # Errors
    /// [`Error::Argument`] for a length that `rope_scaling` does not reach.
    pub fn widened(mut self, length: usize, rope_scaling: &RopeScaling) -> Result<(Self, Option<Widened>), Error> {
        let argument = |error: rekindle_rope::Error| Error::Argument(error.to_string());
        let widened = widen(&self.json, self.head_dim, self.max_position_embeddings, length, rope_scaling);
        let widened = widened.map_err(argument)?;
        if let Some(widened) = &widened {
            self.rope = widened.positions.rope(self.head_dim).map_err(argument)?;
            self.max_position_embeddings = widened.positions.max_position_embeddings();
            widened.positions.apply(&mut self.json);
        }
        Ok((self, widened))
    }

    /// The heads of every attention layer.
    pub(crate) fn heads(&self) -> Heads {
        Heads {
            heads: self.num_attention_heads,
            kv_heads: self.num_key_value_heads,
            head_dim: self.head_dim,
            scale: (self.head_dim as f32).sqrt().recip(),
        }
    }

    /// Name and shape of every tensor in a checkpoint of this model, in the order of the forward pass.
    pub fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        crate::names::needed(self).into_iter().map(|needed| (needed.name, needed.shape)).collect()
    }
}

/// Takes values out of `config.json`, collecting what is wrong.
pub(crate) struct Reader<'a> {
    json: &'a Value,
    problems: Vec<String>,
}

impl Reader<'_> {
    /// A positive integer; 1 with a problem noted if it is none.
    fn size(&mut self, key: &str, default: Option<usize>) -> usize {
        match (self.json.get(key).filter(|v| !v.is_null()), default) {
            (Some(value), _) => match value.as_u64() {
                Some(n @ 1..=0xFFFF_FFFF) => n as usize,
                _ => self.wrong(key, value, "a positive integer", 1),
            },
            (None, Some(default)) => default,
            (None, None) => {
                self.problems.push(format!("{key} is missing"));
                1
            }
        }
    }

    fn number(&mut self, key: &str, default: f64) -> f64 {
        match self.json.get(key).filter(|v| !v.is_null()) {
            Some(value) => value.as_f64().unwrap_or_else(|| self.wrong(key, value, "a number", default)),
            None => default,
        }
    }

    pub(crate) fn flag(&mut self, key: &str, default: bool) -> bool {
        match self.json.get(key).filter(|v| !v.is_null()) {
            Some(value) => value.as_bool().unwrap_or_else(|| self.wrong(key, value, "true or false", default)),
            None => default,
        }
    }

    /// Notes a problem unless `key` is absent or has the one value that is supported.
    fn only(&mut self, key: &str, supported: &Value) {
        if let Some(value) = self.json.get(key).filter(|v| !v.is_null()) {
            let same = value == supported || (value.as_f64().is_some() && value.as_f64() == supported.as_f64());
            if !same {
                self.problems.push(format!("{key} is {value}; only {supported} is supported"));
            }
        }
    }

    fn full_attention_only(&mut self) {
        let types = self.json.get("layer_types").and_then(Value::as_array);
        if let Some(other) = types.into_iter().flatten().find(|v| v.as_str() != Some("full_attention")) {
            self.problems.push(format!("layer_types has {other}; only \"full_attention\" is supported"));
        }
    }

    fn wrong<T>(&mut self, key: &str, value: &Value, expected: &str, instead: T) -> T {
        self.problems.push(format!("{key} is {value}; expected {expected}"));
        instead
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let config = ModelConfig::from_json(&qwen3()).unwrap();
        assert!(config.qk_norm && config.biases == Biases::default() && config.head_dim == 24);
        let mut json = qwen3();
        json["architectures"] = json!(["Qwen2ForCausalLM"]);
        json.as_object_mut().unwrap().remove("head_dim");
        let config = ModelConfig::from_json(&json).unwrap();
        assert!(!config.qk_norm && config.biases.qkv && !config.biases.o && config.head_dim == 10);
        json["architectures"] = json!(["LlamaForCausalLM"]);
        json["attention_bias"] = json!(true);
        let config = ModelConfig::from_json(&json).unwrap();
        assert_eq!(config.biases, Biases { qkv: true, o: true, mlp: false });
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
        json["architectures"] = json!(["GPT2LMHeadModel"]);
        let text = ModelConfig::from_json(&json).unwrap_err().join("; ");
        assert!(text.contains("GPT2LMHeadModel") && text.contains("Qwen3ForCausalLM"), "{text}");
    }
}
