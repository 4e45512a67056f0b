//! The option for products in fp8.

use core::fmt;
use core::str::FromStr;

use rekindle_models::Fp8Products;
use serde::de::{Error as _, Unexpected};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The products with frozen fp8 weights that are computed in fp8: `false`, `true` or `"forward"` in a run file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fp8 {
    /// None: weights are decoded to the compute dtype.
    #[default]
    Off,
    /// Those of the forward pass.
    Forward,
    /// Those of the forward pass and of the gradient to the input.
    On,
}

impl Fp8 {
    /// Returns true for [`Fp8::Off`].
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
    pub(crate) fn is_off(&self) -> bool {
        *self == Self::Off
    }

    /// Returns the products.
    pub(crate) fn products(self) -> Option<Fp8Products> {
        match self {
            Self::Off => None,
            Self::Forward => Some(Fp8Products::Forward),
            Self::On => Some(Fp8Products::ForwardAndBackward),
        }
    }

    fn named(name: &str) -> Option<Self> {
        match name {
            "false" => Some(Self::Off),
            "forward" => Some(Self::Forward),
            "true" => Some(Self::On),
            _ => None,
        }
    }
}

impl fmt::Display for Fp8 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "false",
            Self::Forward => "forward",
            Self::On => "true",
        })
    }
}

impl FromStr for Fp8 {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::named(name).ok_or_else(|| format!("\"{name}\" is not true, false or forward"))
    }
}

impl Serialize for Fp8 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => serializer.serialize_bool(false),
            Self::Forward => serializer.serialize_str("forward"),
            Self::On => serializer.serialize_bool(true),
        }
    }
}

impl<'de> Deserialize<'de> for Fp8 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Value {
            Switch(bool),
            Name(String),
        }
        match Value::deserialize(deserializer)? {
            Value::Switch(on) => Ok(if on { Self::On } else { Self::Off }),
            Value::Name(name) => Self::named(&name)
                .ok_or_else(|| D::Error::invalid_value(Unexpected::Str(&name), &"true, false or \"forward\"")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_a_run_file() {
        for (text, value) in [("true", Fp8::On), ("false", Fp8::Off), ("\"forward\"", Fp8::Forward)] {
            assert_eq!(serde_json::from_str::<Fp8>(text).expect("a value"), value);
            assert_eq!(serde_json::to_string(&value).expect("a value"), text);
        }
        let error = serde_json::from_str::<Fp8>("\"backward\"").expect_err("no such value").to_string();
        assert!(error.contains("\"backward\"") && error.contains("\"forward\""), "{error}");
    }
}
