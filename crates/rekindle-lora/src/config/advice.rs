use super::{LoraConfig, TargetModules};

/// The linears of attention.
const ATTENTION: [&str; 4] = ["q_proj", "k_proj", "v_proj", "o_proj"];
/// The rank from which a scale of `lora_alpha / r` slows learning down (arXiv:2312.03732).
const HIGH_RANK: usize = 64;

impl LoraConfig {
    /// Returns advice about settings that are valid but unusual, one sentence each.
    pub fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        let is_attention = |name: &String| ATTENTION.contains(&name.rsplit('.').next().unwrap_or(name));
        if let TargetModules::Names(names) = &self.target_modules
            && !names.is_empty()
            && names.iter().all(is_attention)
        {
            advice.push(
                "target_modules covers only attention; an adapter usually learns more with gate_proj, up_proj and \
                 down_proj too (\"all-linear\")"
                    .to_owned(),
            );
        }
        let (r, alpha) = (self.r as f64, self.lora_alpha);
        if !self.use_rslora && !(0.5 * r..=4.0 * r).contains(&alpha) {
            advice.push(format!(
                "lora_alpha is {alpha} at r = {}, a scale of {}; usual are r and 2r: {} or {}",
                self.r,
                self.scale(),
                self.r,
                2 * self.r
            ));
        }
        let highest = self.rank_pattern.0.values().copied().chain([self.r]).max().unwrap_or(self.r);
        if !self.use_rslora && highest >= HIGH_RANK {
            advice.push(format!(
                "r is {highest} without use_rslora: a scale of lora_alpha / r holds high ranks back; use_rslora = true \
                 makes it lora_alpha / √r"
            ));
        }
        advice
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_usual_goes_without_saying() {
        for config in [
            LoraConfig::new(16),
            LoraConfig::new(16).lora_alpha(32.0),
            LoraConfig::new(128).lora_alpha(16.0).use_rslora(true),
            LoraConfig::new(8).lora_alpha(16.0).target_modules(["q_proj", "down_proj"]),
            LoraConfig::new(8).lora_alpha(16.0).target_modules("all-linear"),
        ] {
            assert_eq!(config.advice(), Vec::<String>::new(), "{config:?}");
        }
    }

    #[test]
    fn what_is_seldom_meant_is_said() {
        let config = LoraConfig::new(64).lora_alpha(16.0).target_modules(["self_attn.q_proj", "v_proj"]);
        let advice = config.advice();
        assert_eq!(advice.len(), 3, "{advice:?}");
        assert!(advice[0].starts_with("target_modules covers only attention"));
        assert!(advice[1].starts_with("lora_alpha is 16 at r = 64, a scale of 0.25; usual are r and 2r: 64 or 128"));
        assert!(advice[2].starts_with("r is 64 without use_rslora"));
        assert!(LoraConfig::new(8).lora_alpha(256.0).advice()[0].contains("a scale of 32"));
        assert!(LoraConfig::new(16).rank_pattern([("q_proj", 96)]).advice()[0].starts_with("r is 96"));
    }
}
