use core::fmt;

use serde_json::{Map, Value, json};

use crate::reader::Reader;
use crate::{Error, RopeConfig};

/// The window and the rotary parameters that replace a model's own, as a `config.json` of transformers 5 has them.
#[derive(Debug, Clone, PartialEq)]
pub struct Positions {
    pub(crate) max_position_embeddings: usize,
    /// With `rope_theta`; independent of the length of any later run.
    pub(crate) parameters: Map<String, Value>,
}

impl Positions {
    /// The file beside an adapter that holds this: the keys that the base's `config.json` needs for it.
    pub const FILE: &str = "rope_parameters.json";

    /// The window.
    pub fn max_position_embeddings(&self) -> usize {
        self.max_position_embeddings
    }

    /// The content of `rope_parameters`.
    pub fn parameters(&self) -> &Map<String, Value> {
        &self.parameters
    }

    /// `max_position_embeddings` and `rope_parameters` as one object.
    pub fn to_json(&self) -> Value {
        json!({ "max_position_embeddings": self.max_position_embeddings, "rope_parameters": self.parameters })
    }

    /// Reads what [`to_json`](Self::to_json) made.
    ///
    /// # Errors
    /// [`Error::Parameters`] for an object without the two keys.
    pub fn from_json(json: &Value) -> Result<Self, Error> {
        let empty = Map::new();
        let mut reader = Reader::new("", json.as_object().unwrap_or(&empty));
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

    /// The rotary embedding of a model with these parameters.
    ///
    /// # Errors
    /// As [`RopeConfig::from_config`].
    pub fn rope(&self, head_dim: usize) -> Result<RopeConfig, Error> {
        RopeConfig::from_config(&self.to_json(), head_dim)
    }

    /// Puts them into a `config.json`.
    ///
    /// Where that has the keys of transformers 4 (`rope_theta`, `rope_scaling`), they are set to the same beside those
    /// of transformers 5, so that every reader of the file finds this model.
    pub fn apply(&self, config: &mut Value) {
        let Value::Object(config) = config else { return };
        config.insert("max_position_embeddings".to_owned(), self.max_position_embeddings.into());
        // It would win over the one inside.
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
    /// `yarn, factor 4`, or for unscaled frequencies `rope_theta 130000`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        describe(&self.parameters, f)
    }
}

/// What transformers 4 has beside `rope_scaling`.
const BESIDE: [&str; 2] = ["rope_theta", "partial_rotary_factor"];

/// The type with what tells it best apart from others of its type.
pub(crate) fn describe(parameters: &Map<String, Value>, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let number = |key: &str| parameters.get(key).and_then(Value::as_f64);
    let name = parameters.get("rope_type").and_then(Value::as_str).unwrap_or("default");
    match (name, number("factor"), number("rope_theta")) {
        ("default", _, Some(theta)) => write!(f, "default, rope_theta {theta}"),
        (_, Some(factor), _) => write!(f, "{name}, factor {factor}"),
        _ => f.write_str(name),
    }
}
