//! Optimizer steps in Burn ops; the formulas stand in [`crate::optimizer`].

use core::ops::Range;

use burn::tensor::Tensor as BurnTensor;

use super::StepCoefficients;
use crate::{Device, Tensor, from_f32, to_f32};

/// Changes the values of `range` and their state `at` other places.
pub(crate) fn step(
    params: &mut BurnTensor<1>,
    grads: &BurnTensor<1>,
    factor: f64,
    moments: &mut [Tensor<1>],
    coefficients: &StepCoefficients,
    range: Range<usize>,
    at: Range<usize>,
) {
    let part = |t: &BurnTensor<1>, range: &Range<usize>| t.clone().slice([range.clone()]);
    let (p, g) = (part(params, &range), part(grads, &range) * factor);
    match (*coefficients, moments) {
        (
            StepCoefficients::AdamW { keep, step_size, root_correction, beta1, beta2, eps },
            [Tensor::Burn(first), Tensor::Burn(second)],
        ) => {
            let m = part(first, &at) * beta1 + g.clone() * (1.0 - beta1);
            let v = part(second, &at) * beta2 + g.clone() * g * (1.0 - beta2);
            let update = m.clone() / (v.clone().sqrt() * root_correction + eps) * step_size;
            put(params, range, p * keep - update);
            put(first, at.clone(), m);
            put(second, at, v);
        }
        (StepCoefficients::Lion { keep, lr, beta1, beta2 }, [Tensor::Burn(first)]) => {
            let m = part(first, &at);
            let direction = (m.clone() * beta1 + g.clone() * (1.0 - beta1)).sign();
            put(params, range, p * keep - direction * lr);
            put(first, at, m * beta2 + g * (1.0 - beta2));
        }
        (StepCoefficients::Sgd { weight_decay, lr, momentum }, [Tensor::Burn(first)]) => {
            let m = part(first, &at) * momentum + (g + p.clone() * weight_decay);
            put(params, range, p - m.clone() * lr);
            put(first, at, m);
        }
        (StepCoefficients::Sgd { weight_decay, lr, .. }, []) => {
            put(params, range, p.clone() - (g + p * weight_decay) * lr)
        }
        _ => panic!("the moments of the rule, beside the values"),
    }
}

/// Changes the values of `range` on the host.
pub(crate) fn on_host(
    values: &mut BurnTensor<1>,
    grads: &BurnTensor<1>,
    range: Range<usize>,
    change: impl FnOnce(&mut [f32], &[f32]),
) {
    let host = |t: &BurnTensor<1>| to_f32(Tensor::Burn(t.clone().slice([range.clone()])));
    let (mut p, g) = (host(values), host(grads));
    change(&mut p, &g);
    let new: Tensor<1> = from_f32(p, [range.len()], &Device::Burn(values.device()), values.dtype());
    put(values, range, new.into_burn());
}

fn put(whole: &mut BurnTensor<1>, range: Range<usize>, new: BurnTensor<1>) {
    whole.inplace(|t| t.slice_assign([range], new));
}
