//! Matrix products. [`Form`] says which operand is transposed; a linear layer is `y = product(x, w, Nt)`, its gradients
//! `dx = product(dy, w, Nn)` and `dw = product(dy, x, Tn)`.

use super::{ACTIVATIONS, check_dims, elementwise};
use crate::cuda::{Array, DType, Form, Gemm};

/// The product in the operands' dtype.
pub(crate) fn product(a: &Array, b: &Array, form: Form) -> Array {
    into_new(a, b, form, a.dtype(), None)
}

/// The product with `bias` `[1, n]`, of the operands' dtype, added to every row.
pub(crate) fn product_bias(a: &Array, b: &Array, form: Form, bias: &Array) -> Array {
    into_new(a, b, form, a.dtype(), Some(bias))
}

/// `y + alpha · product`; y has the operands' dtype or f32.
pub(crate) fn product_add(y: Array, alpha: f32, a: &Array, b: &Array, form: Form) -> Array {
    let y = if y.is_unique() { y } else { elementwise::copy(&y) };
    accumulate(&y, alpha, a, b, form);
    y
}

/// `out += alpha · product`, whoever else sees `out`: f32 gradients, mostly.
pub(crate) fn accumulate(out: &Array, alpha: f32, a: &Array, b: &Array, form: Form) {
    let shape @ [m, n, k] = sizes(a, b, form);
    check_dims("the sum", out, [m, n]);
    if k > 0 {
        let gemm = Gemm::new(form, shape, a.operand(), b.operand(), out.operand());
        out.cuda().gemm(&Gemm { alpha, beta: 1.0, ..gemm });
    }
}

/// The product in the place of `out`'s values, rounded to its dtype: the operands' or f32.
pub(super) fn product_into(out: &Array, a: &Array, b: &Array, form: Form) {
    let shape @ [m, n, k] = sizes(a, b, form);
    check_dims("the product", out, [m, n]);
    assert!(k > 0, "a product of nothing has no place");
    out.cuda().gemm(&Gemm::new(form, shape, a.operand(), b.operand(), out.operand()));
}

fn into_new(a: &Array, b: &Array, form: Form, dtype: DType, bias: Option<&Array>) -> Array {
    let shape @ [m, n, k] = sizes(a, b, form);
    if let Some(bias) = bias {
        check_dims("the bias", bias, [1, n]);
        assert_eq!(bias.dtype(), dtype, "dtype of the bias");
    }
    if k == 0 {
        let zeros = Array::zeros(a.cuda(), [m, n], dtype, ACTIVATIONS);
        return match bias {
            Some(bias) => elementwise::add_bias(zeros, bias),
            None => zeros,
        };
    }
    let out = Array::empty(a.cuda(), [m, n], dtype, ACTIVATIONS);
    let gemm = Gemm::new(form, shape, a.operand(), b.operand(), out.operand());
    // cuBLASLt reads a bias in vectors, and one of the flat buffer begins anywhere.
    let bias = bias.map(Array::aligned);
    a.cuda().gemm(&Gemm { bias: bias.as_ref().map(|bias| bias.ptr()), ..gemm });
    out
}

/// `[m, n, k]`.
fn sizes(a: &Array, b: &Array, form: Form) -> [usize; 3] {
    let [[m, k], [inner, n]] = match form {
        Form::Nt => [a.dims(), [b.cols(), b.rows()]],
        Form::Nn => [a.dims(), b.dims()],
        Form::Tn => [[a.cols(), a.rows()], b.dims()],
    };
    assert_eq!(k, inner, "inner sizes of the {form:?} product of {:?} and {:?}", a.dims(), b.dims());
    [m, n, k]
}
