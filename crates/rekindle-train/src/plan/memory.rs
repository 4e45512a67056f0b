//! Bytes by category.

use rekindle_kernels::MemoryUse;
use serde::Serialize;

/// The categories of a memory plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryCategory {
    /// Weights of the model, with the LoRA factors that are fused with them on CUDA, and the rotary tables.
    Weights,
    /// Trained parameters other than the model's weights.
    Adapters,
    /// Gradients of the trained parameters.
    Gradients,
    /// The optimizer's state.
    Optimizer,
    /// Activations saved for the backward pass.
    SavedActivations,
    /// Temporary results, decoded weights and workspaces.
    Scratch,
    /// Logits of one chunk of rows, and their gradient.
    LossChunks,
    /// Keys and values of sampled completions.
    KvCache,
}

impl MemoryCategory {
    /// All categories, in the order of tables.
    pub const ALL: [Self; 8] = [
        Self::Weights,
        Self::Adapters,
        Self::Gradients,
        Self::Optimizer,
        Self::SavedActivations,
        Self::Scratch,
        Self::LossChunks,
        Self::KvCache,
    ];

    /// Returns the name of the category in tables.
    pub fn label(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Adapters => "adapters",
            Self::Gradients => "gradients",
            Self::Optimizer => "optimizer",
            Self::SavedActivations => "saved activations",
            Self::Scratch => "scratch",
            Self::LossChunks => "loss chunks",
            Self::KvCache => "key/value cache",
        }
    }

    /// Returns the category of a use of memory; `None` for activations, which are either saved or temporary.
    pub(super) fn of(usage: MemoryUse, has_adapter: bool) -> Option<Self> {
        Some(match usage {
            MemoryUse::Weights | MemoryUse::QuantizedWeights | MemoryUse::FusedWeights | MemoryUse::ParamCopies => {
                Self::Weights
            }
            MemoryUse::Parameters if has_adapter => Self::Adapters,
            MemoryUse::Parameters => Self::Weights,
            MemoryUse::Gradients => Self::Gradients,
            MemoryUse::OptimizerState => Self::Optimizer,
            MemoryUse::Logits | MemoryUse::Targets => Self::LossChunks,
            MemoryUse::Activations => return None,
            MemoryUse::KvCache => Self::KvCache,
            MemoryUse::Inputs | MemoryUse::DecodedWeights | MemoryUse::Scratch | MemoryUse::Workspace => Self::Scratch,
        })
    }
}

/// Bytes by category.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryBytes([usize; MemoryCategory::ALL.len()]);

impl MemoryBytes {
    /// Returns the bytes of all categories.
    pub fn total(&self) -> usize {
        self.0.iter().sum()
    }

    /// Returns the bytes of one category.
    pub fn of(&self, category: MemoryCategory) -> usize {
        self.0[category as usize]
    }

    pub(super) fn add(&mut self, category: MemoryCategory, bytes: usize) {
        self.0[category as usize] += bytes;
    }
}
