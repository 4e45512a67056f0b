use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The initial values of A and B.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum InitLoraWeights {
    /// `true`: A uniform in ±1/√in (Kaiming with a = √5), B zero, so that training starts at the base model.
    #[default]
    Default,
    /// `false`: A uniform in ±1/√in, B uniform in ±1/√r. Not the base model; for tests.
    Random,
    /// `"gaussian"`: A normal with standard deviation 1/r, B zero.
    Gaussian,
    /// Another method's name. An adapter that started with it can be loaded; a new one cannot be made.
    Other(String),
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Default => serializer.serialize_bool(true),
            Self::Random => serializer.serialize_bool(false),
            Self::Gaussian => serializer.serialize_str("gaussian"),
            Self::Other(name) => serializer.serialize_str(name),
        }
    }
}

impl<'de> Deserialize<'de> for InitLoraWeights {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "init_lora_weights must be true, false or a name such as \"gaussian\"")]
        enum Raw {
            Flag(bool),
            Name(String),
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Flag(true) => Self::Default,
            Raw::Flag(false) => Self::Random,
            Raw::Name(name) if name == "gaussian" => Self::Gaussian,
            Raw::Name(name) => Self::Other(name),
        })
    }
}
