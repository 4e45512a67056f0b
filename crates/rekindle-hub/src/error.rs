use std::io;
use std::path::{Path, PathBuf};

use crate::Dtype;

/// What can be wrong with a checkpoint, with writing one, or with getting one from the hub.
///
/// The message of every variant is complete on its own line: it names the file and the cause, so a
/// caller need not print the chain of sources as well.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model's directory does not exist or is no directory.
    #[error("no checkpoint at {path:?}: {reason}")]
    NotFound {
        /// What was asked for.
        path: PathBuf,
        /// What is there instead, and what to give.
        reason: String,
    },

    /// A directory or an index is there, but something that belongs to it is not.
    #[error("{path:?} lacks {what}")]
    Missing {
        /// The directory or file that should hold it.
        path: PathBuf,
        /// What is missing, and a way out.
        what: String,
    },

    /// A file that breaks its own format: truncated, inconsistent, not JSON.
    #[error("{path:?} is malformed: {reason}")]
    Malformed {
        /// The broken file.
        path: PathBuf,
        /// What is wrong with it and where.
        reason: String,
    },

    /// A valid file of a kind that is not read.
    #[error("{path:?} is not supported: {reason}")]
    Unsupported {
        /// The file or directory.
        path: PathBuf,
        /// What it holds, and a way out.
        reason: String,
    },

    /// A tensor was asked for as floats but holds something else.
    #[error("tensor {name:?} has dtype {dtype}; F64, F32, F16 and BF16 are read as floats")]
    NotFloat {
        /// The tensor's name.
        name: String,
        /// Its stored dtype.
        dtype: Dtype,
    },

    /// The request to write cannot be met: names, shapes and bytes contradict each other, or the
    /// target must not be replaced.
    #[error("cannot write {path:?}: {reason}")]
    Unwritable {
        /// The target.
        path: PathBuf,
        /// What contradicts what.
        reason: String,
    },

    /// A name on the Hugging Face hub could not be turned into files.
    #[error("{name}: {reason}")]
    Hub {
        /// What kind of obstacle it is.
        kind: HubErrorKind,
        /// `organization/model`, as it was given.
        name: String,
        /// What happened, and what to do.
        reason: String,
    },

    /// The operating system refused: permissions, a full disk, a failing device.
    #[error("{path:?}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// What stands between a name on the hub and its files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum HubErrorKind {
    /// The name or the revision is not one that the hub could have.
    Name,
    /// The hub has no such repository, revision or file, or hides it from this token.
    NotFound,
    /// The licence has not been accepted, or the token is not good for it.
    Denied,
    /// The repository holds no weights that are read: pickled ones, or none.
    Weights,
    /// The repository has no rows that are read, or not the split or subset that was asked for.
    Rows,
    /// The hub cannot be reached, or connections to it break.
    Network,
    /// The network may not be used, and the files are not in the cache.
    Offline,
    /// The hub answers with an error of its own, or with something else than its protocol.
    Response,
    /// What arrived is not what the hub announced.
    Checksum,
    /// The disk of the cache is too small.
    Space,
    /// Another program holds a file of the cache.
    Busy,
}

impl Error {
    /// What kept a name on the hub from being turned into files; `None` for every other error.
    pub fn hub_kind(&self) -> Option<HubErrorKind> {
        match self {
            Error::Hub { kind, .. } => Some(*kind),
            _ => None,
        }
    }

    /// For `map_err`: attaches the file to an error of the system.
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

/// Lets a closure that writes a tensor use `?` on this crate's errors; the writers unwrap it again.
impl From<Error> for io::Error {
    fn from(error: Error) -> io::Error {
        io::Error::other(error)
    }
}

/// Every name in quotes, separated by commas.
pub(crate) fn quoted<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let names: Vec<_> = names.into_iter().map(|name| format!("{name:?}")).collect();
    names.join(", ")
}
