use core::fmt;

/// A tensor of an adapter file, by the full name of its module.
///
/// ```
/// use rekindle_lora::peft::TensorKey;
///
/// let key = TensorKey::A("model.layers.0.self_attn.q_proj").to_string();
/// assert_eq!(key, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
/// assert_eq!(TensorKey::parse(&key), Some(TensorKey::A("model.layers.0.self_attn.q_proj")));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum TensorKey<'a> {
    /// `lora_A`, `[r, in]`.
    A(&'a str),
    /// `lora_B`, `[out, r]`.
    B(&'a str),
    /// DoRA's magnitude of each row, `[out]`.
    Magnitude(&'a str),
    /// The bias of an adapted linear.
    AdaptedBias(&'a str),
    /// The bias of a linear without an adapter.
    Bias(&'a str),
    /// The weight of a module that is trained in full.
    Saved(&'a str),
}

const PREFIX: &str = "base_model.model.";

impl<'a> TensorKey<'a> {
    /// Returns the key of a bias.
    pub fn bias(module: &'a str, adapted: bool) -> Self {
        if adapted { Self::AdaptedBias(module) } else { Self::Bias(module) }
    }

    /// Parses `key`; returns `None` for a key of another kind.
    pub fn parse(key: &'a str) -> Option<Self> {
        let inner = key.strip_prefix(PREFIX)?;
        // The longer endings first: each ends like the shorter ones.
        let kinds: [fn(&'a str) -> Self; 6] = [
            TensorKey::A,
            TensorKey::B,
            TensorKey::Magnitude,
            TensorKey::AdaptedBias,
            TensorKey::Bias,
            TensorKey::Saved,
        ];
        kinds.into_iter().find_map(|kind| {
            let module = inner.strip_suffix(kind("").suffix())?;
            (!module.is_empty() && !module.starts_with('.')).then(|| kind(module))
        })
    }

    /// Returns the keys that PEFT adds for a module of `modules_to_save` when it saves the tables too: a copy of the weight,
    /// and the base's weight.
    pub(crate) fn repeated(module: &str) -> [String; 2] {
        ["modules_to_save", "original_module"].map(|copy| format!("{PREFIX}{module}.{copy}.weight"))
    }

    /// Returns the suffix after the module's name.
    pub(crate) fn suffix(&self) -> &'static str {
        match self {
            Self::A(_) => ".lora_A.weight",
            Self::B(_) => ".lora_B.weight",
            Self::Magnitude(_) => ".lora_magnitude_vector",
            Self::AdaptedBias(_) => ".base_layer.bias",
            Self::Bias(_) => ".bias",
            Self::Saved(_) => ".weight",
        }
    }

    fn module(&self) -> &'a str {
        match self {
            Self::A(module)
            | Self::B(module)
            | Self::Magnitude(module)
            | Self::AdaptedBias(module)
            | Self::Bias(module)
            | Self::Saved(module) => module,
        }
    }
}

impl fmt::Display for TensorKey<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}{}", self.module(), self.suffix())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_parsed_back() {
        let module = "model.layers.0.mlp.up_proj";
        for key in [
            TensorKey::A(module),
            TensorKey::B(module),
            TensorKey::Magnitude(module),
            TensorKey::AdaptedBias(module),
            TensorKey::Bias(module),
        ] {
            assert_eq!(TensorKey::parse(&key.to_string()), Some(key));
        }
        assert_eq!(TensorKey::parse("base_model.model.lm_head.weight"), Some(TensorKey::Saved("lm_head")));
        assert_eq!(TensorKey::parse("base_model.model..lora_A.weight"), None);
        assert_eq!(TensorKey::parse("model.layers.0.mlp.up_proj.lora_A.weight"), None);
    }
}
