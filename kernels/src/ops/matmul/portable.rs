//! Products through Burn's own matmul.

use burn::tensor::Tensor;

use super::Form;

/// `a · b` in the given form.
pub(crate) fn product(a: &Tensor<2>, b: &Tensor<2>, form: Form) -> Tensor<2> {
    form.sizes(a.dims(), b.dims());
    let (a, b) = (a.clone(), b.clone());
    match form {
        Form::Nt => a.matmul(b.transpose()),
        Form::Nn => a.matmul(b),
        Form::Tn => a.transpose().matmul(b),
    }
}
