//! Fused operations, each a hand-written forward and backward.
//!
//! Every operation is a pair of plain functions: `forward` returns its result and what the backward
//! needs, `backward` takes that and the gradient of the result. There is no tape in here; whoever
//! calls the pairs decides what is kept. Activations are `[tokens, features]`; several documents lie
//! one after another and are told apart by `cu_seqlens`, their cumulative lengths. There is no batch
//! axis and no padding.
//!
//! Each operation exists three times: in plain Burn operations for every device and dtype of Burn
//! ([`Path::Portable`]), for `f32` on the CPU as loops over slices ([`Path::Cpu`]), and as kernels and cuBLASLt products
//! on an NVIDIA GPU ([`Path::Cuda`]). [`Path::of`] tells which one a [`Tensor`] takes.
//!
//! ```
//! use rekindle_kernels::{Device, from_f32, rms_norm, to_f32};
//! use burn::tensor::DType;
//!
//! let device = Device::cpu();
//! let x = from_f32(vec![3.0, 4.0], [1, 2], &device, DType::F32);
//! let weight = from_f32(vec![1.0, 2.0], [2], &device, DType::F32);
//! let (y, _rstd) = rms_norm::forward(&x, &weight, 0.0, 0);
//! let rms = (12.5f32).sqrt();
//! let expected = [3.0 / rms, 2.0 * 4.0 / rms];
//! for (got, want) in to_f32(y).iter().zip(expected) {
//!     assert!((got - want).abs() < 1e-6);
//! }
//! ```

pub mod attention;
mod cpu;
pub mod cuda;
mod device;
pub mod dropout;
pub mod embedding;
mod grads;
pub mod linear_cross_entropy;
pub mod matmul;
mod memory;
pub mod neftune;
mod offload;
pub mod optimizer;
pub mod packed;
mod params;
mod path;
mod philox;
mod portable;
pub mod rms_norm;
pub mod rope;
mod rows;
mod slot;
pub mod stacked;
pub mod stochastic;
pub mod swiglu;
mod tensor;
mod weight;

pub use device::{Device, DeviceError, DeviceKind, open as open_device, parse as parse_device};
pub use grads::Grads;
pub use memory::DeviceMemory;
pub use offload::Offloaded;
pub use packed::PackedWeight;
pub use params::{Group, ParamInfo, ParamRef, Params, ParamsBuilder};
pub use path::Path;
pub use rows::Rows;
pub use tensor::{Tensor, from_f32, from_le_bytes, to_f32, unfilled};
pub use weight::Weight;
