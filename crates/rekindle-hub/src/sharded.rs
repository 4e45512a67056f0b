use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::Path;

use crate::index::{INDEX_FILE, SINGLE_FILE, ShardIndex};
use crate::write::{bytes_of, check_names, write_selected};
use crate::{Error, TensorSpec};

/// The default maximum shard size: 5 GB.
pub const DEFAULT_MAX_SHARD_SIZE: u64 = 5_000_000_000;

/// Writes the weights of a checkpoint into the directory `dir`: as `model.safetensors` if they have at most
/// `max_shard_size` bytes, else as `model-00001-of-0000N.safetensors` … with `model.safetensors.index.json`.
///
/// Shards are filled in the order of `tensors`; a tensor larger than `max_shard_size` gets its own shard. `metadata` is
/// written to every shard. `fill` is called as by [`write_safetensors`](crate::write_safetensors), one shard after the
/// other.
///
/// Each file is written atomically, but the set of files is not; write into an [`AtomicDir`](crate::AtomicDir).
///
/// # Errors
/// The errors of [`write_safetensors`](crate::write_safetensors), and [`Error::Unwritable`] if `dir` already contains
/// weights, since a reader could mix old and new files.
pub fn write_sharded(
    dir: &Path,
    max_shard_size: u64,
    metadata: &BTreeMap<String, String>,
    tensors: &[TensorSpec],
    mut fill: impl FnMut(usize, &mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    refuse_old_weights(dir)?;
    check_names(dir, tensors)?;
    let sizes: Vec<u64> = tensors.iter().map(|tensor| bytes_of(dir, tensor)).collect::<Result<_, _>>()?;
    let shards = split(&sizes, max_shard_size);
    if shards.len() <= 1 {
        let all = (0..tensors.len()).collect();
        return write_selected(&dir.join(SINGLE_FILE), metadata, tensors, all, &mut fill);
    }
    let count = shards.len();
    let mut weight_map = BTreeMap::new();
    for (number, shard) in (1..).zip(shards) {
        let name = format!("model-{number:05}-of-{count:05}.safetensors");
        let names = shard.iter().map(|&index| tensors[index].name.clone());
        weight_map.extend(names.map(|tensor| (tensor, name.clone())));
        write_selected(&dir.join(name), metadata, tensors, shard, &mut fill)?;
    }
    ShardIndex::new(sizes.iter().sum(), weight_map).write(&dir.join(INDEX_FILE))
}

/// Distributes the tensors over shards as transformers does: in order, starting a new shard when the next tensor would
/// exceed the maximum size.
fn split(sizes: &[u64], max_shard_size: u64) -> Vec<Vec<usize>> {
    let mut shards = Vec::new();
    let mut current = Vec::new();
    let mut current_size = 0_u64;
    for (index, &size) in sizes.iter().enumerate() {
        if size > max_shard_size {
            shards.push(vec![index]);
            continue;
        }
        // Neither exceeds `max_shard_size`; the comparison subtracts because the sum might overflow.
        if size > max_shard_size - current_size {
            shards.push(std::mem::take(&mut current));
            current_size = 0;
        }
        current.push(index);
        current_size += size;
    }
    if !current.is_empty() {
        shards.push(current);
    }
    shards
}

fn refuse_old_weights(dir: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(dir).map_err(Error::io(dir))? {
        let name = entry.map_err(Error::io(dir))?.file_name();
        let name = name.to_string_lossy();
        if name == INDEX_FILE || (name.starts_with("model") && name.ends_with(".safetensors")) {
            return Err(Error::unwritable(
                dir,
                format!("the directory already contains weights ({name:?}); write into an empty directory"),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Checkpoint, Dtype, write_f32};

    fn tensors() -> Vec<TensorSpec> {
        let spec = |name: &str, length| TensorSpec::new(name, Dtype::F32, [length]);
        vec![spec("d", 2), spec("c", 2), spec("b", 5), spec("a", 1), spec("e", 3)]
    }

    fn write(dir: &Path, max_shard_size: u64) -> Result<(), Error> {
        let tensors = tensors();
        let metadata = [("format".to_owned(), "pt".to_owned())].into();
        write_sharded(dir, max_shard_size, &metadata, &tensors, |index, out| {
            let values = vec![index as f32; tensors[index].shape[0]];
            write_f32(out, Dtype::F32, &values)
        })
    }

    fn weight_files(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name != "config.json")
            .collect();
        names.sort();
        names
    }

    #[test]
    fn one_shard_has_no_index() {
        let scratch = tempfile::tempdir().unwrap();
        write(scratch.path(), 4 * 13).unwrap();
        assert_eq!(weight_files(scratch.path()), ["model.safetensors"]);
    }

    /// With at most 16 bytes per shard, d and c fill one, b (20 bytes) gets its own before it, then a and e follow.
    #[test]
    fn shards_and_their_index_round_trip() {
        let scratch = tempfile::tempdir().unwrap();
        write(scratch.path(), 16).unwrap();
        assert_eq!(
            weight_files(scratch.path()),
            [
                "model-00001-of-00003.safetensors",
                "model-00002-of-00003.safetensors",
                "model-00003-of-00003.safetensors",
                "model.safetensors.index.json",
            ]
        );
        let index = fs::read_to_string(scratch.path().join(INDEX_FILE)).unwrap();
        let expected = r#"{
  "metadata": {
    "total_size": 52
  },
  "weight_map": {
    "a": "model-00003-of-00003.safetensors",
    "b": "model-00001-of-00003.safetensors",
    "c": "model-00002-of-00003.safetensors",
    "d": "model-00002-of-00003.safetensors",
    "e": "model-00003-of-00003.safetensors"
  }
}
"#;
        assert_eq!(index, expected);

        fs::write(scratch.path().join("config.json"), "{}").unwrap();
        let checkpoint = Checkpoint::open(scratch.path()).unwrap();
        assert_eq!(checkpoint.total_bytes(), 52);
        for (index, tensor) in tensors().iter().enumerate() {
            let values = checkpoint.get(&tensor.name).unwrap().to_f32().unwrap();
            assert_eq!(values, vec![index as f32; tensor.shape[0]]);
        }
    }

    #[test]
    fn tensors_are_split_like_in_transformers() {
        assert_eq!(split(&[6, 6, 2, 6, 2, 2], 10), [vec![0], vec![1, 2], vec![3, 4, 5]]);
        assert_eq!(split(&[3, 11, 7], 10), [vec![1], vec![0, 2]]);
        assert_eq!(split(&[u64::MAX, u64::MAX], u64::MAX), [vec![0], vec![1]]);
        assert_eq!(split(&[0, 1], 0), [vec![1], vec![0]]);
        assert!(split(&[], 10).is_empty());
    }

    #[test]
    fn duplicates_across_shards_and_old_weights_are_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let twice = vec![TensorSpec::new("a", Dtype::U8, [4]); 2];
        let metadata = BTreeMap::new();
        let error = write_sharded(scratch.path(), 4, &metadata, &twice, |_, out| out.write_all(&[0; 4])).unwrap_err();
        assert!(error.to_string().contains("two tensors are named \"a\""), "{error}");
        assert!(weight_files(scratch.path()).is_empty());

        write(scratch.path(), 16).unwrap();
        let error = write(scratch.path(), 1000).unwrap_err();
        assert!(matches!(error, Error::Unwritable { .. }), "{error}");
    }
}
