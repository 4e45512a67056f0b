//! Rotary position embeddings: scaling rules and frequency tables.
//!
//! Reads the position settings of a Hugging Face `config.json`, in the spelling of transformers 5 (`rope_parameters`)
//! or of transformers 4 (`rope_scaling` beside `rope_theta`), and computes from them the inverse frequencies, the
//! attention factor, and the cos/sin tables that attention layers share. Everything is a pure function on numbers:
//! no tensors and no device.
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
//! [`widen`] takes a model beyond its window:
//!
//! ```
//! use rekindle_rope::{RopeScaling, widen};
//!
//! let config = serde_json::json!({ "max_position_embeddings": 32768, "rope_theta": 1000000.0 });
//! let widened = widen(&config, 128, 32768, 131072, &RopeScaling::Yarn)?.expect("131072 is beyond the window");
//! assert_eq!(widened.to_string(), "yarn, factor 4: window 32768 -> 131072");
//! let mut written = config.clone();
//! widened.positions.apply(&mut written);
//! assert_eq!(written["max_position_embeddings"], 131072);
//! # Ok::<(), rekindle_rope::Error>(())
//! ```
//!
//! # One length for a run
//! `dynamic` and `longrope` choose their frequencies by the length of the sequence. transformers looks at every batch
//! anew; here the caller names one length, the longest of the run, so that packing rows together or splitting a batch
//! changes no frequency.

mod choice;
mod config;
mod error;
mod parse;
mod positions;
mod reader;
mod scaling;
mod tables;
mod widen;

pub use choice::RopeScaling;
pub use config::RopeConfig;
pub use error::Error;
pub use positions::Positions;
pub use scaling::Scaling;
pub use tables::Tables;
pub use widen::{MOST_AUTO, Widened, widen};
