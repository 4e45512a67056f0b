//! The product that every gradient of a matrix is.

use super::{Form, cpu, cuda, meta, portable};
use crate::{Backend, Grads, ParamRef, Tensor, host};

impl Grads {
    /// Adds `alpha · aᵀ · b`, the gradient of a weight `[out, in]` from `[rows, out]` and `[rows, in]`.
    pub fn add_tn(&mut self, at: ParamRef, alpha: f32, a: &Tensor<2>, b: &Tensor<2>) {
        let (flat, here) = self.part_mut(at);
        // A model of 16 bits on the CPU has f32 gradients.
        match (Backend::of(flat), Backend::of(a)) {
            (Backend::Cpu, Backend::Cpu) => host::with_mut(flat.burn_mut(), |flat| {
                cpu::into_slice(&mut flat[here.range()], 1.0, alpha, a.burn(), b.burn(), Form::Tn);
            }),
            (Backend::Cpu | Backend::Portable, _) => {
                let grad = portable::f32_product(a.burn(), b.burn(), Form::Tn);
                self.update(at, |old| old + grad * alpha);
            }
            (Backend::Meta, _) => drop(meta::scratch(a.meta(), b.meta(), Form::Tn)),
            (Backend::Cuda, _) => cuda::accumulate(&self.array(at), alpha, a.cuda(), b.cuda(), Form::Tn.into()),
        }
    }
}
