//! The operations, each a forward and a backward.
//!
//! One folder an operation: `mod.rs` has the mathematics and chooses the backend, `cpu.rs` loops over `f32` slices,
//! `portable.rs` is plain Burn operations (every device and dtype of Burn, autodiff too, and the reference of the other
//! two), `cuda.rs` launches kernels of `kernels/cu/` and queues cuBLASLt products.

pub mod attention;
pub mod causal_conv;
pub mod center;
pub mod decode_step;
pub mod dropout;
pub mod embedding;
pub mod expert_act;
pub mod fp8;
pub mod gated_activation;
pub mod gated_delta;
pub mod gated_norm;
pub mod grouped;
mod linear;
pub mod linear_cross_entropy;
pub mod matmul;
pub mod neftune;
pub mod output_gate;
pub mod paged_attention;
mod quantized;
pub mod rms_norm;
pub mod rope;
pub mod router_probabilities;
pub mod routing;
pub mod stacked;
