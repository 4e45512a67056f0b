//! What the tensors of a checkpoint or an adapter are, without the tensors.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crate::adapter::{ADAPTER_CONFIG, open_adapter};
#[cfg(feature = "network")]
use crate::header::Header;
use crate::index::{INDEX_FILE, SINGLE_FILE};
use crate::{Checkpoint, Dtype, Error, TensorView};

/// What the header of a safetensors file says of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its stored element type.
    pub dtype: Dtype,
    /// Its extents, outermost first.
    pub shape: Vec<usize>,
    /// How many bytes it takes.
    pub bytes: u64,
}

/// The headers of all weights in a directory, or of a name on the hub whose weights stay there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Headers {
    /// The directory that holds the configuration, weights or not.
    pub path: PathBuf,
    /// Whether these are an adapter's tensors, and no model's beside it.
    pub is_adapter: bool,
    /// By name.
    pub tensors: BTreeMap<String, TensorInfo>,
}

impl Headers {
    /// Reads those of the checkpoint or adapter in `path`; an adapter beside a model is not looked at.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] and [`open_adapter`].
    pub fn open(path: &Path) -> Result<Headers, Error> {
        // Some adapters come with their base's configuration, but without its weights.
        let has_weights = [SINGLE_FILE, INDEX_FILE].iter().any(|file| path.join(file).exists());
        let is_adapter = path.join(ADAPTER_CONFIG).exists() && !has_weights;
        let mut headers = Headers { path: path.to_path_buf(), is_adapter, tensors: BTreeMap::new() };
        if is_adapter {
            let file = open_adapter(path)?;
            headers.tensors = file.names().filter_map(|name| file.get(name)).map(info).collect();
        } else {
            let checkpoint = Checkpoint::open(path)?;
            headers.tensors = checkpoint.names().filter_map(|name| checkpoint.get(name)).map(info).collect();
        }
        Ok(headers)
    }

    /// Bytes of all tensors together.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|tensor| tensor.bytes).sum()
    }

    /// Adds the tensors of the file called `name`, of which `head` holds at least the header and that has `size` bytes.
    #[cfg(feature = "network")]
    pub(crate) fn add(&mut self, name: &str, head: &[u8], size: u64) -> Result<(), Error> {
        let path = self.path.join(name);
        let header = Header::read(&path, head, usize::try_from(size).unwrap_or(usize::MAX))?;
        for (tensor, entry) in header.tensors {
            let info = TensorInfo { dtype: entry.dtype, shape: entry.shape, bytes: entry.range.len() as u64 };
            if self.tensors.insert(tensor.clone(), info).is_some() {
                return Err(Error::malformed(&path, format!("its tensor {tensor:?} is in another shard as well")));
            }
        }
        Ok(())
    }
}

fn info(view: TensorView<'_>) -> (String, TensorInfo) {
    let TensorView { name, dtype, shape, data } = view;
    (name.to_owned(), TensorInfo { dtype, shape: shape.to_vec(), bytes: data.len() as u64 })
}
