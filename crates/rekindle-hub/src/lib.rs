//! Checkpoints on disk and on the Hugging Face hub: sharded safetensors, memory-mapped for reading and written
//! atomically.
//!
//! [`Checkpoint`] opens a model directory in the Hugging Face layout (`config.json` next to `model.safetensors` or its
//! shards), and [`SafetensorsFile`] opens a single file such as an adapter. Both validate every header before they
//! return a tensor, and read weights lazily. [`write_safetensors`] and [`write_sharded`] write the same files, one
//! tensor at a time. [`write_atomic`] and [`AtomicDir`] ensure that a file or directory appears under its final name
//! complete or not at all.
//!
//! The feature `network` adds: `resolve` turns a hub name into such a directory in the cache shared with Python;
//! `resolve_rows` turns a dataset name into the files of a split; `headers` lists a model's tensors without downloading
//! them; `cache` lists and prunes the cache; `upload` commits files to a repository.
//!
//! ```
//! use rekindle_hub::{AtomicDir, Checkpoint, DEFAULT_MAX_SHARD_SIZE, Dtype, TensorSpec};
//! use rekindle_hub::{write_atomic, write_f32, write_sharded};
//!
//! # fn main() -> Result<(), rekindle_hub::Error> {
//! # let scratch = tempfile::tempdir().expect("a temporary directory");
//! # let out = scratch.path().join("model");
//! let tensors = [TensorSpec::new("model.norm.weight", Dtype::BF16, [4])];
//! let metadata = [("format".to_owned(), "pt".to_owned())].into();
//!
//! let directory = AtomicDir::create(&out)?;
//! write_atomic(&directory.path().join("config.json"), br#"{"model_type": "qwen3"}"#)?;
//! write_sharded(directory.path(), DEFAULT_MAX_SHARD_SIZE, &metadata, &tensors, |index, out| {
//!     write_f32(out, tensors[index].dtype, &[1.0, 0.5, 0.25, -2.0])
//! })?;
//! directory.commit()?;
//!
//! let checkpoint = Checkpoint::open(&out)?;
//! assert_eq!(checkpoint.config()["model_type"], "qwen3");
//! let norm = checkpoint.get("model.norm.weight").expect("just written");
//! assert_eq!(norm.shape, [4]);
//! assert_eq!(norm.to_f32()?, [1.0, 0.5, 0.25, -2.0]);
//! # Ok(())
//! # }
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapter;
mod atomic;
#[cfg(feature = "network")]
pub mod cache;
mod checkpoint;
mod checkpoint_headers;
mod companion;
mod dtype;
mod error;
#[cfg(feature = "network")]
mod hub;
mod index;
mod json;
mod mapped_file;
mod safetensors_file;
mod safetensors_header;
mod sharded;
mod tensor;
mod tensor_writer;
mod write;

pub use adapter::{AdapterBase, adapter_base, open_adapter};
pub use atomic::{AtomicDir, AtomicFile, DirectoryLock, clear_leftovers, remove_atomic, write_atomic};
pub use checkpoint::{Checkpoint, TensorPart, TensorStore, read_config};
pub use checkpoint_headers::{CheckpointHeaders, TensorInfo};
pub use companion::{ADDITIONAL_CHAT_TEMPLATES, companion_files, companion_name, is_companion};
pub use dtype::{BlockFormat, DecodeBlocks, Dtype};
pub use error::{Error, HubErrorKind};
#[cfg(feature = "network")]
pub use hub::{
    DatasetPart, HubOptions, Resolved, ResolvedRows, UploadContent, UploadFile, UploadOptions, Uploaded, check_upload,
    headers, resolve, resolve_rows, upload,
};
pub use json::read_json;
pub use mapped_file::MappedFile;
pub use safetensors_file::SafetensorsFile;
pub use sharded::{DEFAULT_MAX_SHARD_SIZE, write_sharded};
pub use tensor::{TensorView, write_f32};
pub use tensor_writer::TensorWriter;
pub use write::{TensorSpec, write_safetensors};
