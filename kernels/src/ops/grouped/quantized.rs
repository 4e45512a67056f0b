//! Products with the quantized weights of experts. An expert with rows is decoded, some of its rows at a time on the CPU;
//! nothing of the others is.

use super::{GroupedRows, check, cpu, cuda, expert_dims, meta, portable};
use crate::ops::routing::Dispatch;
use crate::params::quantized::Place;
use crate::{Backend, QuantizedWeight, Tensor};

impl QuantizedWeight {
    /// `x_e · W_eᵀ` for a weight `[experts · out, in]`.
    pub fn grouped_nt(&self, x: GroupedRows<'_>, dispatch: &Dispatch) -> Tensor<2> {
        let [n, k] = expert_dims(self.dims(), dispatch);
        check(x, k, dispatch);
        match (&self.0, Backend::of(x.tensor())) {
            (Place::Host(codes), Backend::Cpu) => cpu::quantized_nt(x, codes, dispatch).into(),
            (Place::Host(_) | Place::Copied(..) | Place::Burn(_), _) => {
                let decode = |expert: usize| self.rows(expert * n..(expert + 1) * n, x.tensor().dtype());
                portable::nt_of(x, n, decode, dispatch).into()
            }
            (Place::Meta(_), _) => meta::product(x, n, dispatch, |rows| meta::quantized_nt(rows, [n, k])).into(),
            (Place::Cuda(array, _), _) => cuda::quantized_nt(x, array, dispatch).into(),
        }
    }

    /// `dy_e · W_e`, added to `dx` if there is one.
    pub fn grouped_nn(&self, dy: GroupedRows<'_>, dx: Option<Tensor<2>>, dispatch: &Dispatch) -> Tensor<2> {
        let [n, k] = expert_dims(self.dims(), dispatch);
        check(dy, n, dispatch);
        match (&self.0, Backend::of(dy.tensor())) {
            (Place::Host(codes), Backend::Cpu) => {
                cpu::quantized_nn(dy, codes, dx.map(Tensor::into_burn), dispatch).into()
            }
            (Place::Host(_) | Place::Copied(..) | Place::Burn(_), _) => {
                let decode = |expert: usize| self.rows(expert * n..(expert + 1) * n, dy.tensor().dtype());
                let product = portable::nn_of(dy, k, decode, dispatch);
                match dx {
                    None => product.into(),
                    Some(dx) => (dx.into_burn() + product).into(),
                }
            }
            (Place::Meta(_), _) => {
                let scratch = |rows| meta::quantized_nn(rows, [n, k]);
                match dx {
                    None => meta::product(dy, k, dispatch, scratch).into(),
                    Some(dx) => meta::add(dx.into_meta(), dy, dispatch, scratch).into(),
                }
            }
            (Place::Cuda(array, _), _) => cuda::quantized_nn(dy, array, dx.map(Tensor::into_cuda), dispatch).into(),
        }
    }
}
