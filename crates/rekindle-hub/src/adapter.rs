//! The way from an adapter to the model that it belongs to.

use std::path::Path;

use serde::Deserialize;

use crate::index::{INDEX_FILE, SINGLE_FILE};
use crate::{Error, read_json};

/// The file that makes a directory an adapter.
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The adapter's weights.
pub(crate) const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// The part of an adapter's configuration that leads to its model.
#[derive(Deserialize)]
struct AdapterConfig {
    base_model_name_or_path: Option<String>,
    revision: Option<String>,
}

/// The model that an adapter belongs to, as the adapter's configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterBase {
    /// Its name on the hub, or its directory where the adapter was made.
    pub name_or_path: String,
    /// Its branch, tag or commit, where one is given.
    pub revision: Option<String>,
}

impl AdapterBase {
    /// The model that the adapter in `directory` belongs to.
    ///
    /// # Errors
    /// [`Error::Missing`] for a directory without an adapter or a configuration that names no model,
    /// [`Error::Malformed`] for a broken one.
    pub fn read(directory: &Path) -> Result<AdapterBase, Error> {
        let path = directory.join(ADAPTER_CONFIG);
        let config: AdapterConfig = read_json(&path)?;
        let given = |text: &String| !text.is_empty();
        match config.base_model_name_or_path.filter(given) {
            Some(name_or_path) => Ok(AdapterBase { name_or_path, revision: config.revision.filter(given) }),
            None => {
                Err(Error::missing(&path, "base_model_name_or_path; give the base model, and the adapter beside it"))
            }
        }
    }
}

/// As [`AdapterBase::read`]; `None` for a directory that holds no adapter, or a model beside one.
///
/// # Errors
/// Those of a configuration that is there.
pub fn adapter_base(directory: &Path) -> Result<Option<AdapterBase>, Error> {
    let has_model = [SINGLE_FILE, INDEX_FILE].iter().any(|file| directory.join(file).exists());
    if has_model || !directory.join(ADAPTER_CONFIG).exists() {
        return Ok(None);
    }
    AdapterBase::read(directory).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn tells_adapters_from_models() {
        let scratch = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(scratch.path().join(file), text).unwrap();
        assert_eq!(adapter_base(scratch.path()).unwrap(), None);

        write(ADAPTER_CONFIG, r#"{"r": 8, "base_model_name_or_path": "Qwen/Qwen3-0.6B"}"#);
        write("config.json", "{}");
        let base = AdapterBase { name_or_path: "Qwen/Qwen3-0.6B".to_owned(), revision: None };
        assert_eq!(adapter_base(scratch.path()).unwrap(), Some(base.clone()));
        write(ADAPTER_CONFIG, r#"{"base_model_name_or_path": "Qwen/Qwen3-0.6B", "revision": "v1"}"#);
        let pinned = AdapterBase { revision: Some("v1".to_owned()), ..base };
        assert_eq!(adapter_base(scratch.path()).unwrap(), Some(pinned));

        for nameless in [r#"{"base_model_name_or_path": null}"#, r#"{"base_model_name_or_path": ""}"#, "{}"] {
            write(ADAPTER_CONFIG, nameless);
            let error = adapter_base(scratch.path()).unwrap_err();
            assert!(error.to_string().contains("lacks base_model_name_or_path"), "{error}");
        }
        write(SINGLE_FILE, "");
        assert_eq!(adapter_base(scratch.path()).unwrap(), None);
        assert!(AdapterBase::read(scratch.path()).is_err(), "it is still one without a base");
    }
}
