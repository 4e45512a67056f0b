use crate::{Blocksize, Dtype, QuantType};

/// Why a tensor could not be quantized, decoded or read.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A block size outside [`Blocksize::ALL`].
    #[error("blocksize {got} is not supported; use one of {:?}", Blocksize::ALL.map(Blocksize::get))]
    Blocksize {
        /// The size asked for.
        got: u64,
    },
    /// A 4-bit data type that is neither NF4 nor FP4.
    #[error("unknown quant_type {got:?}; use one of {:?}", QuantType::ALL.map(QuantType::name))]
    QuantType {
        /// The name asked for.
        got: String,
    },
    /// An element type that is not one of the three floating-point types.
    #[error("dtype {got:?} cannot be quantized; use one of {:?}", Dtype::ALL.map(Dtype::name))]
    Dtype {
        /// The name asked for.
        got: String,
    },
    /// A tensor without elements.
    #[error("shape {shape:?} has no elements; leave this tensor unquantized")]
    Empty {
        /// The shape given.
        shape: Vec<usize>,
    },
    /// A part of a tensor whose length does not follow from the shape.
    #[error(
        "shape {shape:?} with {rule} needs {expected} {part}, got {got}; the tensor is damaged or of another shape"
    )]
    Length {
        /// The shape of the dense tensor.
        shape: Vec<usize>,
        /// What fixes the length, such as `blocksize 64`.
        rule: String,
        /// The part that does not match, such as `absmax values`.
        part: &'static str,
        /// The length that follows from `shape` and `rule`.
        expected: usize,
        /// The length found.
        got: usize,
    },
    /// An 8-bit code table that is not sorted, or not of finite values.
    #[error("entry {index} of the 8-bit map is {value}, which breaks its ascending order; use the map of the format")]
    Map {
        /// Position of the first entry that is out of order.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A `quantization_config` that transformers would refuse.
    #[error("{reason}")]
    Config {
        /// The key, what is wrong with it and what was expected.
        reason: String,
    },
    /// A checkpoint that something else than bitsandbytes quantized.
    #[error(
        "quant_method {got:?} is not read; \"bitsandbytes\" (nf4, fp4, int8) is: \
         use such a checkpoint, or the unquantized one and quantize while loading"
    )]
    QuantMethod {
        /// The method of the checkpoint.
        got: String,
    },
    /// A tensor that the checkpoint lacks.
    #[error("checkpoint has no {key:?}, which {name:?} needs; is this a bitsandbytes checkpoint with all its shards?")]
    MissingKey {
        /// The weight being read.
        name: String,
        /// The key that is absent.
        key: String,
    },
    /// A tensor of a checkpoint that bitsandbytes would not have written.
    #[error("{key:?} {reason}")]
    Stored {
        /// The key of the tensor.
        key: String,
        /// What is wrong with it and what was expected.
        reason: String,
    },
}

impl Error {
    pub(crate) fn config(key: &str, reason: &str) -> Self {
        Self::Config { reason: format!("{key} {reason}") }
    }
}
