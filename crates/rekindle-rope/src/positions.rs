use core::fmt;

use serde_json::{Map, Value, json};

use crate::parameter_reader::ParameterReader;
use crate::{Error, RopeConfig};

/// The window and rotary parameters that replace a model's own, in the layout of a transformers 5 `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct Positions {
    pub(crate) max_position_embeddings: usize,
    /// Includes `rope_theta`; independent of the length of later runs.
    pub(crate) parameters: Map<String, Value>,
}

impl Positions {
    /// The file in an adapter directory that stores these settings, as the keys to set in the base's `config.json`.
    pub const FILE: &str = "rope_parameters.json";

    /// Returns the window.
    pub fn max_position_embeddings(&self) -> usize {
        self.max_position_embeddings
    }

    /// Returns the content of `rope_parameters`.
    pub fn parameters(&self) -> &Map<String, Value> {
        &self.parameters
    }

    /// Returns `max_position_embeddings` and `rope_parameters` as one object.
    pub fn to_json(&self) -> Value {
        json!({ "max_position_embeddings": self.max_position_embeddings, "rope_parameters": self.parameters })
    }

    /// Reads the output of [`to_json`](Self::to_json).
    ///
    /// # Errors
    /// [`Error::Parameters`] for an object without the two keys.
    pub fn from_json(json: &Value) -> Result<Self, Error> {
        let empty = Map::new();
        let mut reader = ParameterReader::new("", json.as_object().unwrap_or(&empty));
        let window = reader.count("max_position_embeddings");
        let window = reader.require("max_position_embeddings", window);
        let parameters = json.get("rope_parameters").and_then(Value::as_object);
        let parameters = reader.require("rope_parameters", parameters);
        match (window, parameters) {
            (Some(max_position_embeddings), Some(parameters)) => {
                Ok(Self { max_position_embeddings, parameters: parameters.clone() })
            }
            _ => Err(Error::Parameters { problems: reader.into_problems() }),
        }
    }

    /// Builds the rotary embedding of a model with these parameters.
    ///
    /// # Errors
    /// The same as [`RopeConfig::from_config`].
    pub fn rope(&self, head_dim: usize) -> Result<RopeConfig, Error> {
        RopeConfig::from_config(&self.to_json(), head_dim)
    }

    /// Writes the settings into a `config.json`.
    ///
    /// If it has the keys of transformers 4 (`rope_theta`, `rope_scaling`), both layouts are written, so that every
    /// reader of the file sees the same model.
    pub fn apply(&self, config: &mut Value) {
        let Value::Object(config) = config else { return };
        config.insert("max_position_embeddings".to_owned(), self.max_position_embeddings.into());
        // This outer key would take precedence over the one inside.
        config.remove("original_max_position_embeddings");
        let older = ["rope_theta", "rope_scaling"].iter().any(|key| config.contains_key(*key));
        if older {
            let (beside, inside): (Map<String, Value>, Map<String, Value>) =
                self.parameters.clone().into_iter().partition(|(key, _)| BESIDE.contains(&key.as_str()));
            let default = inside.get("rope_type").and_then(Value::as_str) == Some("default");
            config.extend(beside);
            config.insert("rope_scaling".to_owned(), if default { Value::Null } else { inside.into() });
        }
        config.insert("rope_parameters".to_owned(), self.parameters.clone().into());
    }
}

impl fmt::Display for Positions {
    /// Formats as `yarn, factor 4`, or as `default, rope_theta 130000` for unscaled frequencies.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(&self.parameters, f)
    }
}

/// The keys that transformers 4 stores next to `rope_scaling`, not inside.
const BESIDE: [&str; 2] = ["rope_theta", "partial_rotary_factor"];

/// Formats the rope type with its most distinctive parameter.
pub(crate) fn describe(parameters: &Map<String, Value>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let number = |key: &str| parameters.get(key).and_then(Value::as_f64);
    let name = parameters.get("rope_type").and_then(Value::as_str).unwrap_or("default");
    match (name, number("factor"), number("rope_theta")) {
        ("default", _, Some(theta)) => write!(f, "default, rope_theta {theta}"),
        (_, Some(factor), _) => write!(f, "{name}, factor {factor}"),
        _ => f.write_str(name),
    }
}
