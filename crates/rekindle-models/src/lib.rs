//! Decoder models as chains of forward and backward pairs.
//!
//! [`ModelConfig`] reads a checkpoint's `config.json` into a [`ModelSpec`], which says everything that tells one
//! architecture from another; one file for each family does the reading. [`Decoder`] is the walk through embedding,
//! [`layers`] and final norm that such a spec describes. [`CausalLm`] is a decoder with its parameters: it reads weights
//! from a [`Checkpoint`](rekindle_hub::Checkpoint), computes the loss of a [`Batch`] and its gradients, carries adapters,
//! and generates.
//!
//! A batch is documents one after another, `[tokens, hidden]` with `cu_seqlens` and positions. There is no batch axis and
//! no padding, so packing documents together changes nothing but speed.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapters;
mod batch;
mod causal_lm;
mod checkpoint;
mod config;
mod decoder;
mod error;
mod families;
mod generate;
mod gradient_checkpointing;
pub mod layers;
mod log_probs;
mod loss;
mod memory;
mod non_finite;
pub mod objective;
mod parameters;
mod positions;
mod router_loss;
mod sample;
mod score;
pub mod spec;

pub use adapters::{DEFAULT_ADAPTER, LoftqBase, loftq_base};
pub use batch::{Answer, Batch, IGNORED, SampledCompletion};
pub use causal_lm::CausalLm;
pub use checkpoint::{GgufOptions, GgufTotals, export_gguf, export_gguf_adapter, open_checkpoint, unpack_gguf};
pub use checkpoint::{LoadIn, LoadOptions, MergeOptions, is_quantized, merge, quantize, stored_quantization};
pub use config::ModelConfig;
pub use decoder::{
    BatchContext, DecodeBatch, DecodeStates, DecodeSteps, Decoder, DecoderBackward, DecoderSaved, PendingStep, StepKey,
};
pub use error::Error;
pub use generate::{GenerationConfig, StopReason};
pub use gradient_checkpointing::GradientCheckpointing;
pub use log_probs::{LogSoftmax, TokenLogProb};
pub use loss::{ApplyGradients, ForwardPass};
pub use memory::{MemoryClass, MemoryLine, MemoryReport};
pub use non_finite::NonFinite;
pub use objective::{Objective, Sft};
pub use parameters::{LayerRole, LinearRole, Parameter, ParameterSpec, Role};
pub use positions::{save_positions, saved_positions};
pub use rekindle_kernels::fp8::Fp8Products;
pub use rekindle_lora::RowAdapter;
pub use rekindle_rope::{ContextExtension, Error as RopeError, Positions, RopeScaling};
pub use router_loss::RouterPass;
pub use sample::{Sampled, Sampler, SamplingParams, TokenLimits, TokenMask, Unsampled};
pub use spec::{LayerSpec, ModelSpec};
