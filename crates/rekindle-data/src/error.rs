use std::io;
use std::path::{Path, PathBuf};

use crate::row::RowNumber;

/// What went wrong while reading a tokenizer, a template or a dataset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the checkpoint is missing, broken or contradicts another.
    #[error("{path}: {message}")]
    Tokenizer {
        /// The file or directory at fault.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// The chat template does not parse, or refused the messages outside a dataset.
    #[error("chat template: {0}")]
    Template(String),
    /// A dataset cannot be opened or read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The dataset.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One row of a dataset.
    #[error("{}: {message}", place(.path, *.row))]
    Row {
        /// The file.
        path: PathBuf,
        /// The line or the row in it.
        row: RowNumber,
        /// What is wrong and what to do.
        message: String,
    },
    /// A dataset as a whole.
    #[error("{path}: {message}")]
    Dataset {
        /// The dataset.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// An option that cannot be met by any dataset.
    #[error("{0}")]
    Options(String),
}

/// Whose fault an [`Error`] is, which is what a program's exit code depends on.
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
    /// Whose fault it is.
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

/// Where a row stands: the line as editors and compilers write it, for a jump there.
pub(crate) fn place(path: &Path, row: RowNumber) -> String {
    match row {
        RowNumber::Line(line) => format!("{}:{line}", path.display()),
        RowNumber::Row(number) => format!("{}, row {number}", path.display()),
    }
}
