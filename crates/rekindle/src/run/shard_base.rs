use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The frozen weights of a model on several ranks: whole on each, or divided among them.
///
/// In a run file and in JSON: `false`, `true` or `"auto"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ShardBase {
    /// `false`: each rank holds all weights.
    #[default]
    Off,
    /// `true`: each of N ranks holds 1/N of the frozen weights of the blocks, and gathers a block before it computes.
    On,
    /// `"auto"`: divided if whole ones do not fit into the available memory.
    Auto,
}

impl ShardBase {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(super) fn is_off(&self) -> bool {
        *self == Self::Off
    }
}

impl From<bool> for ShardBase {
    fn from(on: bool) -> Self {
        if on { Self::On } else { Self::Off }
    }
}

impl Serialize for ShardBase {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_bool(false),
            Self::On => serializer.serialize_bool(true),
            Self::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for ShardBase {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "shard_base must be true, false or \"auto\"")]
        enum Raw {
            Flag(bool),
            Name(Name),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Name {
            Auto,
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Flag(on) => on.into(),
            Raw::Name(Name::Auto) => Self::Auto,
        })
    }
}
