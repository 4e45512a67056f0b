//! Factors of experts that a file has for all experts of a layer.

use std::collections::{BTreeMap, BTreeSet};

use super::{AdaptableModules, Adapter, LoraFactors, TensorReader};
use crate::peft::{TensorKey, stacked};
use crate::{Error, ExpertProjection, LoraConfig};

/// The values of A and of B.
type FactorValues = (Vec<f32>, Vec<f32>);

/// The factors of experts that are written as those of all of a layer.
#[derive(Default)]
pub(super) struct StackedFactors {
    /// The modules that their keys name, the shapes of A and B, and their values.
    pub(super) tensors: Vec<(String, [[usize; 2]; 2], FactorValues)>,
    /// The linears whose factors they are.
    pub(super) modules: BTreeSet<String>,
}

impl Adapter {
    /// Joins the factors of `target_parameters`.
    pub(super) fn stacked(&self) -> StackedFactors {
        let mut stacked = StackedFactors::default();
        let wanted = &self.config.lora().target_parameters;
        let is_end = |rest: &str| rest.is_empty() || rest.ends_with('.');
        let is_wanted = |name: &str| wanted.iter().any(|end| name.strip_suffix(end.as_str()).is_some_and(is_end));
        // By layer as the names have it, and gate_up_proj before down_proj, as modules have them.
        let mut parameters: BTreeMap<(String, bool), BTreeMap<usize, &LoraFactors>> = BTreeMap::new();
        for (linear, factors) in &self.factors {
            if let Some((name, expert)) = stacked::parameter_of(linear).filter(|(name, _)| is_wanted(name)) {
                let (module, last) = name.rsplit_once('.').unwrap_or_default();
                let key = (module.to_owned(), last == "down_proj");
                parameters.entry(key).or_default().insert(expert, factors);
                stacked.modules.insert(linear.clone());
            }
        }
        let names: Vec<String> = parameters.keys().map(|(module, is_down)| format!("{module}.{is_down}")).collect();
        for (key, factors) in stacked::key_modules(&names).into_iter().zip(parameters.values()) {
            let factors: Vec<&LoraFactors> = factors.values().copied().collect();
            let LoraFactors { r, a, b, .. } = factors[0];
            let (ranks, input, out) = (factors.len() * r, a.len() / r, b.len() / r);
            stacked.tensors.push((key, [[ranks, input], [out, ranks]], stacked::join(&factors)));
        }
        stacked
    }
}

impl TensorReader<'_> {
    /// Takes the factors of `target_parameters` apart into those of every expert.
    pub(super) fn stacked(
        &mut self,
        config: &LoraConfig,
        modules: &AdaptableModules,
        factors: &mut BTreeMap<String, LoraFactors>,
    ) -> Result<(), Error> {
        let projections: Vec<&ExpertProjection> =
            modules.experts.iter().filter(|projection| projection.is_named(&config.target_parameters)).collect();
        let parameters: Vec<String> = projections.iter().map(|p| p.names.parameter.clone()).collect();
        for (projection, module) in projections.iter().zip(stacked::key_modules(&parameters)) {
            let names = &projection.names;
            let r = config.rank_of(&names.linear(0, names.joined));
            let (key_a, key_b) = (TensorKey::A(&module), TensorKey::B(&module));
            let shape = |key: &TensorKey<'_>| self.file.get(&key.to_string()).map(|tensor| tensor.shape.to_vec());
            let found = [shape(&key_a), shape(&key_b)];
            let (right, swapped) = (stacked::shapes(projection, r), stacked::swapped_shapes(projection, r));
            let is = |shapes: [[usize; 2]; 2]| found == shapes.map(|shape| Some(shape.to_vec()));
            let is_swapped = !is(right) && is(swapped);
            if let ([Some(a), Some(b)], false) = (&found, is(right) || is_swapped) {
                self.problems.push(format!(
                    "tensors \"{key_a}\" and \"{key_b}\" have shapes {a:?} and {b:?}; {} experts with r = {r} have {:?} \
                     and {:?}, or {:?} and {:?} from PEFT before 0.20",
                    projection.experts, right[0], right[1], swapped[0], swapped[1]
                ));
                self.read.extend([key_a.to_string(), key_b.to_string()]);
                continue;
            }
            let [a_shape, b_shape] = if is_swapped { swapped } else { right };
            let (a, b) = (self.take(&key_a, &a_shape)?, self.take(&key_b, &b_shape)?);
            if a.is_empty() || b.is_empty() {
                continue;
            }
            let of_experts = stacked::split(projection, r, &a, &b, is_swapped).into_iter().enumerate();
            factors.extend(of_experts.map(|(expert, factors)| (names.linear(expert, names.joined), factors)));
        }
        Ok(())
    }
}
