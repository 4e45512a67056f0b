//! RMSNorm in Burn ops; the formulas stand in [`super`].

use burn::tensor::{DType, Tensor};

use super::GainForm;

pub(crate) fn forward(x: &Tensor<2>, form: GainForm, weight: Option<&Tensor<1>>, eps: f64) -> (Tensor<2>, Tensor<1>) {
    let wide = x.clone().cast(DType::F32);
    let rstd = (wide.clone() * wide).mean_dim(1).add_scalar(eps).sqrt().recip(); // [tokens, 1]
    let rstd = rstd.squeeze_dim::<1>(1);
    (recompute(x, form, weight, &rstd), rstd)
}

pub(crate) fn recompute(x: &Tensor<2>, form: GainForm, weight: Option<&Tensor<1>>, rstd: &Tensor<1>) -> Tensor<2> {
    let normalized = normalized(x, rstd);
    match (form, weight) {
        (GainForm::Plain, Some(weight)) if weight.dtype() == x.dtype() => {
            normalized.cast(x.dtype()) * weight.clone().unsqueeze::<2>()
        }
        (_, None) => normalized.cast(x.dtype()),
        (form, Some(weight)) => (normalized * gain(form, weight)).cast(weight.dtype()),
    }
}

pub(crate) fn backward(
    dy: &Tensor<2>,
    x: &Tensor<2>,
    form: GainForm,
    weight: Option<&Tensor<1>>,
    rstd: &Tensor<1>,
    residual: Option<Tensor<2>>,
) -> Tensor<2> {
    let g = match (form, weight) {
        (GainForm::Plain, Some(weight)) if dy.dtype() == x.dtype() => {
            (dy.clone() * weight.clone().unsqueeze::<2>()).cast(DType::F32)
        }
        (_, None) => dy.clone().cast(DType::F32),
        (form, Some(weight)) => dy.clone().cast(DType::F32) * gain(form, weight),
    };
    let xhat = normalized(x, rstd);
    let along = (g.clone() * xhat.clone()).mean_dim(1); // [tokens, 1]
    let dx = (g - xhat * along) * rstd.clone().unsqueeze_dim::<2>(1);
    match residual {
        Some(residual) => (dx + residual.cast(DType::F32)).cast(x.dtype()),
        None => dx.cast(x.dtype()),
    }
}

pub(crate) fn weight_grad(dy: &Tensor<2>, x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<1> {
    (dy.clone().cast(DType::F32) * normalized(x, rstd)).sum_dim(0).squeeze_dim(0)
}

/// x · rstd in f32.
fn normalized(x: &Tensor<2>, rstd: &Tensor<1>) -> Tensor<2> {
    x.clone().cast(DType::F32) * rstd.clone().unsqueeze_dim::<2>(1)
}

/// The factors in f32, `[1, hidden]`.
fn gain(form: GainForm, weight: &Tensor<1>) -> Tensor<2> {
    let weight = weight.clone().cast(DType::F32).unsqueeze::<2>();
    if form == GainForm::OnePlus { weight + 1.0 } else { weight }
}
