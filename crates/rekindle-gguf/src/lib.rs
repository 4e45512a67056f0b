//! GGUF, the file format of llama.cpp: reading, writing, and its quantized types.
//!
//! [`GgufModel`] maps a file, or all files of a split model, and validates it before it returns a tensor. [`write_gguf`]
//! writes one tensor at a time to any writer, and [`write_gguf_files`] to files that appear complete or not at all.
//! [`GgmlType::quantize`] and [`GgmlType::decode`] encode and decode blocks, equal to llama.cpp to the bit.
//!
//! ```
//! use rekindle_gguf::{GgmlType, GgufModel, GgufTensorSpec, write_gguf_files};
//! use std::io::Write as _;
//!
//! # fn main() -> Result<(), rekindle_gguf::Error> {
//! # let scratch = tempfile::tempdir().expect("a temporary directory");
//! # let path = scratch.path().join("model.gguf");
//! let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.1).sin()).collect();
//! let tensors = [GgufTensorSpec::new("blk.0.ffn_up.weight", GgmlType::Q4_K, [2, 256])];
//! let metadata = [("general.architecture".to_owned(), "llama".into())];
//! write_gguf_files(&path, None, &metadata, &tensors, |index, out| {
//!     let bytes = tensors[index].kind.quantize(&values, 256, None)?;
//!     out.write_all(&bytes)
//! })?;
//!
//! let model = GgufModel::open(&path)?;
//! assert_eq!(model.metadata("general.architecture").and_then(|value| value.as_str()), Some("llama"));
//! let up = model.tensor("blk.0.ffn_up.weight").expect("just written");
//! assert_eq!((up.kind, up.shape, up.data.len()), (GgmlType::Q4_K, &[2, 256][..], 2 * 144));
//! let decoded = up.to_f32()?;
//! assert!(decoded.iter().zip(&values).all(|(a, b)| (a - b).abs() < 0.1));
//! # Ok(())
//! # }
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod architecture;
mod codec;
mod error;
mod file;
mod file_type;
mod ggml_type;
mod header;
mod importance;
mod metadata;
mod tokenizer;
mod tokenizer_files;
mod write;

pub use architecture::{
    GgufArchitecture, GgufDecoder, GgufDelta, GgufDescription, GgufExperts, GgufLayer, GgufPart, GgufRope,
    GgufRopeScaling, interleave_rows,
};
pub use error::Error;
pub use file::{GgufModel, GgufTensor};
pub use file_type::{GgufFileType, Recipe, RecipeModel};
pub use ggml_type::GgmlType;
pub use importance::{Importance, read_importance};
pub use metadata::{MetadataArray, MetadataValue};
pub use tokenizer::GgufTokenizer;
pub use tokenizer_files::GgufTokenizerFiles;
pub use write::{GgufTensorSpec, write_gguf, write_gguf_files};
