//! Qwen2, Qwen3 and Llama as chains of forward and backward pairs.
//!
//! [`ModelConfig`] reads a checkpoint's `config.json`; what tells the families apart stands in one file
//! each ([`qwen3`], [`qwen2`], [`llama`]), the structure they share in `block.rs` and `model.rs`.
//! [`CausalLm`] is the model: it reads weights from a [`Checkpoint`](rekindle_hub::Checkpoint), computes
//! the loss of a [`Batch`] and its gradients, carries adapters, and generates.
//!
//! A batch is documents one after another, `[tokens, hidden]` with `cu_seqlens` and positions. There is
//! no batch axis and no padding, so packing documents together changes nothing but speed.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod account;
mod adapt;
mod adapters;
mod batch;
mod block;
mod cache;
mod config;
mod error;
mod family;
mod generate;
mod layout;
pub mod llama;
mod load;
mod memory;
mod merge;
mod model;
mod names;
mod non_finite;
mod outline;
mod positions;
mod quantization;
mod quantize;
pub mod qwen2;
pub mod qwen3;
mod sample;
mod save;
mod start;
mod trainable;
mod vocab;

pub use account::{Account, Bytes, Tokens, Trained, Use};
pub use adapters::DEFAULT_ADAPTER;
pub use batch::{Batch, IGNORED};
pub use config::{Biases, ModelConfig};
pub use error::Error;
pub use generate::{GenerationConfig, StopReason};
pub use load::LoadOptions;
pub use memory::{MemoryClass, MemoryLine, MemoryReport};
pub use merge::{MergeOptions, merge};
pub use model::{CausalLm, StepKey};
pub use non_finite::NonFinite;
pub use outline::Coding;
pub use positions::{save_positions, saved_positions};
pub use quantization::{LoadIn, stored_quantization};
pub use quantize::quantize;
pub use rekindle_rope::{Error as RopeError, Positions, RopeScaling, Widened};
pub use start::{TrainedOn, trained_on};
