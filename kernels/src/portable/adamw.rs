//! AdamW in Burn ops; the formulas stand in [`crate::adamw`].

use core::ops::Range;

use burn::tensor::Tensor;

use crate::adamw::{Moments, Step};

pub(crate) fn step(params: &mut Tensor<1>, grads: &Tensor<1>, state: Moments<'_>, step: &Step, range: Range<usize>) {
    let (step_size, root_correction) = step.corrections();
    let part = |t: &Tensor<1>| t.clone().slice([range.clone()]);
    let g = part(grads) * step.grad_scale;
    let m = part(state.m) * step.beta1 + g.clone() * (1.0 - step.beta1);
    let v = part(state.v) * step.beta2 + g.clone() * g * (1.0 - step.beta2);
    let update = m.clone() / (v.clone().sqrt() * root_correction + step.eps) * step_size;
    let p = part(params) * (1.0 - step.lr * step.weight_decay) - update;
    for (whole, new) in [(params, p), (state.m, m), (state.v, v)] {
        whole.inplace(|t| t.slice_assign([range.clone()], new));
    }
}
