//! The products that the gradients of experts' matrices are.

use burn::tensor::{DType, Tensor as BurnTensor};

use super::{GroupedRows, check, cpu, cuda, expert_dims, meta, portable};
use crate::ops::routing::Dispatch;
use crate::{Backend, Grads, ParamRef, host};

impl Grads {
    /// Adds `alpha · dy_eᵀ · x_e` for every expert, the gradient of matrices `[experts · n, k]` from rows of `dy`
    /// `[rows, n]` and `x` `[rows, k]`.
    pub fn add_grouped_tn(
        &mut self,
        at: ParamRef,
        alpha: f32,
        dy: GroupedRows<'_>,
        x: GroupedRows<'_>,
        dispatch: &Dispatch,
    ) {
        let [n, k] = expert_dims(at.dims(), dispatch);
        check(dy, n, dispatch);
        check(x, k, dispatch);
        let (flat, here) = self.part_mut(at);
        match (Backend::of(flat), Backend::of(dy.tensor())) {
            (Backend::Cpu, Backend::Cpu) => host::with_mut(flat.burn_mut(), |flat| {
                cpu::add_tn(&mut flat[here.range()], alpha, dy, x, dispatch);
            }),
            (Backend::Cpu | Backend::Portable, _) => {
                let grad: BurnTensor<2> = portable::tn(dy, x, dispatch).cast(DType::F32);
                self.update(at, |old| old + grad * alpha);
            }
            (Backend::Meta, _) => meta::add_tn(dy, x, dispatch),
            (Backend::Cuda, _) => cuda::add_tn(&self.array(at), alpha, dy, x, dispatch),
        }
    }
}
