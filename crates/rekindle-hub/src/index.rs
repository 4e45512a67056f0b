//! The index of a sharded checkpoint, which maps tensors to files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::{Error, read_json, write_atomic};

/// The weight file of an unsharded checkpoint.
pub(crate) const SINGLE_FILE: &str = "model.safetensors";

/// The index file of a sharded checkpoint.
pub(crate) const INDEX_FILE: &str = "model.safetensors.index.json";

/// The content of `model.safetensors.index.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ShardIndex {
    #[serde(default)]
    metadata: IndexMetadata,
    /// The file name of each tensor's shard.
    pub(crate) weight_map: BTreeMap<String, String>,
}

/// Written because other readers expect it; not used here.
#[derive(Debug, Default, Serialize, Deserialize)]
struct IndexMetadata {
    #[serde(default, skip_deserializing)]
    total_size: u64,
}

impl ShardIndex {
    pub(crate) fn new(total_size: u64, weight_map: BTreeMap<String, String>) -> ShardIndex {
        ShardIndex { metadata: IndexMetadata { total_size }, weight_map }
    }

    /// Reads the index at `path` and checks that its shards are in the same directory.
    pub(crate) fn read(path: &Path) -> Result<ShardIndex, Error> {
        let index: ShardIndex = read_json(path)?;
        if index.weight_map.is_empty() {
            return Err(Error::malformed(path, "its weight_map is empty"));
        }
        // The index is untrusted: it must not make us open files elsewhere.
        for shard in index.shards() {
            let mut components = Path::new(shard).components();
            let first = components.next();
            if !matches!(first, Some(Component::Normal(name)) if name == shard) {
                return Err(Error::malformed(path, format!("shard {shard:?} is not a file name in its directory")));
            }
        }
        Ok(index)
    }

    /// Returns the names of all shards, sorted.
    pub(crate) fn shards(&self) -> BTreeSet<&str> {
        self.weight_map.values().map(String::as_str).collect()
    }

    pub(crate) fn write(&self, path: &Path) -> Result<(), Error> {
        let mut json = serde_json::to_vec_pretty(self).map_err(|error| Error::unwritable(path, error.to_string()))?;
        json.push(b'\n');
        write_atomic(path, &json)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn files_in_other_directories_are_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join(INDEX_FILE);
        for shard in ["../a", "/etc/passwd", "", ".", "a/b", "a/"] {
            let index = serde_json::json!({"weight_map": {"w": shard}});
            fs::write(&path, index.to_string()).unwrap();
            let error = ShardIndex::read(&path).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }), "{shard:?}: {error}");
        }
    }

    #[test]
    fn indices_of_other_writers_are_read() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join(INDEX_FILE);
        let json = r#"{"metadata":{"total_size":8.0,"total_parameters":2},
            "weight_map":{"b":"2.safetensors","a":"1.safetensors"}}"#;
        fs::write(&path, json).unwrap();
        let index = ShardIndex::read(&path).unwrap();
        assert_eq!(index.shards().into_iter().collect::<Vec<_>>(), ["1.safetensors", "2.safetensors"]);
    }

    #[test]
    fn an_empty_index_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join(INDEX_FILE);
        for json in [r#"{"weight_map":{}}"#, "{}", "[]", "{"] {
            fs::write(&path, json).unwrap();
            let error = ShardIndex::read(&path).unwrap_err();
            assert!(matches!(error, Error::Malformed { .. }), "{json}: {error}");
        }
    }
}
