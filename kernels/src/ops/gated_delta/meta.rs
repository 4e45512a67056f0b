//! Memory of the gated delta rule over slices.

use super::{DeltaHeads, GradsIn, InputsIn, Sequences, cpu};
use crate::tensor::MetaTensor;

type Inputs<'a> = InputsIn<'a, MetaTensor, MetaTensor>;

pub(super) fn forward(inputs: &Inputs<'_>, heads: DeltaHeads, sequences: &Sequences) -> MetaTensor {
    let &InputsIn { qkv, b, a, .. } = inputs;
    let _views = [qkv, b, a].map(MetaTensor::contiguous);
    let o = qkv.sized([qkv.dims()[0], heads.value_width()]);
    let _states = o.f32_sized([heads.value_heads * heads.key_dim, heads.value_dim]);
    let _scratch = qkv.device().scratch(cpu::forward_scratch(heads, sequences));
    o
}

pub(super) fn backward(
    d_o: &MetaTensor,
    inputs: &Inputs<'_>,
    heads: DeltaHeads,
    sequences: &Sequences,
) -> GradsIn<MetaTensor, MetaTensor> {
    let &InputsIn { qkv, b, a, a_log, dt_bias } = inputs;
    let _views = [qkv, b, a, d_o].map(MetaTensor::contiguous);
    let grads = GradsIn { qkv: qkv.like(), b: b.like(), a: a.like(), a_log: a_log.like(), dt_bias: dt_bias.like() };
    let _scratch = d_o.device().scratch(cpu::backward_scratch(heads, sequences));
    grads
}
