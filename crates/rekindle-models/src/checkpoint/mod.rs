//! Checkpoints: loading, saving, quantizing, merging, and models without values.

mod load;
mod master_weights;
mod merge;
mod on_meta;
mod quantization;
mod quantize;
mod resize;
mod save;
mod tensor_names;
mod writer;

pub use load::LoadOptions;
pub(crate) use load::frozen;
pub use merge::{MergeOptions, merge};
pub use quantization::{LoadIn, is_quantized, stored_quantization};
pub(crate) use quantization::{Quantization, QuantizationPlan};
pub use quantize::quantize;
pub(crate) use tensor_names::{TensorNaming, canonical};
