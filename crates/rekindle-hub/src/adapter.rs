//! Lookup of an adapter's base model.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::index::{INDEX_FILE, SINGLE_FILE};
use crate::{Error, SafetensorsFile, read_json};

/// The file that identifies a directory as an adapter.
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The file with the adapter's weights.
pub(crate) const ADAPTER_FILE: &str = "adapter_model.safetensors";

/// The keys of an adapter's configuration that name its base model.
#[derive(Deserialize)]
struct AdapterConfig {
    base_model_name_or_path: Option<String>,
    revision: Option<String>,
}

/// The base model of an adapter, as recorded in the adapter's configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdapterBase {
    /// The name on the hub, or the directory on the machine that made the adapter.
    pub name_or_path: String,
    /// The branch, tag or commit, if recorded.
    pub revision: Option<String>,
}

impl AdapterBase {
    /// Reads the base model of the adapter in `directory`.
    ///
    /// # Errors
    /// [`Error::Missing`] if the directory has no adapter or its configuration names no base model,
    /// [`Error::Malformed`] for invalid JSON.
    pub fn read(directory: &Path) -> Result<AdapterBase, Error> {
        let path = directory.join(ADAPTER_CONFIG);
        let config: AdapterConfig = read_json(&path)?;
        let given = |text: &String| !text.is_empty();
        match config.base_model_name_or_path.filter(given) {
            Some(name_or_path) => Ok(AdapterBase { name_or_path, revision: config.revision.filter(given) }),
            None => {
                Err(Error::missing(&path, "base_model_name_or_path; pass the base model and the adapter separately"))
            }
        }
    }
}

impl AdapterBase {
    /// Finds the base of the adapter in `adapter` as a directory or a GGUF file: where `name_or_path` leads from the current directory,
    /// else from the adapter's directory and from those above it, the nearest first. `None` without such a directory.
    ///
    /// A relative path is relative to where the adapter was trained, which usually is above the adapter.
    pub fn directory(&self, adapter: &Path) -> Option<PathBuf> {
        let given = Path::new(&self.name_or_path);
        if given.exists() {
            return Some(given.to_path_buf());
        }
        let adapter = adapter.canonicalize().ok()?;
        // A pinned revision is one of the hub; what lies above the adapter only resembles it.
        let places = adapter.ancestors().filter(|_| given.is_relative() && self.revision.is_none());
        places.map(|place| place.join(given)).find(|found| found.join("config.json").is_file() || found.is_file())
    }
}

/// Opens the tensors of the adapter in `directory`.
///
/// # Errors
/// [`Error::Unsupported`] where they are pickled (`adapter_model.bin`), [`Error::Missing`] where there are none, and those
/// of [`SafetensorsFile::open`].
pub fn open_adapter(directory: &Path) -> Result<SafetensorsFile, Error> {
    let path = directory.join(ADAPTER_FILE);
    if path.exists() {
        return SafetensorsFile::open(&path);
    }
    let pickled = directory.join("adapter_model.bin");
    if pickled.exists() {
        return Err(pickled_weights(pickled, "adapter"));
    }
    Err(Error::missing(directory, format!("{ADAPTER_FILE}, the adapter's tensors; copy or download it again")))
}

/// The error for weights that are pickled; `what` they are.
pub(crate) fn pickled_weights(path: PathBuf, what: &str) -> Error {
    let reason = format!("pickled weights can run code when they are read; convert the {what} to safetensors");
    Error::Unsupported { path, reason }
}

/// Reads the base model like [`AdapterBase::read`]; returns `None` if the directory has no adapter, or also has a
/// model.
///
/// # Errors
/// The errors of [`AdapterBase::read`].
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
    fn a_relative_base_is_found_above_the_adapter() {
        let scratch = tempfile::tempdir().unwrap();
        let adapter = scratch.path().join("out/adapter");
        fs::create_dir_all(&adapter).unwrap();
        let found = |name: &str, revision: Option<&str>| {
            AdapterBase { name_or_path: name.to_owned(), revision: revision.map(str::to_owned) }.directory(&adapter)
        };
        fs::create_dir_all(scratch.path().join("models/base")).unwrap();
        assert_eq!(found("models/base", None), None, "a directory without config.json");
        fs::write(scratch.path().join("models/base/config.json"), "{}").unwrap();
        let base = scratch.path().canonicalize().unwrap().join("models/base");
        assert_eq!(found("models/base", None), Some(base.clone()));
        assert_eq!(found("models/base", Some("main")), None, "it is pinned to a revision of the hub");
        let relative = found("../../models/base", None).unwrap();
        assert_eq!(relative.canonicalize().unwrap(), base);
        assert_eq!(found(base.to_str().unwrap(), None), Some(base.clone()));
        assert_eq!(found("/models/base", None), None);
        // The nearest wins, and what is here wins over all.
        fs::create_dir_all(adapter.join("models/base")).unwrap();
        fs::write(adapter.join("models/base/config.json"), "{}").unwrap();
        assert_eq!(found("models/base", None), Some(adapter.canonicalize().unwrap().join("models/base")));
        assert_eq!(found("src", None), Some(PathBuf::from("src")));
    }

    #[test]
    fn pickled_and_absent_tensors_are_told_apart() {
        let scratch = tempfile::tempdir().unwrap();
        let error = open_adapter(scratch.path()).unwrap_err();
        assert!(error.to_string().contains("lacks adapter_model.safetensors"), "{error}");
        fs::write(scratch.path().join("adapter_model.bin"), "PK").unwrap();
        let error = open_adapter(scratch.path()).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let expected = "adapter_model.bin\" is not supported: pickled weights can run code when they are read; \
                        convert the adapter to safetensors";
        assert!(error.to_string().ends_with(expected), "{error}");
    }

    #[test]
    fn adapters_are_distinguished_from_models() {
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
        assert!(AdapterBase::read(scratch.path()).is_err(), "an adapter without a base model");
    }
}
