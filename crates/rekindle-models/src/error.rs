use std::path::PathBuf;

use crate::NonFinite;
use crate::non_finite::explain;

/// An error of reading, building or running a model.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `config.json` describes something that is not supported, one sentence each.
    #[error("{}: {}", .path.display(), .problems.join("; "))]
    Config {
        /// The file.
        path: PathBuf,
        /// One sentence for each value.
        problems: Vec<String>,
    },
    /// The checkpoint's tensors are not those of its configuration, one sentence each.
    #[error("{}: {}", .path.display(), .problems.join("; "))]
    Tensors {
        /// The checkpoint's directory.
        path: PathBuf,
        /// One sentence for each tensor that is missing, unexpected or misshaped.
        problems: Vec<String>,
    },
    /// The checkpoint cannot be read, or the result not be written.
    #[error(transparent)]
    File(#[from] rekindle_hub::Error),
    /// The adapter does not fit or cannot be read.
    #[error(transparent)]
    Lora(#[from] rekindle_lora::Error),
    /// The model cannot be a GGUF file, or the file not be written.
    #[error(transparent)]
    Gguf(#[from] rekindle_gguf::Error),
    /// An operation failed on the device: out of memory, say.
    #[error(transparent)]
    Device(#[from] rekindle_kernels::DeviceError),
    /// A value that is infinite or NaN.
    #[error("{what}{}", explain(.found.as_ref()))]
    NonFinite {
        /// The number and its place, as "the logits of new token 1 are not finite".
        what: String,
        /// The first weight or output that is not finite, if it was found.
        found: Option<NonFinite>,
    },
    /// An argument that is invalid for this model.
    #[error("{0}")]
    Argument(String),
    /// A row that is invalid for this model.
    #[error("{0}")]
    Row(String),
}
