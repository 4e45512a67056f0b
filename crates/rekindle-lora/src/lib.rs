//! LoRA adapters: configuration, targets, the adapted linears, and PEFT's files.
//!
//! An adapter adds a low-rank product to a linear layer, y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ (Hu et al.,
//! arXiv:2106.09685), and only A and B are trained. [`LoraConfig`] says which linears get one,
//! [`LinearGroup`] computes and differentiates linears that share an input, adapted or not, and
//! [`Adapter`] reads and writes the files that PEFT reads and writes.
//!
//! ```
//! use burn::tensor::{DType, Device, Tensor};
//! use rekindle_kernels::{ParamsBuilder, Weight};
//! use rekindle_lora::{Linear, LinearGroup, LoraConfig, initial_factors};
//!
//! let device = Device::flex();
//! let config = LoraConfig::new(2).lora_alpha(4.0);
//! let weight = Weight::Frozen(Tensor::from_data([[1.0f32, 0.0, 0.0], [0.0, 1.0, 0.0]], &device));
//! let mut group = LinearGroup::new(vec![Linear::new("q_proj", weight, None)]);
//! let mut params = ParamsBuilder::default();
//! group.adapt(&mut params, 0, |linear| Some((initial_factors(&config, &linear.name, 3, 2), config.scale())));
//! let params = params.build(&device, DType::F32);
//!
//! let x = Tensor::<2>::from_data([[1.0f32, 2.0, 3.0]], &device);
//! let (y, _saved) = group.forward(&params, &x, None);
//! // B starts at zero, so the adapted linear starts as the base.
//! assert_eq!(y[0].clone().into_data().try_to_vec::<f32>().unwrap(), [1.0, 2.0]);
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adapter;
mod config;
mod error;
mod init;
mod linear;
pub mod peft;
mod targets;

pub use adapter::{Adapter, Factors};
pub use config::{BLOCK_LINEARS, Bias, InitLoraWeights, LoraConfig, TargetModules};
pub use error::Error;
pub use init::initial_factors;
pub use linear::{Dropout, Linear, LinearGroup, Saved};
pub use targets::match_targets;
