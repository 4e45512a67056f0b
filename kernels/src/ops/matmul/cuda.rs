//! Matrix products. [`Form`] says which operand is transposed; a linear layer is `y = product(x, w, Nt)`, its gradients
//! `dx = product(dy, w, Nn)` and `dw = product(dy, x, Tn)`.

pub(crate) mod factors;
mod few_rows;

use crate::runtime::op::{check_dims, like};
use crate::runtime::{Array, Cuda, Form, Gemm, MemoryUse, elementwise};

/// The product in the operands' dtype.
pub(crate) fn product(a: &Array, b: &Array, form: Form) -> Array {
    linear(a, b, form, None, None, 0)
}

/// The product with `bias` `[1, n]`, of the operands' dtype, added to every row.
pub(crate) fn product_bias(a: &Array, b: &Array, form: Form, bias: &Array) -> Array {
    linear(a, b, form, Some(bias), None, 0)
}

/// `y + alpha · product`, in the memory of y where it may be; y has the operands' dtype or f32.
pub(crate) fn product_add(y: Array, alpha: f32, a: &Array, b: &Array, form: Form) -> Array {
    add_onto(y, alpha, a, b, form, None)
}

/// The product with `bias` `[1, n]` added to every row and `onto`, of the operands' dtype or f32, to the whole, in the memory
/// of that where it may be; a new matrix has `pad_cols` spare columns behind each row.
pub(crate) fn linear(
    a: &Array,
    b: &Array,
    form: Form,
    bias: Option<&Array>,
    onto: Option<Array>,
    pad_cols: usize,
) -> Array {
    if let Some(y) = onto {
        return add_onto(y, 1.0, a, b, form, bias);
    }
    let shape @ [m, n, k] = sizes(a, b, form);
    if k == 0 {
        let zeros = Array::zeros(a.cuda(), [m, n], a.dtype(), MemoryUse::Activations);
        return match bias {
            Some(bias) => elementwise::add_bias(zeros, bias),
            None => zeros,
        };
    }
    let out = Array::padded(a.cuda(), [m, n], pad_cols, a.dtype(), MemoryUse::Activations);
    if few_rows::takes(a, b, form, bias.is_none()) {
        few_rows::linear(&out, a, b, bias, None);
        return out;
    }
    let gemm = Gemm::new(form, shape, a.operand(), b.operand(), out.operand());
    with_bias(gemm, bias, out.cuda());
    out
}

fn add_onto(y: Array, alpha: f32, a: &Array, b: &Array, form: Form, bias: Option<&Array>) -> Array {
    let shape @ [m, n, k] = sizes(a, b, form);
    check_dims("the sum", &y, [m, n]);
    if k == 0 {
        return match bias {
            Some(bias) => elementwise::add_bias(y, bias),
            None => y,
        };
    }
    if alpha == 1.0 && few_rows::takes(a, b, form, false) {
        if y.dtype() != a.dtype() {
            return elementwise::add_narrow(y, &linear(a, b, form, bias, None, 0));
        }
        let out = if y.is_unique() { y.clone() } else { like(&y) };
        few_rows::linear(&out, a, b, bias, Some(&y));
        return out;
    }
    if bias.is_some_and(|bias| bias.dtype() != y.dtype()) {
        return elementwise::add_narrow(y, &linear(a, b, form, bias, None, 0));
    }
    // With a bias a product cannot be timed on y, whose values must stay what they are.
    let in_place = y.is_unique() && bias.is_none();
    let out = if in_place { y.clone() } else { like(&y) };
    let gemm = Gemm::new(form, shape, a.operand(), b.operand(), out.operand());
    let c = (!in_place).then(|| y.operand());
    with_bias(Gemm { alpha, beta: 1.0, c, ..gemm }, bias, out.cuda());
    out
}

/// Queues a product with a bias `[1, n]` of the dtype of the result.
fn with_bias(gemm: Gemm, bias: Option<&Array>, cuda: &Cuda) {
    if let Some(bias) = bias {
        check_dims("the bias", bias, [1, gemm.n]);
        assert_eq!(bias.dtype(), gemm.d.dtype, "dtype of the bias");
    }
    // cuBLASLt reads a bias in vectors, and one of the flat buffer begins anywhere.
    let bias = bias.map(Array::aligned);
    cuda.gemm(&Gemm { bias: bias.as_ref().map(Array::ptr), ..gemm });
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
pub(crate) fn product_into(out: &Array, a: &Array, b: &Array, form: Form) {
    let shape @ [m, n, k] = sizes(a, b, form);
    check_dims("the product", out, [m, n]);
    assert!(k > 0, "a product of nothing has no place");
    if out.dtype() == a.dtype() && few_rows::takes(a, b, form, true) {
        return few_rows::linear(out, a, b, None, None);
    }
    out.cuda().gemm(&Gemm::new(form, shape, a.operand(), b.operand(), out.operand()));
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
