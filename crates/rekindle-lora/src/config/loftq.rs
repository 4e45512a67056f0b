use serde::{Deserialize, Serialize};

/// PEFT's `LoftQConfig`: the arguments of `init_lora_weights = "loftq"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LoftqConfig {
    /// Bits of the quantized base. Default 4.
    pub loftq_bits: u32,
    /// The number of iterations. Only 1 is supported: further iterations change the quantized base, which an adapter does
    /// not contain. Default 1.
    pub loftq_iter: usize,
}

impl Default for LoftqConfig {
    fn default() -> Self {
        Self { loftq_bits: 4, loftq_iter: 1 }
    }
}

impl LoftqConfig {
    /// Returns the reason that it is not supported.
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
