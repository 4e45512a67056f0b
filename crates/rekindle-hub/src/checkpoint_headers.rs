//! The tensor headers of a checkpoint or adapter, local or on the hub, without the tensor data.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::adapter::{ADAPTER_CONFIG, open_adapter};
use crate::index::{INDEX_FILE, SINGLE_FILE};
#[cfg(feature = "network")]
use crate::safetensors_header::SafetensorsHeader;
use crate::{Checkpoint, Dtype, Error, TensorView};

/// A tensor as described in the header of a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// The stored dtype.
    pub dtype: Dtype,
    /// The dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The size in bytes.
    pub bytes: u64,
}

/// The headers of all weights in a directory, or of a hub name whose weights are not downloaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CheckpointHeaders {
    /// The directory with the configuration; it need not contain the weights.
    pub path: PathBuf,
    /// True for the tensors of an adapter in a directory without a model.
    pub is_adapter: bool,
    /// The tensors by name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl CheckpointHeaders {
    /// Reads the headers of the checkpoint or adapter in `path`; an adapter next to a model is ignored.
    ///
    /// # Errors
    /// The errors of [`Checkpoint::open`] and [`open_adapter`].
    pub fn open(path: &Path) -> Result<CheckpointHeaders, Error> {
        // Some adapters include their base's configuration, but not its weights.
        let has_weights = [SINGLE_FILE, INDEX_FILE].iter().any(|file| path.join(file).exists());
        let is_adapter = path.join(ADAPTER_CONFIG).exists() && !has_weights;
        let mut headers = CheckpointHeaders { path: path.to_path_buf(), is_adapter, tensors: BTreeMap::new() };
        if is_adapter {
            let file = open_adapter(path)?;
            headers.tensors = file.names().filter_map(|name| file.get(name)).map(info).collect();
        } else {
            return Ok(Self::of(&Checkpoint::open(path)?));
        }
        Ok(headers)
    }

    /// Returns the headers of a checkpoint.
    pub fn of(checkpoint: &Checkpoint) -> CheckpointHeaders {
        let tensors = checkpoint.names().filter_map(|name| checkpoint.get(name)).map(info).collect();
        CheckpointHeaders { path: checkpoint.path().to_path_buf(), is_adapter: false, tensors }
    }

    /// Returns the size of all tensors in bytes.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes).sum()
    }

    /// Adds the tensors of the file `name`, which has `size` bytes; `head` contains at least its header.
    #[cfg(feature = "network")]
    pub(crate) fn add(&mut self, name: &str, head: &[u8], size: u64) -> Result<(), Error> {
        let path = self.path.join(name);
        let header = SafetensorsHeader::read(&path, head, usize::try_from(size).unwrap_or(usize::MAX))?;
        for (tensor, entry) in header.tensors {
            let info = TensorInfo { dtype: entry.dtype, shape: entry.shape, bytes: entry.range.len() as u64 };
            if self.tensors.insert(tensor.clone(), info).is_some() {
                return Err(Error::malformed(&path, format!("its tensor {tensor:?} is also in another shard")));
            }
        }
        Ok(())
    }
}

fn info(view: TensorView<'_>) -> (String, TensorInfo) {
    let TensorView { name, dtype, shape, .. } = view;
    (name.to_owned(), TensorInfo { dtype, shape: shape.to_vec(), bytes: view.bytes() as u64 })
}
