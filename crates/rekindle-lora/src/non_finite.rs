//! Search for values that are not finite in adapters.

use crate::Adapter;

impl Adapter {
    /// Returns the name of the first tensor with an infinity or NaN, such as `model.layers.0.mlp.up_proj.lora_B`.
    pub fn first_non_finite(&self) -> Option<String> {
        let mut tensors: Vec<(&str, &str, &[f32])> = Vec::new();
        for (module, factors) in &self.factors {
            tensors.extend([(module.as_str(), "lora_A", &*factors.a), (module.as_str(), "lora_B", &*factors.b)]);
            tensors.extend(factors.magnitude.as_ref().map(|v| (module.as_str(), "lora_magnitude_vector", &**v)));
        }
        tensors.extend(self.biases.iter().map(|(module, values)| (module.as_str(), "bias", &**values)));
        tensors.extend(self.saved.iter().map(|(module, (_, values))| (module.as_str(), "weight", &**values)));
        tensors.extend(self.tables.iter().map(|(module, table)| (module.as_str(), "weight", &*table.values)));
        let broken = tensors.into_iter().find(|(.., values)| !values.iter().all(|value| value.is_finite()));
        broken.map(|(module, tensor, _)| format!("{module}.{tensor}"))
    }
}
