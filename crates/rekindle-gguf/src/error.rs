use std::io;
use std::path::{Path, PathBuf};

use crate::GgmlType;

/// An error in reading, writing or quantizing.
///
/// Each message is complete: it names the file and the cause.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An invalid file: truncated, inconsistent, or of another format.
    #[error("{path:?} is not a valid GGUF file: {reason}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// The problem and its location.
        reason: String,
    },

    /// The output cannot be written, because names, shapes and bytes are inconsistent.
    #[error("cannot write {path:?}: {reason}")]
    Unwritable {
        /// The target.
        path: PathBuf,
        /// The reason.
        reason: String,
    },

    /// Values that a type cannot hold, or a type without a quantizer or decoder.
    #[error("{kind}: {reason}")]
    Codec {
        /// The type.
        kind: GgmlType,
        /// The problem.
        reason: String,
    },

    /// A model or tokenizer that GGUF, or llama.cpp, has no representation for.
    #[error("{0}")]
    Model(String),

    /// An error of the file system.
    #[error(transparent)]
    File(#[from] rekindle_hub::Error),
}

impl Error {
    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn unwritable(path: &Path, reason: impl Into<String>) -> Self {
        Self::Unwritable { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// Lets a closure that writes a tensor use `?` on this crate's errors; the writer unwraps them again.
impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::other(error)
    }
}
