use std::path::Path;

use serde::Deserialize;

use crate::index::{INDEX_FILE, SINGLE_FILE};
use crate::{Error, read_json};

use super::select::ADAPTER_CONFIG;

/// The part of an adapter's configuration that leads to its model.
#[derive(Deserialize)]
struct AdapterConfig {
    base_model_name_or_path: Option<String>,
}

/// The name or path of the model that the adapter in `directory` belongs to; `None` for a directory
/// that holds no adapter, or a model beside one.
///
/// # Errors
/// [`Error::Malformed`] for a broken configuration, [`Error::Missing`] for one that names no model.
pub fn adapter_base(directory: &Path) -> Result<Option<String>, Error> {
    let path = directory.join(ADAPTER_CONFIG);
    let has_model = [SINGLE_FILE, INDEX_FILE].iter().any(|file| directory.join(file).exists());
    if has_model || !path.exists() {
        return Ok(None);
    }
    let config: AdapterConfig = read_json(&path)?;
    match config.base_model_name_or_path.filter(|base| !base.is_empty()) {
        Some(base) => Ok(Some(base)),
        None => Err(Error::missing(&path, "base_model_name_or_path; give the base model, and the adapter beside it")),
    }
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
        assert_eq!(adapter_base(scratch.path()).unwrap().as_deref(), Some("Qwen/Qwen3-0.6B"));

        for nameless in [r#"{"base_model_name_or_path": null}"#, r#"{"base_model_name_or_path": ""}"#, "{}"] {
            write(ADAPTER_CONFIG, nameless);
            let error = adapter_base(scratch.path()).unwrap_err();
            assert!(error.to_string().contains("lacks base_model_name_or_path"), "{error}");
        }
        write(SINGLE_FILE, "");
        assert_eq!(adapter_base(scratch.path()).unwrap(), None);
    }
}
