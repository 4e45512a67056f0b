//! The gradient of what experts add to every one of their rows.

use burn::tensor::{DType, Tensor as BurnTensor};

use super::{Dispatch, cuda};
use crate::{Backend, Grads, ParamRef, Tensor, host};

impl Grads {
    /// Adds the sum over each expert's rows of `dy` `[rows, n]`, the gradient of a bias `[experts, n]`.
    ///
    /// # Panics
    /// If the shapes don't fit.
    pub fn add_expert_rows(&mut self, at: ParamRef, dy: &Tensor<2>, dispatch: &Dispatch) {
        let [experts, n] = at.dims();
        assert_eq!((experts, dy.dims()), (dispatch.experts(), [dispatch.rows(), n]), "rows and biases of the experts");
        let (flat, here) = self.part_mut(at);
        match (Backend::of(flat), Backend::of(dy)) {
            (Backend::Cpu, Backend::Cpu) => host::with_mut(flat.burn_mut(), |flat| {
                let dy = host::View::of(dy.burn());
                let dy = dy.as_slice();
                for (expert, sums) in flat[here.range()].chunks_exact_mut(n).enumerate() {
                    for row in dispatch.host().range(expert) {
                        sums.iter_mut().zip(&dy[row * n..]).for_each(|(sum, dy)| *sum += dy);
                    }
                }
            }),
            (Backend::Cpu | Backend::Portable, _) => {
                let dy = dy.burn().clone().cast(DType::F32);
                let sum = |expert: usize| {
                    let rows = dispatch.host().range(expert);
                    match rows.len() {
                        0 => BurnTensor::zeros([1, n], (&dy.device(), DType::F32)),
                        count => dy.clone().narrow(0, rows.start, count).sum_dim(0),
                    }
                };
                let sums = BurnTensor::cat((0..experts).map(sum).collect(), 0);
                self.update(at, |old| old + sums);
            }
            (Backend::Meta, _) => {}
            (Backend::Cuda, _) => cuda::add_expert_rows(&self.array(at), dy.cuda(), dispatch),
        }
    }
}
