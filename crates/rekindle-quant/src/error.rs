use crate::element::FLOATS;
use crate::{Blocksize, Dtype, QuantType};

/// An error in quantizing, decoding or reading a tensor.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A block size outside [`Blocksize::ALL`].
    #[error("blocksize {got} is not supported; use one of {:?}", Blocksize::ALL.map(Blocksize::get))]
    Blocksize {
        /// The requested size.
        got: u64,
    },
    /// A 4-bit data type that is neither NF4 nor FP4.
    #[error("unknown quant_type {got:?}; use one of {:?}", QuantType::ALL.map(QuantType::name))]
    QuantType {
        /// The requested name.
        got: String,
    },
    /// An element type that is not one of the three floating-point types.
    #[error("dtype {got:?} cannot be quantized; use one of {:?}", FLOATS.map(Dtype::torch_name))]
    Dtype {
        /// The requested name.
        got: String,
    },
    /// A tensor without elements.
    #[error("shape {shape:?} has no elements; leave this tensor unquantized")]
    Empty {
        /// The given shape.
        shape: Vec<usize>,
    },
    /// A component of a tensor whose length does not match the shape.
    #[error(
        "shape {shape:?} with {rule} needs {expected} {part}, got {got}; the tensor is damaged or of another shape"
    )]
    Length {
        /// The shape of the dense tensor.
        shape: Vec<usize>,
        /// The rule that determines the length, such as `blocksize 64`.
        rule: String,
        /// The component that does not match, such as `absmax values`.
        part: &'static str,
        /// The length required by `shape` and `rule`.
        expected: usize,
        /// The actual length.
        got: usize,
    },
    /// An 8-bit code table that is not ascending, or has non-finite values.
    #[error(
        "entry {index} of the 8-bit map is {value}, but the map must be finite and ascending; use the format's map"
    )]
    Map {
        /// The index of the first invalid entry.
        index: usize,
        /// Its value.
        value: f32,
    },
    /// A `quantization_config` that transformers would reject.
    #[error("{reason}")]
    Config {
        /// The key, the problem, and the expected value.
        reason: String,
    },
    /// A checkpoint quantized by a method that is not supported.
    #[error(
        "quant_method {got:?} is not supported; supported: \"bitsandbytes\" (nf4, fp4, int8), \"mxfp4\", \"fp8\", \
         \"fbgemm_fp8\", \"compressed-tensors\" (float-quantized). \
         Use the unquantized checkpoint and quantize it while loading"
    )]
    QuantMethod {
        /// The checkpoint's method.
        got: String,
    },
    /// A tensor missing from the checkpoint.
    #[error("checkpoint has no {key:?}, which {name:?} needs; are all shards of the checkpoint there?")]
    MissingKey {
        /// The weight being read.
        name: String,
        /// The missing key.
        key: String,
    },
    /// A stored tensor that is not as its format has it.
    #[error("{key:?} {reason}")]
    Stored {
        /// The key of the tensor.
        key: String,
        /// The problem and the expected value.
        reason: String,
    },
}

impl Error {
    pub(crate) fn config(key: &str, reason: &str) -> Self {
        Self::Config { reason: format!("{key} {reason}") }
    }
}
