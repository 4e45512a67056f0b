//! Rows without their mean: y = x − mean(x), the first half of LayerNorm, whose second is RMSNorm.
//!
//! # Shapes
//! x, y `[rows, width]`.
//!
//! # Dtypes
//! The mean in f32; y is rounded to the dtype of x.
//!
//! # Gradients
//! dx = dy − mean(dy): the operation is its own backward. Nothing is saved.

mod cpu;
pub(crate) mod cuda;
mod meta;
mod portable;

use crate::{Backend, Tensor};

/// Returns y.
pub fn forward(x: &Tensor<2>) -> Tensor<2> {
    match Backend::of(x) {
        Backend::Cpu => cpu::forward(x.burn()).into(),
        Backend::Portable => portable::forward(x.burn()).into(),
        Backend::Cuda => cuda::forward(x.cuda()).into(),
        Backend::Meta => meta::forward(x.meta()).into(),
    }
}

/// Returns the gradient to x.
pub fn backward(dy: &Tensor<2>) -> Tensor<2> {
    forward(dy)
}
