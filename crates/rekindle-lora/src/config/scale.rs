//! The rank r and the scale s = `lora_alpha / r` of a module's adapter. Linears apply s in `linear/pass.rs`.

use crate::LoraConfig;

impl LoraConfig {
    /// Returns the scale s of (x·Aᵀ)·Bᵀ: `lora_alpha / r`, or `lora_alpha / √r` with `use_rslora`.
    pub fn scale(&self) -> f64 {
        self.scaled(self.lora_alpha, self.r)
    }

    /// Returns the rank of the adapter on `module`.
    pub fn rank_of(&self, module: &str) -> usize {
        self.rank_pattern.get(module, self.r)
    }

    /// Returns the scale of the adapter on `module`.
    pub fn scale_of(&self, module: &str) -> f64 {
        self.scaled(self.alpha_pattern.get(module, self.lora_alpha), self.rank_of(module))
    }

    fn scaled(&self, lora_alpha: f64, r: usize) -> f64 {
        let r = r as f64;
        lora_alpha / if self.use_rslora { r.sqrt() } else { r }
    }
}
