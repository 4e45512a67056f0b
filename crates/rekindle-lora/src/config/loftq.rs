use serde::{Deserialize, Serialize};

/// PEFT's `LoftQConfig`: the arguments of `init_lora_weights = "loftq"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoftqConfig {
    /// Bits of the codes, which the base has too. Default 4.
    pub loftq_bits: u32,
    /// How often codes and factors are found in turn. Default 1, and no other: after that the codes are no longer those
    /// of the base, and an adapter alone could not say what it belongs to.
    pub loftq_iter: usize,
}

impl Default for LoftqConfig {
    fn default() -> Self {
        Self { loftq_bits: 4, loftq_iter: 1 }
    }
}

impl LoftqConfig {
    /// What is wrong with it.
    pub(super) fn problem(self) -> Option<String> {
        match self {
            Self { loftq_bits: 4 | 8, loftq_iter: 1 } => None,
            Self { loftq_bits: 4 | 8, loftq_iter } => Some(format!(
                "loftq_iter is {loftq_iter}; only 1 is supported, because more iterations change the quantized base, \
                 which an adapter does not contain"
            )),
            Self { loftq_bits, .. } => Some(format!("loftq_bits is {loftq_bits}; it must be 4 or 8")),
        }
    }
}
