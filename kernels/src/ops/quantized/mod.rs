//! Products with packed weights. Rows are decoded as they are needed: a few at a time on the CPU and in Burn's
//! operations, the whole weight on CUDA, into scratch memory that the next product reuses. On CUDA, up to 32 rows with a 4-bit
//! weight have a kernel of their own, in which a value is codebook[code] in the compute dtype times its f32 scale.
//!
//! # Shapes
//! W `[out, in]`; x, dx `[tokens, in]`; y, dy `[tokens, out]`.
//!
//! # Gradients
//! To x alone: dx = dy·W. Nothing is saved.

mod cpu;
pub(crate) mod cuda;
mod meta;
mod portable;

use crate::params::quantized::Place;
use crate::{Backend, QuantizedWeight, Tensor};

impl QuantizedWeight {
    /// `x · Wᵀ + bias`.
    pub fn nt(&self, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
        match (&self.0, Backend::of(x)) {
            (Place::Host(codes), Backend::Cpu) => cpu::nt(codes, x.burn(), bias.map(Tensor::burn)).into(),
            (Place::Host(_) | Place::Copied(..) | Place::Burn(_), _) => {
                let decode = |rows| self.rows(rows, x.dtype());
                portable::nt(self.dims(), decode, x.burn(), bias.map(Tensor::burn)).into()
            }
            (Place::Meta(weight), _) => meta::nt(weight.dims, x.meta()).into(),
            (Place::Cuda(array, _), _) => cuda::nt(array, x.cuda(), bias.map(Tensor::cuda)).into(),
        }
    }

    /// `dy · W`, added to `dx` if there is one.
    pub fn nn(&self, dy: &Tensor<2>, dx: Option<Tensor<2>>) -> Tensor<2> {
        match (&self.0, Backend::of(dy)) {
            (Place::Host(codes), Backend::Cpu) => cpu::nn(codes, dy.burn(), dx.map(Tensor::into_burn)).into(),
            (Place::Host(_) | Place::Copied(..) | Place::Burn(_), _) => {
                let decode = |rows| self.rows(rows, dy.dtype());
                portable::nn(self.dims(), decode, dy.burn(), dx.map(Tensor::into_burn)).into()
            }
            (Place::Meta(weight), _) => meta::nn(weight.dims, dy.meta(), dx.map(Tensor::into_meta)).into(),
            (Place::Cuda(array, _), _) => cuda::nn(array, dy.cuda(), dx.map(Tensor::into_cuda)).into(),
        }
    }
}
