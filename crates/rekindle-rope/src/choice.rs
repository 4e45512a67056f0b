use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::{Error, Positions};

/// The method that extends a model beyond its window: `"auto"`, `"linear"`, `"dynamic"`, `"yarn"`, or a table of
/// parameters.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum RopeScaling {
    /// `"auto"`: keeps and extends a native llama3, yarn, longrope or dynamic scaling; a model without one gets
    /// [`RopeScaling::BEST`]. Extends up to [`MAX_AUTO_FACTOR`](crate::MAX_AUTO_FACTOR) times the window.
    #[default]
    Auto,
    /// `"linear"`: interpolates positions.
    Linear,
    /// `"dynamic"`: raises theta with the run's sequence length.
    Dynamic,
    /// `"yarn"`: interpolates slow pairs and keeps fast ones.
    Yarn,
    /// Parameters in either layout of `config.json`. They replace the model's own.
    Table(Map<String, Value>),
    /// The saved settings of an earlier run. Serialized as a table.
    Saved(Positions),
}

impl RopeScaling {
    /// The method names a user can give.
    pub const NAMES: [&str; 4] = ["auto", "linear", "dynamic", "yarn"];

    /// The method `auto` uses for a model without a native scaling, chosen by the measurement in
    /// `docs/context-extension.md`.
    pub const BEST: Self = Self::Yarn;
}

impl FromStr for RopeScaling {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self, Error> {
        match name {
            "auto" => Ok(Self::Auto),
            "linear" => Ok(Self::Linear),
            "dynamic" => Ok(Self::Dynamic),
            "yarn" => Ok(Self::Yarn),
            _ => Err(Error::UnknownMethod { name: name.to_owned() }),
        }
    }
}

impl From<Map<String, Value>> for RopeScaling {
    fn from(parameters: Map<String, Value>) -> Self {
        Self::Table(parameters)
    }
}

impl Serialize for RopeScaling {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => serializer.serialize_str("auto"),
            Self::Linear => serializer.serialize_str("linear"),
            Self::Dynamic => serializer.serialize_str("dynamic"),
            Self::Yarn => serializer.serialize_str("yarn"),
            Self::Table(parameters) => parameters.serialize(serializer),
            Self::Saved(positions) => positions.parameters().serialize(serializer),
        }
    }
}

impl<'de> Deserialize<'de> for RopeScaling {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(
            untagged,
            expecting = "rope_scaling must be \"auto\", \"linear\", \"dynamic\", \"yarn\" or a table such as { rope_type = \"yarn\", factor = 4.0 }"
        )]
        enum Raw {
            Name(String),
            Table(Map<String, Value>),
        }
        match Raw::deserialize(deserializer)? {
            Raw::Name(name) => name.parse().map_err(|_| D::Error::unknown_variant(&name, &Self::NAMES)),
            Raw::Table(parameters) => Ok(Self::Table(parameters)),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn names_and_tables_round_trip() {
        for name in RopeScaling::NAMES {
            let read: RopeScaling = serde_json::from_value(json!(name)).expect("a name");
            assert_eq!((Ok(&read), json!(read)), (name.parse().as_ref(), json!(name)));
        }
        let table = json!({ "type": "linear", "factor": 2.0 });
        let read: RopeScaling = serde_json::from_value(table.clone()).expect("a table");
        assert_eq!(json!(read), table);
    }

    #[test]
    fn an_unknown_name_or_type_lists_the_valid_ones() {
        let error = |value: Value| serde_json::from_value::<RopeScaling>(value).expect_err("invalid").to_string();
        assert!(error(json!("yran")).contains("unknown variant `yran`, expected one of `auto`, `linear`"));
        assert!(error(json!(4)).contains("or a table such as"));
        let text = "llama3".parse::<RopeScaling>().expect_err("needs its factors").to_string();
        assert_eq!(
            text,
            "rope_scaling \"llama3\" is not a method; use auto, linear, dynamic or yarn, or give its parameters: \
             { rope_type = \"llama3\", ... }"
        );
    }
}
