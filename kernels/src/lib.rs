//! Fused operations on Burn tensors, each a hand-written forward and backward.
//!
//! Every operation is a pair of plain functions: `forward` returns its result and what the backward
//! needs, `backward` takes that and the gradient of the result. There is no tape in here; whoever
//! calls the pairs decides what is kept. Activations are `[tokens, features]`; several documents lie
//! one after another and are told apart by `cu_seqlens`, their cumulative lengths. There is no batch
//! axis and no padding.
//!
//! Each operation exists twice: in plain Burn operations for every device and dtype ([`Path::Portable`]),
//! and for `f32` on the CPU as loops over slices ([`Path::Cpu`]). [`Path::of`] tells which one a tensor takes.
//!
//! ```
//! use burn::tensor::{Device, Tensor};
//! use rekindle_kernels::rms_norm;
//!
//! let device = Device::flex();
//! let x = Tensor::<2>::from_data([[3.0f32, 4.0]], &device);
//! let weight = Tensor::<1>::from_data([1.0f32, 2.0], &device);
//! let (y, _rstd) = rms_norm::forward(&x, &weight, 0.0);
//! let rms = (12.5f32).sqrt();
//! let expected = [3.0 / rms, 2.0 * 4.0 / rms];
//! for (got, want) in y.into_data().try_to_vec::<f32>().unwrap().iter().zip(expected) {
//!     assert!((got - want).abs() < 1e-6);
//! }
//! ```

pub mod adamw;
pub mod attention;
mod cpu;
mod device;
pub mod dropout;
pub mod embedding;
pub mod linear_cross_entropy;
pub mod matmul;
pub mod packed;
mod params;
mod path;
mod portable;
pub mod rms_norm;
pub mod rope;
pub mod swiglu;
mod tensors;
mod weight;

pub use device::{DeviceError, DeviceKind, open as open_device, parse as parse_device};
pub use packed::PackedWeight;
pub use params::{Grads, ParamInfo, ParamRef, Params, ParamsBuilder};
pub use path::Path;
pub use tensors::{from_f32, to_f32};
pub use weight::Weight;
