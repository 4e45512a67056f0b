use serde::{Deserialize, Serialize};

use crate::Error;
use crate::error::nearest_hint;

/// The biases of the base model that are trained with the adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", try_from = "String")]
pub enum Bias {
    /// `"none"`.
    #[default]
    None,
    /// `"all"`: every bias of the model.
    All,
    /// `"lora_only"`: the biases of adapted linears.
    LoraOnly,
}

impl Bias {
    /// Returns the name in configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::All => "all",
            Self::LoraOnly => "lora_only",
        }
    }
}

impl TryFrom<String> for Bias {
    type Error = Error;

    fn try_from(name: String) -> Result<Self, Error> {
        let known = [Self::None, Self::All, Self::LoraOnly];
        known.into_iter().find(|bias| bias.name() == name).ok_or_else(|| {
            let hint = nearest_hint(&name, known.map(Self::name));
            let problem = format!("bias \"{name}\" is unknown; use \"none\", \"all\" or \"lora_only\"{hint}");
            Error::Config { problems: vec![problem] }
        })
    }
}
