use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Gradient checkpointing: the activations of a block that are kept from its forward to its backward.
///
/// In a run file and in JSON: `false`, `true`, `"unsloth"` or `"auto"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GradientCheckpointing {
    /// `false`: all activations are kept.
    #[default]
    Off,
    /// `true`: only the block's input is kept; the rest is recomputed.
    Block,
    /// `"unsloth"`: more is kept than with `true`, offloaded to host memory. On the CPU and on wgpu the same as `true`.
    Host,
    /// `"auto"`: the fastest of these that fits into the available memory, chosen before training starts. A model that
    /// is used without that choice treats it as `true`.
    Auto,
}

impl GradientCheckpointing {
    /// Returns true if activations are recomputed.
    pub fn recomputes(self) -> bool {
        self != Self::Off
    }
}

impl From<bool> for GradientCheckpointing {
    fn from(on: bool) -> Self {
        if on { Self::Block } else { Self::Off }
    }
}

impl Serialize for GradientCheckpointing {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_bool(false),
            Self::Block => serializer.serialize_bool(true),
            Self::Host => serializer.serialize_str("unsloth"),
            Self::Auto => serializer.serialize_str("auto"),
        }
    }
}

impl<'de> Deserialize<'de> for GradientCheckpointing {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "use_gradient_checkpointing must be true, false, \"unsloth\" or \"auto\"")]
        enum Raw {
            Flag(bool),
            Name(Name),
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "lowercase")]
        enum Name {
            Unsloth,
            Auto,
        }
        Ok(match Raw::deserialize(deserializer)? {
            Raw::Flag(on) => on.into(),
            Raw::Name(Name::Unsloth) => Self::Host,
            Raw::Name(Name::Auto) => Self::Auto,
        })
    }
}
