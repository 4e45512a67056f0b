use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::adapter::pickled_weights;
use crate::error::quoted;
use crate::index::{INDEX_FILE, SINGLE_FILE, ShardIndex};
use crate::{Error, SafetensorsFile, TensorView, read_json};

/// A model directory in the Hugging Face layout with memory-mapped weights.
///
/// The directory contains `config.json` and either `model.safetensors` or `model.safetensors.index.json` with the
/// shards it names. As in transformers, the single file takes precedence if both exist, and every tensor of a shard
/// belongs to the checkpoint even if the index does not list it. The files must not be modified in place while they are
/// open (see [`SafetensorsFile`]).
///
/// [`with_store`](Self::with_store) makes a checkpoint of tensors in files of another format.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Value,
    files: Arc<Vec<Box<dyn TensorStore>>>,
    /// The location of each tensor.
    tensors: BTreeMap<String, Location>,
}

/// Tensors by name, in a file or several.
pub trait TensorStore: Debug + Send + Sync {
    /// Returns the names of all tensors.
    fn names(&self) -> Vec<&str>;

    /// Returns the tensor named `name`, if it exists.
    fn get(&self, name: &str) -> Option<TensorView<'_>>;

    /// Returns the stored size of all tensors in bytes.
    fn total_bytes(&self) -> u64;
}

impl TensorStore for SafetensorsFile {
    fn names(&self) -> Vec<&str> {
        self.names().collect()
    }

    fn get(&self, name: &str) -> Option<TensorView<'_>> {
        self.get(name)
    }

    fn total_bytes(&self) -> u64 {
        self.total_bytes()
    }
}

#[derive(Clone, Debug)]
struct Location {
    /// The position in `files`.
    file: usize,
    /// The tensor's name there, if it is another.
    stored_as: Option<String>,
    /// The part of that tensor that this one is, if it is not all of it.
    part: Option<Part>,
}

/// Some elements of a stored tensor.
#[derive(Clone, Debug)]
struct Part {
    first: usize,
    shape: Vec<usize>,
    transposed: bool,
}

/// A tensor that is stored as a part of another one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorPart {
    /// Its name.
    pub name: String,
    /// The dimensions, outermost first.
    pub shape: Vec<usize>,
    /// True if the last two dimensions are stored in the other order.
    pub transposed: bool,
}

impl Checkpoint {
    /// Reads the configuration and maps the weights at `path`, validating all headers and the index.
    ///
    /// # Errors
    /// - [`Error::NotFound`]: `path` is not a directory. Use `resolve` for hub names.
    /// - [`Error::Missing`]: no configuration, no weights, a shard named by the index, or tensors that the index places
    ///   in a shard but that are not there. The message lists all of them.
    /// - [`Error::Malformed`]: invalid JSON, with line and column; a truncated or inconsistent file; a tensor in two
    ///   shards.
    /// - [`Error::Unsupported`]: pickled weights (`pytorch_model.bin`), or an unsupported dtype.
    /// - [`Error::Io`]: a system error.
    pub fn open(path: &Path) -> Result<Checkpoint, Error> {
        check_directory(path)?;
        let config = read_config(path)?;
        let single = path.join(SINGLE_FILE);
        let index = path.join(INDEX_FILE);
        let files = if single.exists() {
            vec![SafetensorsFile::open(&single)?]
        } else if index.exists() {
            open_shards(path, &index)?
        } else {
            return Err(no_weights(path));
        };
        let tensors = locate(&files)?;
        let files = files.into_iter().map(|file| Box::new(file) as Box<dyn TensorStore>).collect();
        Ok(Checkpoint { path: path.to_path_buf(), config, files: Arc::new(files), tensors })
    }

    /// Returns a checkpoint of the tensors in `store`; `path` is its directory and `config` the content of `config.json`.
    pub fn with_store(path: &Path, config: Value, store: Box<dyn TensorStore>) -> Checkpoint {
        let here = |name: &str| (name.to_owned(), Location { file: 0, stored_as: None, part: None });
        let tensors = store.names().into_iter().map(here).collect();
        Checkpoint { path: path.to_path_buf(), config, files: Arc::new(vec![store]), tensors }
    }

    /// Returns the directory as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the content of `config.json`, which is always an object.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// Returns the names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns the tensor named `name`, if it exists.
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, location) = self.tensors.get_key_value(name)?;
        let view = self.files[location.file].get(location.stored_as.as_ref().unwrap_or(name))?;
        Some(match &location.part {
            None => TensorView { name, ..view },
            Some(Part { first, shape, transposed }) => {
                debug_assert!(view.is_row_major(), "parts are those of a tensor that is stored as a whole");
                let (block, size) = (view.dtype.block_elements(), view.dtype.size());
                let bytes = first / block * size..(first + shape.iter().product::<usize>()) / block * size;
                TensorView { name, shape, data: &view.data[bytes], transposed: *transposed, ..view }
            }
        })
    }

    /// Returns the same checkpoint, its files mapped once, with every tensor under the name that `name` gives it; `None`
    /// where two tensors would have one name.
    pub fn renamed(&self, name: impl Fn(&str) -> String) -> Option<Checkpoint> {
        let renamed = self.tensors.iter().map(|(old, location)| {
            let stored_as = location.stored_as.clone().unwrap_or_else(|| old.clone());
            (name(old), Location { stored_as: Some(stored_as), ..location.clone() })
        });
        let tensors: BTreeMap<String, Location> = renamed.collect();
        (tensors.len() == self.tensors.len()).then(|| Checkpoint { tensors, ..self.clone() })
    }

    /// Returns the same checkpoint, its files mapped once, with some tensors replaced by their parts: row-major, one part
    /// after another.
    ///
    /// # Panics
    /// If a tensor is not there or the parts are not all of it. Parts of blocks are whole blocks.
    #[must_use]
    pub fn with_parts(&self, parts: BTreeMap<String, Vec<TensorPart>>) -> Checkpoint {
        let mut tensors = self.tensors.clone();
        for (whole, parts) in parts {
            let numel: usize = self.get(&whole).expect("the tensor is there").shape.iter().product();
            let Location { file, stored_as, part } = tensors.remove(&whole).expect("the tensor is there");
            let (stored_as, mut first) = (stored_as.unwrap_or(whole), part.map_or(0, |part| part.first));
            let end = first + numel;
            for TensorPart { name, shape, transposed } in parts {
                let part = Part { first, shape, transposed };
                first += part.shape.iter().product::<usize>();
                tensors.insert(name, Location { file, stored_as: Some(stored_as.clone()), part: Some(part) });
            }
            assert_eq!(first, end, "the parts of \"{stored_as}\" are all of it");
        }
        Checkpoint { tensors, ..self.clone() }
    }

    /// Returns the stored size of all tensors in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.files.iter().map(|file| file.total_bytes()).sum()
    }
}

pub(crate) fn check_directory(path: &Path) -> Result<(), Error> {
    let reason = match fs::metadata(path) {
        Ok(about) if about.is_dir() => return Ok(()),
        Ok(_) => "it is a file; pass the directory that contains config.json and the weights",
        Err(error) if error.kind() == ErrorKind::NotFound && path.starts_with("~") => {
            "there is no such directory; only shells expand \"~\", write the home directory out"
        }
        Err(error) if error.kind() == ErrorKind::NotFound => {
            "there is no such directory; pass one that contains config.json and the weights"
        }
        Err(error) => return Err(Error::io(path)(error)),
    };
    Err(Error::NotFound { path: path.to_path_buf(), reason: reason.to_owned() })
}

/// Reads `config.json` of the model in `directory`, which must be an object.
///
/// # Errors
/// [`Error::Missing`] and [`Error::Malformed`].
pub fn read_config(directory: &Path) -> Result<Value, Error> {
    let path = directory.join("config.json");
    if !path.exists() {
        let way_out = if directory.join("adapter_config.json").exists() {
            "it contains a PEFT adapter; pass it as the adapter and its base model as the model"
        } else {
            "pass a model directory in the Hugging Face layout"
        };
        return Err(Error::missing(directory, format!("config.json; {way_out}")));
    }
    let config: Value = read_json(&path)?;
    if !config.is_object() {
        return Err(Error::malformed(&path, "it is not a JSON object"));
    }
    Ok(config)
}

fn open_shards(directory: &Path, index_path: &Path) -> Result<Vec<SafetensorsFile>, Error> {
    let index = ShardIndex::read(index_path)?;
    let shards = index.shards();
    let absent = quoted(shards.iter().copied().filter(|shard| !directory.join(shard).exists()));
    if !absent.is_empty() {
        return Err(Error::missing(
            directory,
            format!("shards that {INDEX_FILE} names: {absent}; copy or download them again"),
        ));
    }
    let mut files = BTreeMap::new();
    for shard in shards {
        files.insert(shard, SafetensorsFile::open(&directory.join(shard))?);
    }
    let lost = index.weight_map.iter().filter(|(tensor, shard)| files[shard.as_str()].get(tensor).is_none());
    let lost: Vec<_> = lost.map(|(tensor, shard)| format!("{tensor:?} in {shard:?}")).collect();
    if !lost.is_empty() {
        return Err(Error::missing(directory, format!("tensors that {INDEX_FILE} lists: {}", lost.join(", "))));
    }
    Ok(files.into_values().collect())
}

/// Describes a directory without safetensors, which often has weights of another kind.
fn no_weights(directory: &Path) -> Error {
    for pickled in ["pytorch_model.bin", "pytorch_model.bin.index.json"] {
        if directory.join(pickled).exists() {
            return pickled_weights(directory.join(pickled), "checkpoint");
        }
    }
    Error::missing(directory, format!("weights: there is neither {SINGLE_FILE} nor {INDEX_FILE}"))
}

fn locate(files: &[SafetensorsFile]) -> Result<BTreeMap<String, Location>, Error> {
    let mut tensors: BTreeMap<String, Location> = BTreeMap::new();
    for (position, file) in files.iter().enumerate() {
        for name in file.names() {
            let location = Location { file: position, stored_as: None, part: None };
            if let Some(other) = tensors.insert(name.to_owned(), location) {
                let other = files[other.file].path().file_name().unwrap_or_default();
                return Err(Error::malformed(file.path(), format!("its tensor {name:?} is also in {other:?}")));
            }
        }
    }
    Ok(tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Dtype, TensorSpec, write_safetensors};
    use serde_json::json;
    use tempfile::TempDir;

    fn write_weights(path: &Path, names: &[&str]) {
        let spec = |name: &&str| TensorSpec::new(*name, Dtype::U8, [2]);
        let tensors: Vec<_> = names.iter().map(spec).collect();
        write_safetensors(path, &BTreeMap::new(), &tensors, |index, out| out.write_all(&[index as u8; 2])).unwrap();
    }

    /// Creates a directory with a configuration and these shards, and an index that lists all their tensors.
    fn sharded(shards: &[(&str, &[&str])]) -> TempDir {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("config.json"), "{}").unwrap();
        let mut weight_map = json!({});
        for (shard, names) in shards {
            write_weights(&scratch.path().join(shard), names);
            for name in *names {
                weight_map[name] = json!(shard);
            }
        }
        let index = json!({"metadata": {}, "weight_map": weight_map});
        fs::write(scratch.path().join(INDEX_FILE), index.to_string()).unwrap();
        scratch
    }

    fn two_shards() -> TempDir {
        sharded(&[("1.safetensors", &["c", "a"]), ("2.safetensors", &["b"])])
    }

    #[track_caller]
    fn message(path: &Path, expected: &str) -> Error {
        let error = Checkpoint::open(path).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
        error
    }

    #[test]
    fn shards_open_as_one_checkpoint() {
        let scratch = two_shards();
        let checkpoint = Checkpoint::open(scratch.path()).unwrap();
        assert_eq!(checkpoint.path(), scratch.path());
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(checkpoint.total_bytes(), 6);
        assert_eq!(checkpoint.get("a").unwrap().data, [1, 1]);
        assert_eq!(checkpoint.get("b").unwrap().data, [0, 0]);
        assert!(checkpoint.get("d").is_none());
    }

    #[test]
    fn a_tensor_is_read_in_parts() {
        let scratch = two_shards();
        let checkpoint = Checkpoint::open(scratch.path()).unwrap();
        let part = |name: &str| TensorPart { name: name.to_owned(), shape: vec![1], transposed: false };
        let parts = checkpoint.with_parts(BTreeMap::from([("c".to_owned(), vec![part("c.1"), part("c.0")])]));
        assert_eq!(parts.names().collect::<Vec<_>>(), ["a", "b", "c.0", "c.1"]);
        assert_eq!(parts.get("c.1").unwrap().data.as_ptr(), checkpoint.get("c").unwrap().data.as_ptr());
        assert_eq!((parts.get("c.0").unwrap().shape, parts.get("c.0").unwrap().data), (&[1][..], &[0][..]));
        let renamed = parts.renamed(|name| format!("model.{name}")).unwrap();
        assert_eq!(renamed.get("model.c.0").unwrap().shape, [1]);
    }

    #[test]
    fn tensors_go_by_other_names() {
        let scratch = two_shards();
        let checkpoint = Checkpoint::open(scratch.path()).unwrap();
        let renamed = checkpoint.renamed(|name| format!("model.{name}")).unwrap();
        assert_eq!(renamed.names().collect::<Vec<_>>(), ["model.a", "model.b", "model.c"]);
        let view = renamed.get("model.a").unwrap();
        assert_eq!((view.name, view.data), ("model.a", &[1, 1][..]));
        assert!(renamed.get("a").is_none());
        assert_eq!(renamed.total_bytes(), checkpoint.total_bytes());
        let back = renamed.renamed(|name| name.replace("model.", "")).unwrap();
        assert_eq!(back.get("a").unwrap().data, [1, 1]);
        assert!(checkpoint.renamed(|_| "one".to_owned()).is_none(), "names are unique");
    }

    #[test]
    fn the_single_file_takes_precedence() {
        let scratch = two_shards();
        write_weights(&scratch.path().join(SINGLE_FILE), &["only"]);
        let checkpoint = Checkpoint::open(scratch.path()).unwrap();
        assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["only"]);
    }

    #[test]
    fn a_shard_may_hold_more_than_the_index_lists() {
        let scratch = two_shards();
        write_weights(&scratch.path().join("2.safetensors"), &["b", "extra"]);
        let checkpoint = Checkpoint::open(scratch.path()).unwrap();
        assert_eq!(checkpoint.get("extra").unwrap().data, [1, 1]);
    }

    #[test]
    fn a_missing_directory_is_reported() {
        let error = message(Path::new("/no/such/model"), "\"/no/such/model\": there is no such directory;");
        assert!(matches!(error, Error::NotFound { .. }), "{error}");

        let scratch = two_shards();
        let error = message(&scratch.path().join("1.safetensors"), "it is a file");
        assert!(matches!(error, Error::NotFound { .. }), "{error}");
    }

    #[test]
    fn missing_files_are_named() {
        let scratch = tempfile::tempdir().unwrap();
        let error = message(scratch.path(), "lacks config.json; pass a model directory");
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        fs::write(scratch.path().join("adapter_config.json"), "{}").unwrap();
        message(scratch.path(), "contains a PEFT adapter");

        fs::write(scratch.path().join("config.json"), "{}").unwrap();
        let error = message(scratch.path(), "neither model.safetensors nor");
        assert!(matches!(error, Error::Missing { .. }), "{error}");
        fs::write(scratch.path().join("pytorch_model.bin"), "").unwrap();
        let error = message(scratch.path(), "pytorch_model.bin\" is not supported");
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        message(scratch.path(), "convert the checkpoint to safetensors");
    }

    #[test]
    fn a_malformed_configuration_is_refused() {
        let scratch = two_shards();
        let config = scratch.path().join("config.json");
        fs::write(&config, "{\n\"hidden_size\" 64}").unwrap();
        message(scratch.path(), "line 2 column 15");
        fs::write(&config, "[]").unwrap();
        message(scratch.path(), "not a JSON object");
    }

    #[test]
    fn every_missing_shard_is_named() {
        let scratch = two_shards();
        fs::remove_file(scratch.path().join("1.safetensors")).unwrap();
        fs::remove_file(scratch.path().join("2.safetensors")).unwrap();
        let error = message(scratch.path(), r#""1.safetensors", "2.safetensors""#);
        assert!(matches!(error, Error::Missing { .. }), "{error}");
    }

    #[test]
    fn every_missing_tensor_is_named() {
        let scratch = two_shards();
        write_weights(&scratch.path().join("1.safetensors"), &["x"]);
        let error = message(scratch.path(), r#""a" in "1.safetensors", "c" in "1.safetensors""#);
        assert!(matches!(error, Error::Missing { .. }), "{error}");
    }

    #[test]
    fn a_tensor_in_two_shards_is_refused() {
        let scratch = two_shards();
        write_weights(&scratch.path().join("2.safetensors"), &["a", "b"]);
        let error =
            message(scratch.path(), r#"2.safetensors" is malformed: its tensor "a" is also in "1.safetensors""#);
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }

    #[test]
    fn a_truncated_shard_is_refused() {
        let scratch = two_shards();
        let shard = scratch.path().join("2.safetensors");
        let whole = fs::read(&shard).unwrap();
        fs::write(&shard, &whole[..whole.len() - 1]).unwrap();
        let error = message(scratch.path(), "2.safetensors\" is malformed: truncated");
        assert!(matches!(error, Error::Malformed { .. }), "{error}");
    }
}
