//! NF4, FP4 and 8-bit weight formats, bit-exact with bitsandbytes, and MXFP4 and fp8.
//!
//! This crate is a plain Rust implementation of what bitsandbytes' CUDA backend computes: the same codes, the same
//! scales and the same decoded bits, including the rounding of the hardware's approximate reciprocal. It needs no GPU
//! and does not depend on language models.
//!
//! ```
//! use rekindle_quant::{QuantConfig, QuantizedTensor};
//!
//! let weight: Vec<f32> = (0..4096).map(|i| (i as f32 * 0.37).sin() * 0.02).collect();
//! let packed = QuantizedTensor::quantize(&weight, &[64, 64], &QuantConfig::default())?;
//! let restored: Vec<f32> = packed.dequantize();
//! assert_eq!(packed.codes().len(), 2048);
//! assert!(weight.iter().zip(&restored).all(|(w, r)| (w - r).abs() < 0.004));
//! # Ok::<(), rekindle_quant::Error>(())
//! ```
//!
//! | module | format |
//! |---|---|
//! | [`four_bit`] | NF4 and FP4 blocks: two codes per byte, one f32 scale per block |
//! | [`double_quant`] | the scales of those blocks, quantized to 8 bits |
//! | [`blockwise`] | dynamic 8-bit blocks, the format of optimizer states |
//! | [`int8`] | LLM.int8() weights with one scale per row, and their product with 8-bit activations |
//! | [`mxfp4`] | 4-bit floating-point blocks whose scales are powers of two, as gpt-oss has its experts |
//! | [`fp8`] | 8-bit floats with one scale per weight, row or block, as Qwen3-FP8 and vLLM's checkpoints have them |
//! | [`bnb`] | the tensor names and JSON of these formats in a checkpoint |

mod absmax;
pub mod blockwise;
pub mod bnb;
mod config;
pub mod double_quant;
mod dynamic_map;
mod element;
mod error;
mod format;
pub mod four_bit;
pub mod fp8;
pub mod int8;
#[cfg(feature = "linear")]
mod linear;
mod little_endian;
pub mod mxfp4;
mod reciprocal;
mod simd;
mod tensor;

pub use config::{Blocksize, QuantConfig, QuantType};
pub use double_quant::DoubleQuant;
pub use dynamic_map::DynamicMap;
pub use element::Element;
pub use error::Error;
pub use format::QuantFormat;
pub use fp8::{Fp8Scaling, Fp8Tensor, Fp8Weight};
pub use int8::Int8Tensor;
#[cfg(feature = "linear")]
pub use linear::{DiskMetadata, QuantLinear};
pub use mxfp4::Mxfp4Tensor;
pub use rekindle_hub::Dtype;
pub use tensor::{Absmax, QuantizedTensor};
