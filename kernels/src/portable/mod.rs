//! The operations in plain Burn ops: every device, every float dtype, and under autodiff.
//!
//! These are also the reference that the other paths are tested against.

pub(crate) mod attention;
pub(crate) mod linear_cross_entropy;
pub(crate) mod matmul;
pub(crate) mod optimizer;
pub(crate) mod packed;
pub(crate) mod rms_norm;
pub(crate) mod rope;
pub(crate) mod swiglu;
