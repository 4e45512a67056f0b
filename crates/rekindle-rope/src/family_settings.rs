use serde_json::{Map, Value, json};

use crate::config::one_problem;
use crate::{Error, RopeConfig};

impl RopeConfig {
    /// Reads the position settings that a model's `config.json` has for one kind of layer, `full_attention` or
    /// `sliding_attention`.
    ///
    /// transformers 5 writes `rope_parameters` with an object for each kind. Before, `rope_theta` and `rope_scaling` were
    /// those of full layers, and sliding layers were unscaled. `default_theta` holds where the file names no `rope_theta`
    /// for the kind.
    ///
    /// # Errors
    /// The same as [`from_config`](Self::from_config).
    pub fn of_layer_type(config: &Value, head_dim: usize, kind: &str, default_theta: f64) -> Result<Self, Error> {
        let mut config = config.clone();
        let fields = config.as_object_mut().ok_or_else(|| one_problem("config.json is not a JSON object"))?;
        let by_kind = fields.get("rope_parameters").filter(|parameters| !parameters.is_null()).cloned();
        if by_kind.is_some() || kind == "sliding_attention" {
            fields.remove("rope_theta");
            fields.remove("rope_scaling");
        }
        if let Some(by_kind) = by_kind {
            fields.insert("rope_parameters".to_owned(), by_kind.get(kind).cloned().unwrap_or(Value::Null));
        }
        Self::set_default(&mut config, "rope_theta", default_theta);
        Self::from_config(&config, head_dim)
    }

    /// Returns a problem if a configuration does not state the rotary embedding, for families whose class default is none of
    /// [`from_config`](Self::from_config)'s.
    pub fn missing(config: &Value) -> Option<String> {
        section(config)
            .is_none()
            .then(|| "rope_parameters is missing; expected the scaling of the checkpoint".to_owned())
    }

    /// Reads the type `dynamic` with an `alpha`, as Hunyuan has it: theta is `rope_theta · alpha^(d / (d − 2))`, whatever the
    /// length. `None` for other position settings.
    ///
    /// # Errors
    /// The same as [`from_config`](Self::from_config).
    pub fn with_alpha(config: &Value, head_dim: usize) -> Option<Result<Self, Error>> {
        let parameters = section(config)?;
        let kind = parameters.get("rope_type").or_else(|| parameters.get("type")).and_then(Value::as_str);
        let alpha = parameters.get("alpha").and_then(Value::as_f64).filter(|alpha| *alpha > 0.0)?;
        if kind != Some("dynamic") || head_dim <= 2 {
            return None;
        }
        let theta = parameters.get("rope_theta").or_else(|| config.get("rope_theta")).and_then(Value::as_f64);
        let d = head_dim as f64;
        let theta = theta.unwrap_or(10_000.0) * alpha.powf(d / (d - 2.0));
        Some(Self::from_config(&json!({ "rope_theta": theta }), head_dim))
    }
}

/// The growth of queries with the position: q · (1 + beta · ln(1 + ⌊position / window⌋)) (Ministral 3).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QueryGrowth {
    /// `llama_4_scaling_beta`.
    pub beta: f64,
    /// `original_max_position_embeddings`.
    pub window: usize,
}

impl QueryGrowth {
    /// Reads it from a model's `config.json`; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Parameters`] for a `llama_4_scaling_beta` without `original_max_position_embeddings`.
    pub fn from_config(config: &Value) -> Result<Option<Self>, Error> {
        let Some(parameters) = section(config) else { return Ok(None) };
        let Some(beta) = parameters.get("llama_4_scaling_beta").and_then(Value::as_f64) else { return Ok(None) };
        let window = parameters.get("original_max_position_embeddings").and_then(Value::as_u64);
        match window {
            Some(window @ 1..) => Ok(Some(Self { beta, window: window as usize })),
            _ => Err(one_problem("llama_4_scaling_beta needs original_max_position_embeddings, which is missing")),
        }
    }
}

/// The object with the parameters of the rotary embedding.
fn section(config: &Value) -> Option<&Map<String, Value>> {
    ["rope_parameters", "rope_scaling"].iter().find_map(|key| config.get(*key)?.as_object())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thetas(config: Value) -> [f64; 2] {
        [("full_attention", 1e6), ("sliding_attention", 1e4)]
            .map(|(kind, theta)| RopeConfig::of_layer_type(&config, 8, kind, theta).expect("valid").theta())
    }

    #[test]
    fn each_kind_of_layer_has_its_own_theta() {
        assert_eq!(thetas(json!({})), [1e6, 1e4]);
        assert_eq!(thetas(json!({ "rope_theta": 5e5 })), [5e5, 1e4]);
        let both = json!({ "full_attention": { "rope_type": "default", "rope_theta": 3.0 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 7.0 } });
        assert_eq!(thetas(json!({ "rope_theta": 5e5, "rope_parameters": both })), [3.0, 7.0]);
    }

    #[test]
    fn only_full_layers_are_scaled_by_older_files() {
        let config = json!({ "rope_scaling": { "rope_type": "linear", "factor": 8.0 } });
        let read = |kind| RopeConfig::of_layer_type(&config, 4, kind, 100.0).expect("valid").inv_freq(1);
        assert_eq!(read("full_attention"), [0.125, 0.0125]);
        assert_eq!(read("sliding_attention"), [1.0, 0.1]);
    }

    #[test]
    fn alpha_raises_theta() {
        let config = json!({ "rope_theta": 100.0, "rope_scaling": { "type": "dynamic", "alpha": 3.0, "factor": 1.0 } });
        let rope = RopeConfig::with_alpha(&config, 4).expect("an alpha").expect("valid");
        assert_eq!(rope.theta(), 900.0);
        assert!(RopeConfig::with_alpha(&json!({ "rope_scaling": { "type": "dynamic", "factor": 2.0 } }), 4).is_none());
    }

    #[test]
    fn queries_grow_in_windows() {
        let config = |window: Value| {
            json!({ "rope_parameters": {
            "rope_type": "yarn", "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": window } })
        };
        let growth = QueryGrowth::from_config(&config(json!(16))).expect("valid");
        assert_eq!(growth, Some(QueryGrowth { beta: 0.1, window: 16 }));
        let text = QueryGrowth::from_config(&config(Value::Null)).expect_err("no window").to_string();
        assert!(text.contains("llama_4_scaling_beta needs original_max_position_embeddings"), "{text}");
        assert_eq!(QueryGrowth::from_config(&json!({})), Ok(None));
    }
}
