//! Memory of products with a quantized weight on the CPU.

use super::cpu;
use crate::ops::matmul::Form;
use crate::tensor::MetaTensor;

/// `x · Wᵀ + bias` for W of these dims.
pub(super) fn nt([out, input]: [usize; 2], x: &MetaTensor) -> MetaTensor {
    let y = x.sized([x.dims()[0], out]);
    let _scratch = x.device().scratch(cpu::scratch([out, input], x.dims()[0], Form::Nt));
    y
}

/// `dy · W`, added to `dx`.
pub(super) fn nn([out, input]: [usize; 2], dy: &MetaTensor, dx: Option<MetaTensor>) -> MetaTensor {
    let dx = dx.map_or_else(|| dy.sized([dy.dims()[0], input]), MetaTensor::owned);
    let _scratch = dy.device().scratch(cpu::scratch([out, input], dy.dims()[0], Form::Nn));
    dx
}
