//! Rotary position embeddings: scaling rules and frequency tables.
//!
//! Reads the position settings of a Hugging Face `config.json`, in the layout of transformers 5 (`rope_parameters`) or
//! transformers 4 (`rope_scaling` next to `rope_theta`), and computes the inverse frequencies, the attention factor and
//! the cos/sin tables that all attention layers share. Everything here is a pure function on numbers; the crate uses no
//! tensors and no device.
//!
//! ```
//! use rekindle_rope::RopeConfig;
//!
//! let config = serde_json::json!({
//!     "max_position_embeddings": 131072,
//!     "rope_theta": 500000.0,
//!     "rope_scaling": {
//!         "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
//!         "original_max_position_embeddings": 8192
//!     }
//! });
//! let rope = RopeConfig::from_config(&config, 128)?;
//! let tables = rope.tables(4096);
//! assert_eq!(tables.cos.len(), 4096 * 64);
//! # Ok::<(), rekindle_rope::Error>(())
//! ```
//!
//! [`extend_context`] extends a model beyond its context window:
//!
//! ```
//! use rekindle_rope::{RopeScaling, extend_context};
//!
//! let config = serde_json::json!({ "max_position_embeddings": 32768, "rope_theta": 1000000.0 });
//! let extension =
//!     extend_context(&config, 128, 32768, 131072, &RopeScaling::Yarn)?.expect("131072 is beyond the window");
//! assert_eq!(extension.to_string(), "yarn, factor 4: window 32768 -> 131072");
//! let mut written = config.clone();
//! extension.positions.apply(&mut written);
//! assert_eq!(written["max_position_embeddings"], 131072);
//! # Ok::<(), rekindle_rope::Error>(())
//! ```
//!
//! # One length for a run
//! `dynamic` and `longrope` choose their frequencies by sequence length. transformers chooses anew for every batch.
//! Here the caller passes one length, the longest of the run, so that packing rows or splitting a batch does not change
//! the frequencies.

mod choice;
mod config;
mod context_extension;
mod error;
mod family_settings;
mod parameter_reader;
mod parse;
mod positions;
mod scaling;
mod tables;

pub use choice::RopeScaling;
pub use config::RopeConfig;
pub use context_extension::{ContextExtension, MAX_AUTO_FACTOR, extend_context};
pub use error::Error;
pub use family_settings::QueryGrowth;
pub use positions::Positions;
pub use scaling::Scaling;
pub use tables::Tables;
