//! The product that every gradient of a matrix is.

use burn::tensor::DType;

use super::{Form, cpu, cuda, meta, tn};
use crate::{Backend, Grads, ParamRef, Tensor, host};

impl Grads {
    /// Adds `alpha · aᵀ · b`, the gradient of a weight `[out, in]` from `[rows, out]` and `[rows, in]`.
    pub fn add_tn(&mut self, at: ParamRef, alpha: f32, a: &Tensor<2>, b: &Tensor<2>) {
        let (flat, here) = self.part_mut(at);
        // A bf16 model on the CPU has f32 gradients.
        match (Backend::of(flat), Backend::of(a)) {
            (Backend::Cpu, Backend::Cpu) => host::with_mut(flat.burn_mut(), |flat| {
                cpu::into_slice(&mut flat[here.range()], 1.0, alpha, a.burn(), b.burn(), Form::Tn);
            }),
            (Backend::Cpu | Backend::Portable, _) => {
                let grad = tn(a, b).into_burn().cast(DType::F32);
                self.update(at, |old| old + grad * alpha);
            }
            (Backend::Meta, _) => drop(meta::scratch(a.meta(), b.meta(), Form::Tn)),
            (Backend::Cuda, _) => cuda::accumulate(&self.array(at), alpha, a.cuda(), b.cuda(), Form::Tn.into()),
        }
    }
}
