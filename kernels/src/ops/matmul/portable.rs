//! Products through Burn's own matmul.

use burn::tensor::{DType, Tensor};

use super::Form;

/// `a · b` in the given form.
///
/// Burn's f16 product on the CPU rounds partial sums to f16, so those operands are multiplied in f32.
pub(crate) fn product(a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    let dtype = a.dtype();
    if dtype == DType::F16 { wide_product(a, b, form).cast(dtype) } else { raw_product(a.clone(), b.clone(), form) }
}

/// `y + alpha · a · b`, in the dtype of y: that of the operands or f32.
pub(crate) fn product_add(y: Tensor<2>, alpha: f32, a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    let product = if y.dtype() == a.dtype() { product(a, b, form) } else { wide_product(a, b, form) };
    y + product * alpha
}

/// `a · b` as f32; rounded to the operands' dtype before, unless that is f16, whose range sums over tokens leave.
pub(crate) fn f32_product(a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    if a.dtype() == DType::F16 { wide_product(a, b, form) } else { product(a, b, form).cast(DType::F32) }
}

/// `a · b` in f32.
fn wide_product(a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    raw_product(a.clone().cast(DType::F32), b.clone().cast(DType::F32), form)
}

fn raw_product(a: Tensor<2>, b: Tensor<2>, form: Form) -> Tensor<2> {
    form.sizes(a.dims(), b.dims());
    match form {
        Form::Nt => a.matmul(b.transpose()),
        Form::Nn => a.matmul(b),
        Form::Tn => a.transpose().matmul(b),
    }
}
