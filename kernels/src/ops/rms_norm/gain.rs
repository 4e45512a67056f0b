//! The learned factor of a norm.

use crate::Tensor;

/// The factor g that a normalized row is multiplied with, and where a 16-bit result is rounded.
#[derive(Clone, Debug)]
pub enum Gain {
    /// g = w, on the normalized row rounded to its dtype (transformers' `LlamaRMSNorm`).
    Plain(Tensor<1>),
    /// g = w, in `f32`; the product is rounded (`Olmo2RMSNorm`).
    RoundedAfter(Tensor<1>),
    /// g = 1 + w, in `f32`; the product is rounded (`Gemma3RMSNorm`, `Qwen3NextRMSNorm`).
    OnePlus(Tensor<1>),
    /// g = 1 (`Gemma4RMSNorm` without scale, `Llama4TextL2Norm`).
    None,
}

/// [`Gain`] without its tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GainForm {
    Plain,
    RoundedAfter,
    OnePlus,
    None,
}

impl Gain {
    /// Returns w.
    pub fn weight(&self) -> Option<&Tensor<1>> {
        match self {
            Self::Plain(weight) | Self::RoundedAfter(weight) | Self::OnePlus(weight) => Some(weight),
            Self::None => None,
        }
    }

    pub(crate) fn form(&self) -> GainForm {
        match self {
            Self::Plain(_) => GainForm::Plain,
            Self::RoundedAfter(_) => GainForm::RoundedAfter,
            Self::OnePlus(_) => GainForm::OnePlus,
            Self::None => GainForm::None,
        }
    }
}

impl GainForm {
    /// The value of `GAIN` in the kernels.
    pub(crate) fn define(self) -> &'static str {
        match self {
            Self::Plain => "PLAIN",
            Self::RoundedAfter => "ROUNDED_AFTER",
            Self::OnePlus => "ONE_PLUS",
            Self::None => "NO_WEIGHT",
        }
    }
}
