//! Fused operations, each a hand-written forward and backward.
//!
//! Every operation is a pair of plain functions: `forward` returns its result and what the backward
//! needs, `backward` takes that and the gradient of the result. There is no tape in here; whoever
//! calls the pairs decides what is kept. Activations are `[tokens, features]`; several documents lie
//! one after another and are told apart by `cu_seqlens`, their cumulative lengths. There is no batch
//! axis and no padding.
//!
//! Each operation exists three times: in plain Burn operations for every device and dtype of Burn
//! ([`Backend::Portable`]), for `f32` on the CPU as loops over slices ([`Backend::Cpu`]), and as kernels and cuBLASLt products
//! on an NVIDIA GPU ([`Backend::Cuda`]). [`Backend::of`] tells which one a [`Tensor`] takes.
//!
//! ```
//! use rekindle_kernels::rms_norm::{self, Gain};
//! use rekindle_kernels::{DType, Device, from_f32, to_f32};
//!
//! let device = Device::cpu();
//! let x = from_f32(vec![3.0, 4.0], [1, 2], &device, DType::F32);
//! let weight = from_f32(vec![1.0, 2.0], [2], &device, DType::F32);
//! let (y, _rstd) = rms_norm::forward(&x, &Gain::Plain(weight), 0.0, 0);
//! let rms = (12.5f32).sqrt();
//! let expected = [3.0 / rms, 2.0 * 4.0 / rms];
//! for (got, want) in to_f32(y).iter().zip(expected) {
//!     assert!((got - want).abs() < 1e-6);
//! }
//! ```

mod host;
pub mod ops;
pub mod optimizer;
mod params;
mod rng;
pub mod runtime;
mod tensor;

/// The dtype of a tensor. Activations, weights in use and results are f32, f16 or bf16.
pub use burn::tensor::DType;
pub use ops::{
    attention, causal_conv, center, decode_step, dropout, embedding, expert_act, fp8, gated_activation, gated_delta,
    gated_norm, grouped, linear_cross_entropy, matmul, neftune, output_gate, paged_attention, rms_norm, rope,
    router_probabilities, routing, stacked,
};
pub use params::{
    BlockPass, FrozenShards, Grads, Group, ParamInfo, ParamRef, Params, ParamsBuilder, QuantizedWeight, ShardExchange,
    ShardedWeight, Weight, quantized, stochastic,
};
pub use rng::RngKey;
pub use runtime::{MemoryStats, MemoryUse};
pub use tensor::{
    Backend, Device, DeviceError, DeviceKind, DeviceLimits, DeviceMemory, MetaDevice, MetaMemory, MetaTensor,
    Offloaded, Tensor, from_f32, from_le_bytes, open_device, parse_device, to_f32, to_le_bytes, unfilled,
};
