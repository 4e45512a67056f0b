//! Layers and LoRA adapters of Rekindle as modules of [Burn](burn).
//!
//! Each layer is a `Config` with `init`, a `Module` with records, and one node of Burn's autodiff graph, whose forward and
//! backward are the hand-written pair of `rekindle-kernels` and which saves what that pair saves. The layers work with any
//! optimizer and any other module of Burn. [`quantize`] quantizes the linears of a network, [`wrap`] puts adapters on them,
//! and [`save_adapter`] and [`load_adapter`] exchange the adapters with PEFT. [`Checkpointed`] recomputes the activations
//! of a block in the backward.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use rekindle_burn::{RmsNorm, RmsNormConfig};
//!
//! let device = Device::flex().autodiff();
//! let norm: RmsNorm = RmsNormConfig::new(2).with_epsilon(0.0).init(&device);
//! let x = Tensor::<3>::from_floats([[[3.0, 4.0]]], &device).require_grad();
//! let y = norm.forward(x.clone());
//! let grads = y.powi_scalar(2).sum().backward();
//! // The length of a normalized row does not depend on x.
//! let dx = x.grad(&grads).expect("x is tracked").into_data().try_into_vec::<f32>()?;
//! assert!(dx.iter().all(|dx| dx.abs() < 1e-6));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Devices
//! `Device::flex()`, the CPU, has the loops of `rekindle-kernels` in `f32` and Burn's operations in other dtypes. With the
//! feature `wgpu`, Burn's wgpu devices run every layer in Burn's operations. With the feature `burn-cuda`, layers on
//! Burn's CUDA device are Rekindle's CUDA kernels, which read the memory of Burn's tensors.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapter;
mod attention;
mod checkpointed;
mod device;
mod error;
mod linear;
mod linear_cross_entropy;
mod lora_linear;
mod node;
mod quant_linear;
mod quantize;
mod rms_norm;
mod rotary;
mod swiglu;
mod wrap;

pub use adapter::Adapter;
pub use attention::{FlashAttention, FlashAttentionConfig};
pub use checkpointed::Checkpointed;
pub use error::Error;
pub use linear_cross_entropy::{LinearCrossEntropy, LinearCrossEntropyConfig};
pub use lora_linear::{LoraLinear, LoraLinearConfig};
pub use quant_linear::{QuantLinear, QuantLinearConfig, QuantizedCodes, WeightFormat};
pub use quantize::{QuantConfig, QuantizedParam, quantize};
pub use rms_norm::{RmsNorm, RmsNormConfig};
pub use rotary::{RotaryEmbedding, RotaryEmbeddingConfig};
pub use swiglu::{SwiGlu, SwiGluConfig};
pub use wrap::{load_adapter, save_adapter, wrap};
