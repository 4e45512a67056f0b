use std::io;
use std::path::{Path, PathBuf};

use crate::row::RowNumber;

/// An error while reading a tokenizer, a template or a dataset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the checkpoint is missing, broken or contradicts another.
    #[error("{path}: {message}")]
    Tokenizer {
        /// The affected file or directory.
        path: PathBuf,
        /// The problem and its remedy.
        message: String,
    },
    /// The chat template does not parse, or refuses messages that are not from a dataset.
    #[error("chat template: {0}")]
    Template(String),
    /// A dataset cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The dataset.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// A row of a dataset is invalid.
    #[error("{}: {message}", place(.path, *.row))]
    Row {
        /// The file.
        path: PathBuf,
        /// The line or row number.
        row: RowNumber,
        /// The problem and its remedy.
        message: String,
    },
    /// A dataset is invalid as a whole.
    #[error("{path}: {message}")]
    Dataset {
        /// The dataset.
        path: PathBuf,
        /// The problem and its remedy.
        message: String,
    },
    /// An option that no dataset can satisfy.
    #[error("{0}")]
    Options(String),
}

/// The cause of an [`Error`], which determines the exit code of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The checkpoint's tokenizer, or a chat template that is missing or broken.
    Tokenizer,
    /// The dataset: a file, a row or a token id; or messages that the chat template cannot render.
    Data,
    /// An option of the caller.
    Options,
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Returns the cause.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Error::Tokenizer { .. } => ErrorKind::Tokenizer,
            Error::Template(_) | Error::Read { .. } | Error::Row { .. } | Error::Dataset { .. } => ErrorKind::Data,
            Error::Options(_) => ErrorKind::Options,
        }
    }

    pub(crate) fn tokenizer(path: impl AsRef<Path>, message: impl Into<String>) -> Self {
        Error::Tokenizer { path: path.as_ref().to_owned(), message: message.into() }
    }

    pub(crate) fn row(path: &Path, row: RowNumber, message: impl Into<String>) -> Self {
        Error::Row { path: path.to_owned(), row, message: message.into() }
    }

    pub(crate) fn dataset(path: &Path, message: impl Into<String>) -> Self {
        Error::Dataset { path: path.to_owned(), message: message.into() }
    }
}

/// Returns the place of a row: `path:line` as editors and compilers write it.
pub(crate) fn place(path: &Path, row: RowNumber) -> String {
    match row {
        RowNumber::Line(line) => format!("{}:{line}", path.display()),
        RowNumber::Row(number) => format!("{}, row {number}", path.display()),
    }
}
