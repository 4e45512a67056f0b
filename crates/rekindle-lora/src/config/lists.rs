//! Lists that may be spelt as one value, as PEFT reads them.

use serde::de::Error;
use serde::{Deserialize, Deserializer};

#[derive(Deserialize)]
#[serde(untagged)]
enum Raw<T> {
    One(T),
    Many(Vec<T>),
}

impl<T> Raw<T> {
    fn into_list(self) -> Vec<T> {
        match self {
            Self::One(value) => vec![value],
            Self::Many(values) => values,
        }
    }
}

/// Reads `3` and `[3]` as the same list.
pub(super) fn numbers<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<usize>>, D::Error> {
    let raw = Option::<Raw<usize>>::deserialize(deserializer);
    raw.map(|raw| raw.map(Raw::into_list))
        .map_err(|_| D::Error::custom("layers_to_transform must be a block number or a list of them"))
}

/// Reads `"h"` and `["h"]` as the same list.
pub(super) fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Vec<String>>, D::Error> {
    Ok(Option::<Raw<String>>::deserialize(deserializer)?.map(Raw::into_list))
}

/// Reads the same as [`names`]; absence is an empty list.
pub(super) fn names_or_none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    Ok(names(deserializer)?.unwrap_or_default())
}
