//! The weights of a model on the host, a whole one at a time.

use std::sync::Arc;

use rekindle_kernels::quantized::QuantizedData;
use rekindle_kernels::{Weight, to_f32};

use crate::parameters::WeightPart;
use crate::{CausalLm, Role};

/// The last weight that was read: the linears of experts are parts of one, which is copied from its device once.
#[derive(Default)]
pub(crate) struct ReadWeights {
    values: Option<(usize, Vec<f32>)>,
    codes: Option<(usize, Arc<QuantizedData>)>,
}

impl ReadWeights {
    /// The values of a parameter that is not quantized, or of one that is trained.
    pub(crate) fn values(&mut self, model: &CausalLm, role: Role) -> &[f32] {
        let (weight, rows) = part(model, role);
        let key = address(weight);
        if self.values.as_ref().is_none_or(|(last, _)| *last != key) {
            // Not both in memory at a time.
            self.values = None;
            let values = match weight {
                Weight::Trained(at) => model.params.values(*at),
                _ => to_f32(weight.matrix(&model.params)),
            };
            self.values = Some((key, values));
        }
        let cols = weight.dims()[1];
        &self.values.as_ref().expect("just read").1[rows.start * cols..rows.end * cols]
    }

    /// The codes of a quantized parameter.
    pub(crate) fn codes(&mut self, model: &CausalLm, role: Role) -> QuantizedData {
        let WeightPart { weight, part: (index, count) } = whole(model, role);
        let data = || match &*weight.whole() {
            Weight::Quantized(packed) => packed.data(),
            _ => unreachable!("{role:?} is quantized"),
        };
        if count == 1 {
            return Arc::unwrap_or_clone(data());
        }
        let key = address(weight);
        if self.codes.as_ref().is_none_or(|(last, _)| *last != key) {
            self.codes = None;
            self.codes = Some((key, data()));
        }
        self.codes.as_ref().expect("just read").1.part(index, count)
    }
}

fn whole(model: &CausalLm, role: Role) -> WeightPart<'_> {
    model.decoder.weight_part(role).expect("every parameter of the configuration has its weight")
}

fn part(model: &CausalLm, role: Role) -> (&Weight, core::ops::Range<usize>) {
    let part = whole(model, role);
    (part.weight, part.rows())
}

/// Tells the weights of one model apart.
fn address(weight: &Weight) -> usize {
    core::ptr::from_ref(weight).addr()
}
