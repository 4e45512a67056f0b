//! Products on CUDA: the whole weight is decoded into scratch memory, which goes back at once for the next product. A few
//! rows have a kernel that decodes in registers.

pub(crate) mod few_rows;

use crate::ops::matmul::cuda as matmul;
use crate::params::quantized::cuda::QuantizedArray;
use crate::runtime::{Array, Form, MemoryUse};

/// `x · Wᵀ + bias`.
pub(crate) fn nt(w: &QuantizedArray, x: &Array, bias: Option<&Array>) -> Array {
    if few_rows::takes(x, w) {
        let y = Array::empty(x.cuda(), [x.rows(), w.dims()[0]], x.dtype(), MemoryUse::Activations);
        few_rows::linear(&y, x, w, bias, None);
        return y;
    }
    let w = w.decode(x.dtype(), None);
    match bias {
        Some(bias) => matmul::product_bias(x, &w, Form::Nt, bias),
        None => matmul::product(x, &w, Form::Nt),
    }
}

/// `dy · W`, added to `dx` if there is one.
pub(crate) fn nn(w: &QuantizedArray, dy: &Array, dx: Option<Array>) -> Array {
    let w = w.decode(dy.dtype(), None);
    match dx {
        Some(dx) => matmul::product_add(dx, 1.0, dy, &w, Form::Nn),
        None => matmul::product(dy, &w, Form::Nn),
    }
}
