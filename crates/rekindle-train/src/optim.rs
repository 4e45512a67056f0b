//! The names of optimizers.

use rekindle_kernels::optimizer::{StateFormat, UpdateRule};
use serde::{Deserialize, Serialize};

use crate::SftConfig;

/// An optimizer, with the names of Hugging Face's `optim`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Optim {
    /// AdamW with its state in f32.
    #[default]
    #[serde(alias = "adamw_torch", alias = "adamw_torch_fused", alias = "adamw_hf")]
    Adamw,
    /// AdamW with its state in 8-bit blocks.
    #[serde(rename = "adamw_8bit", alias = "adamw_bnb_8bit")]
    Adamw8bit,
    /// AdamW with its state in 8-bit blocks in host memory.
    #[serde(rename = "paged_adamw_8bit")]
    PagedAdamw8bit,
    /// Lion with its state in f32.
    #[serde(alias = "lion_32bit")]
    Lion,
    /// Lion with its state in 8-bit blocks.
    #[serde(rename = "lion_8bit")]
    Lion8bit,
    /// Lion with its state in 8-bit blocks in host memory.
    #[serde(rename = "paged_lion_8bit")]
    PagedLion8bit,
    /// Stochastic gradient descent, with `momentum`.
    Sgd,
}

impl Optim {
    /// Returns the update rule with the values of `config`.
    pub(crate) fn rule(self, config: &SftConfig) -> UpdateRule {
        let (beta1, beta2) = (config.adam_beta1, config.adam_beta2);
        match self {
            Self::Adamw | Self::Adamw8bit | Self::PagedAdamw8bit => {
                UpdateRule::AdamW { beta1, beta2, eps: config.adam_epsilon }
            }
            Self::Lion | Self::Lion8bit | Self::PagedLion8bit => UpdateRule::Lion { beta1, beta2 },
            Self::Sgd => UpdateRule::Sgd { momentum: config.momentum.unwrap_or(0.0) },
        }
    }

    /// Returns the format of the optimizer's state.
    pub(crate) fn format(self) -> StateFormat {
        match self {
            Self::Adamw | Self::Lion | Self::Sgd => StateFormat::F32,
            Self::Adamw8bit | Self::Lion8bit => StateFormat::Blockwise8,
            Self::PagedAdamw8bit | Self::PagedLion8bit => StateFormat::Host8,
        }
    }

    /// Returns the keys of `config` that are set and have no effect on this optimizer.
    pub(crate) fn ignored(self, config: &SftConfig) -> Vec<String> {
        let rule = self.rule(config);
        let usual = SftConfig::default();
        let adam = matches!(rule, UpdateRule::AdamW { .. });
        let sgd = matches!(rule, UpdateRule::Sgd { .. });
        let betas = config.adam_beta1 != usual.adam_beta1 || config.adam_beta2 != usual.adam_beta2;
        let mut ignored = Vec::new();
        for (name, given, taken) in [
            ("momentum", config.momentum.is_some(), sgd),
            ("adam_beta1 or adam_beta2", betas, !sgd),
            ("adam_epsilon", config.adam_epsilon != usual.adam_epsilon, adam),
        ] {
            if given && !taken {
                let optim = serde_json::to_string(&self).unwrap_or_default();
                ignored.push(format!("{name} has no effect with optim = {optim}; remove it"));
            }
        }
        ignored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_hugging_face() {
        for (name, optim) in [
            ("adamw", Optim::Adamw),
            ("adamw_torch_fused", Optim::Adamw),
            ("adamw_bnb_8bit", Optim::Adamw8bit),
            ("paged_adamw_8bit", Optim::PagedAdamw8bit),
            ("lion_32bit", Optim::Lion),
            ("sgd", Optim::Sgd),
        ] {
            assert_eq!(serde_json::from_value::<Optim>(name.into()).unwrap(), optim);
        }
        assert_eq!(serde_json::to_value(Optim::Adamw8bit).unwrap(), "adamw_8bit");
    }

    #[test]
    fn what_means_nothing_is_named() {
        let config = SftConfig { momentum: Some(0.9), adam_epsilon: 1e-6, adam_beta2: 0.95, ..SftConfig::default() };
        assert_eq!(Optim::Adamw.ignored(&config), ["momentum has no effect with optim = \"adamw\"; remove it"]);
        assert_eq!(Optim::Lion8bit.ignored(&config).len(), 2);
        let problems = Optim::Sgd.ignored(&config).join("; ");
        assert!(problems.contains("adam_beta1 or adam_beta2") && problems.contains("adam_epsilon"), "{problems}");
        assert!(Optim::Lion.ignored(&SftConfig::default()).is_empty());
    }
}
