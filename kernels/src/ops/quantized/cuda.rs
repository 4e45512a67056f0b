//! Products on CUDA: the whole weight is decoded into scratch memory, which goes back at once for the next product.

use crate::ops::matmul::cuda as matmul;
use crate::params::quantized::cuda::QuantizedArray;
use crate::runtime::{Array, Form};

/// `x · Wᵀ + bias`.
pub(crate) fn nt(w: &QuantizedArray, x: &Array, bias: Option<&Array>) -> Array {
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
