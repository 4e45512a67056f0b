use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The linears that get an adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// A linear whose name is one of these, or ends with a dot and one of these.
    Names(Vec<String>),
    /// A linear whose whole name matches this regular expression.
    Regex(String),
    /// `"all-linear"`: every linear except the output layer, `lm_head`.
    AllLinear,
}

impl<S: Into<String>, const N: usize> From<[S; N]> for TargetModules {
    fn from(names: [S; N]) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

impl<S: Into<String>> From<Vec<S>> for TargetModules {
    fn from(names: Vec<S>) -> Self {
        Self::Names(names.into_iter().map(Into::into).collect())
    }
}

impl From<&str> for TargetModules {
    /// Reads a string as a regular expression, except `"all-linear"` in any letter case.
    fn from(text: &str) -> Self {
        if text.eq_ignore_ascii_case("all-linear") { Self::AllLinear } else { Self::Regex(text.to_owned()) }
    }
}

impl Serialize for TargetModules {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Names(names) => names.serialize(serializer),
            Self::Regex(pattern) => serializer.serialize_str(pattern),
            Self::AllLinear => serializer.serialize_str("all-linear"),
        }
    }
}

impl<'de> Deserialize<'de> for TargetModules {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "target_modules must be a list of names or a string")]
        enum Raw {
            Names(Vec<String>),
            Text(String),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Names(names) => Self::Names(names),
            Raw::Text(text) => text.as_str().into(),
        })
    }
}
