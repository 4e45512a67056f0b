use std::io;
use std::path::{Path, PathBuf};

use crate::Dtype;

/// An error in reading or writing a checkpoint, or in downloading one from the hub.
///
/// Each message is complete: it names the file and the cause, so callers need not print the chain of sources.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model directory does not exist or is not a directory.
    #[error("no checkpoint at {path:?}: {reason}")]
    NotFound {
        /// The requested path.
        path: PathBuf,
        /// The value found instead, and the one to pass.
        reason: String,
    },

    /// A directory or an index exists, but a required part of it is missing.
    #[error("{path:?} lacks {what}")]
    Missing {
        /// The directory or file that should contain it.
        path: PathBuf,
        /// The missing part, and the remedy.
        what: String,
    },

    /// An invalid file: truncated, inconsistent or not JSON.
    #[error("{path:?} is malformed: {reason}")]
    Malformed {
        /// The invalid file.
        path: PathBuf,
        /// The problem and its location.
        reason: String,
    },

    /// A valid file of an unsupported kind.
    #[error("{path:?} is not supported: {reason}")]
    Unsupported {
        /// The file or directory.
        path: PathBuf,
        /// The unsupported content, and the alternative.
        reason: String,
    },

    /// A tensor that was requested as floats has another dtype.
    #[error("tensor {name:?} has dtype {dtype}; only F64, F32, F16 and BF16 can be read as floats")]
    NotFloat {
        /// The tensor's name.
        name: String,
        /// The stored dtype.
        dtype: Dtype,
    },

    /// The output cannot be written: names, shapes and bytes are inconsistent, or the target must not be replaced.
    #[error("cannot write {path:?}: {reason}")]
    Unwritable {
        /// The target.
        path: PathBuf,
        /// The reason.
        reason: String,
    },

    /// A hub name could not be resolved to files.
    #[error("{name}: {reason}")]
    Hub {
        /// The kind of failure.
        kind: HubErrorKind,
        /// `organization/model`, as given.
        name: String,
        /// The problem, and the remedy.
        reason: String,
    },

    /// A system error: permissions, a full disk, a failing device.
    #[error("{path:?}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// The reason a hub name could not be resolved, or files not be uploaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HubErrorKind {
    /// The name or revision is invalid.
    Name,
    /// The hub has no such repository, revision or file, or hides it from this token.
    NotFound,
    /// The licence has not been accepted, or the token has no access.
    Denied,
    /// The repository has no supported weights: only pickled ones, or none.
    Weights,
    /// The repository has no supported rows, or not the requested split or subset.
    Rows,
    /// The hub cannot be reached, or the connection broke.
    Network,
    /// The network is disabled, and the files are not in the cache.
    Offline,
    /// The hub returned an error, or an invalid response.
    Response,
    /// The downloaded data does not match the announced checksum or size.
    Checksum,
    /// The cache's disk is too small.
    Space,
    /// Another process is using a file of the cache.
    Busy,
    /// The repository is public, and files were to be uploaded to a private one.
    Public,
}

impl Error {
    /// Returns the kind of hub failure, or `None` for other errors.
    pub fn hub_kind(&self) -> Option<HubErrorKind> {
        match self {
            Error::Hub { kind, .. } => Some(*kind),
            _ => None,
        }
    }

    /// Returns a function for `map_err` that adds the path to a system error.
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Error {
        move |source| Error::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> Error {
        Error::Malformed { path: path.to_path_buf(), reason: reason.into() }
    }

    pub(crate) fn missing(path: &Path, what: impl Into<String>) -> Error {
        Error::Missing { path: path.to_path_buf(), what: what.into() }
    }

    pub(crate) fn unwritable(path: &Path, reason: impl Into<String>) -> Error {
        Error::Unwritable { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// Lets a closure that writes a tensor use `?` on this crate's errors; the writers unwrap them again.
impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::other(error)
    }
}

/// Quotes every name and joins them with commas.
pub(crate) fn quoted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().map(|name| format!("{name:?}")).collect();
    names.join(", ")
}
