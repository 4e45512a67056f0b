//! LoRA adapters: configuration, targets, the adapted linears, and PEFT's files.
//!
//! An adapter adds a low-rank product to a linear layer, y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ (Hu et al.,
//! arXiv:2106.09685), and only A and B are trained. [`LoraConfig`] says which linears get one,
//! [`LinearGroup`] computes and differentiates linears that share an input, adapted or not, and
//! [`Adapter`] reads and writes the files that PEFT reads and writes.
//!
//! ```
//! use rekindle_kernels::{DType, Device, ParamsBuilder, Weight, from_f32, to_f32};
//! use rekindle_lora::{LoraInit, Linear, LinearContext, LinearGroup, LoraConfig, initial_factors};
//!
//! let device = Device::cpu();
//! let config = LoraConfig::new(2).lora_alpha(4.0);
//! let weight = Weight::Frozen(from_f32(vec![1.0, 0.0, 0.0, 0.0, 1.0, 0.0], [2, 3], &device, DType::F32));
//! let mut group = LinearGroup::new(vec![Linear::new("q_proj", weight, None)]);
//! let mut params = ParamsBuilder::new(&device, DType::F32);
//! group.adapt(&mut params, 0, |linear| {
//!     let factors = initial_factors(&config, &linear.name, 3, 2);
//!     LoraInit { factors: Some((factors, config.scale())), bias: None }
//! });
//! let params = params.build();
//!
//! let x = from_f32(vec![1.0, 2.0, 3.0], [1, 3], &device, DType::F32);
//! let (y, _saved) = group.forward(LinearContext::new(&params), &x);
//! // B starts at zero, so the adapted linear starts as the base.
//! assert_eq!(to_f32(y[0].clone()), [1.0, 2.0]);
//! ```

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod adaptable;
mod adapter;
mod config;
mod dora;
mod error;
mod expert_targets;
mod experts;
mod init;
mod linear;
mod merge;
mod non_finite;
pub mod peft;
mod targets;
mod weighted;

pub use adaptable::{Adaptable, AdaptableMut};
pub use adapter::{AdaptableModules, Adapter, EmbeddingTable, LinearModule, LoraFactors, saved_rows};
pub use config::{
    BLOCK_LINEARS, Bias, FUSED_LINEARS, InitLoraWeights, LoftqConfig, LoraConfig, ModulePattern, SAVABLE, TargetModules,
};
pub use dora::initial_magnitude;
pub use error::Error;
pub use expert_targets::ExpertProjection;
pub use experts::{ExpertLinear, ExpertNames, ExpertPending, ExpertSaved};
pub use init::from_weights::{WeightSplit, loftq, split_weight, to_plain};
pub use init::initial_factors;
pub use linear::{
    AdapterRows, Dropout, Linear, LinearContext, LinearGroup, LinearPending, LinearSaved, LoraInit, RowAdapter,
};
pub use merge::merge;
pub use targets::match_targets;
pub use weighted::{Combination, weighted};
