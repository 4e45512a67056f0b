//! Categories of memory.

use core::fmt;

/// The use of a block of memory: the categories of memory reports, memory plans and out-of-memory errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemoryUse {
    /// Frozen dense weights, and whatever else is uploaded as a tensor.
    Weights,
    /// Quantized data and scales of weights.
    QuantizedWeights,
    /// Weights and LoRA factors in one matrix.
    FusedWeights,
    /// Trained values, with their copies in the compute dtype.
    Parameters,
    /// The list of the places that copies of parameters go to.
    ParamCopies,
    /// Gradients of parameters.
    Gradients,
    /// The optimizer's moments.
    OptimizerState,
    /// Activations and their gradients.
    Activations,
    /// Logits of one chunk of rows, and their gradient.
    Logits,
    /// The targets of the loss.
    Targets,
    /// Token ids, positions, document borders.
    Inputs,
    /// Keys and values of generated tokens.
    KvCache,
    /// A weight decoded for one product.
    DecodedWeights,
    /// Partial sums and other scratch memory of one operation.
    Scratch,
    /// The scratch memory that all products share.
    Workspace,
}

impl MemoryUse {
    /// All of them, in the order of their definition.
    pub const ALL: [Self; 15] = [
        Self::Weights,
        Self::QuantizedWeights,
        Self::FusedWeights,
        Self::Parameters,
        Self::ParamCopies,
        Self::Gradients,
        Self::OptimizerState,
        Self::Activations,
        Self::Logits,
        Self::Targets,
        Self::Inputs,
        Self::KvCache,
        Self::DecodedWeights,
        Self::Scratch,
        Self::Workspace,
    ];

    /// Returns its name in reports and errors.
    pub fn label(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::QuantizedWeights => "quantized weights",
            Self::FusedWeights => "fused weights",
            Self::Parameters => "parameters",
            Self::ParamCopies => "parameter copies",
            Self::Gradients => "gradients",
            Self::OptimizerState => "optimizer state",
            Self::Activations => "activations",
            Self::Logits => "logits",
            Self::Targets => "targets",
            Self::Inputs => "inputs",
            Self::KvCache => "key/value cache",
            Self::DecodedWeights => "decoded weights",
            Self::Scratch => "scratch",
            Self::Workspace => "cuBLASLt workspace",
        }
    }
}

impl fmt::Display for MemoryUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.label())
    }
}
