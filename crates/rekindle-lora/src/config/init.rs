use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::nearest_hint;

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
    /// `"pissa"`: the r principal singular triplets of the weight, which are subtracted from the base (arXiv:2404.02948).
    Pissa,
    /// `"pissa_niter_N"`: the same, approximated by N rounds of randomized subspace iteration.
    PissaNiter(u32),
    /// `"olora"`: the first r columns and rows of the weight's QR decomposition, which are subtracted from the base
    /// (arXiv:2406.01775).
    Olora,
    /// `"loftq"`: the quantization error of a weight that is quantized while loading (arXiv:2310.08659).
    Loftq,
    /// Another method's name. An adapter initialized by it can be loaded, but not created.
    Other(String),
}

/// The supported names.
const NAMES: [&str; 5] = ["gaussian", "pissa", "pissa_niter_16", "olora", "loftq"];

impl InitLoraWeights {
    /// Returns true if the initial B·A is subtracted from the base.
    pub fn changes_base(&self) -> bool {
        matches!(self, Self::Pissa | Self::PissaNiter(_) | Self::Olora)
    }

    /// Returns the reason that a new adapter cannot be initialized so.
    pub(super) fn problem(&self) -> Option<String> {
        let Self::Other(name) = self else { return None };
        let hint = nearest_hint(name, NAMES);
        Some(format!(
            "init_lora_weights \"{name}\" is not supported; use true, false, \"gaussian\", \"pissa\", \
             \"pissa_niter_N\" with a number for N, \"olora\" or \"loftq\"{hint}"
        ))
    }
}

impl Serialize for InitLoraWeights {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Default => serializer.serialize_bool(true),
            Self::Random => serializer.serialize_bool(false),
            Self::Gaussian => serializer.serialize_str("gaussian"),
            Self::Pissa => serializer.serialize_str("pissa"),
            Self::PissaNiter(rounds) => serializer.collect_str(&format_args!("pissa_niter_{rounds}")),
            Self::Olora => serializer.serialize_str("olora"),
            Self::Loftq => serializer.serialize_str("loftq"),
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
            Raw::Name(name) => match (name.as_str(), name.strip_prefix("pissa_niter_").map(str::parse)) {
                ("gaussian", _) => Self::Gaussian,
                ("pissa", _) => Self::Pissa,
                ("olora", _) => Self::Olora,
                ("loftq", _) => Self::Loftq,
                (_, Some(Ok(rounds))) => Self::PissaNiter(rounds),
                _ => Self::Other(name),
            },
        })
    }
}
