//! Checkpoints: loading, saving, quantizing, merging, and models without values.

mod check_tensors;
mod experts;
mod gguf;
mod gguf_adapter;
mod gguf_base;
mod gguf_decoder;
mod gguf_tensors;
mod kept_blocks;
mod load;
mod master_weights;
mod merge;
mod on_meta;
mod quantization;
mod quantize;
mod read_weights;
mod resize;
mod save;
mod tensor_names;
mod writer;

pub(crate) use experts::headers as checkpoint_headers;
pub use gguf::{GgufOptions, GgufTotals, export_gguf};
pub use gguf_adapter::export_gguf_adapter;
pub use gguf_base::{open_checkpoint, unpack_gguf};
pub use load::LoadOptions;
pub(crate) use load::frozen;
pub use merge::{MergeOptions, merge};
pub use quantization::{LoadIn, is_quantized, stored_quantization};
pub(crate) use quantization::{Quantization, QuantizationPlan};
pub use quantize::quantize;
pub(crate) use tensor_names::canonical;
