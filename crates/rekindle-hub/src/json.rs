use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::Error;

/// Reads a JSON file such as `config.json` or `adapter_config.json`.
///
/// # Errors
/// [`Error::Missing`] if the file does not exist, [`Error::Malformed`] with line and column if it is not valid JSON or
/// does not match `T`, [`Error::Io`] if it cannot be read.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = fs::read(path).map_err(|source| match (source.kind(), path.file_name()) {
        (ErrorKind::NotFound, Some(name)) => {
            let directory = path.parent().unwrap_or(Path::new(""));
            Error::missing(directory, name.display().to_string())
        }
        _ => Error::io(path)(source),
    })?;
    serde_json::from_slice(&bytes).map_err(|error| Error::malformed(path, error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;

    #[test]
    fn errors_name_file_line_and_column() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        fs::write(&path, "{\n  \"hidden_size\": 64\n  \"heads\": 4\n}\n").unwrap();
        let message = read_json::<Value>(&path).unwrap_err().to_string();
        assert!(message.contains("config.json"), "{message}");
        assert!(message.contains("line 3 column 3"), "{message}");
    }

    #[test]
    fn a_missing_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let error = read_json::<Value>(&directory.path().join("adapter_config.json")).unwrap_err();
        assert!(
            matches!(&error, Error::Missing { path, what }
                if path == directory.path() && what == "adapter_config.json"),
            "{error}"
        );
    }
}
