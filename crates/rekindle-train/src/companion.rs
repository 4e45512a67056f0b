//! Files that are saved beside weights.

use std::path::{Path, PathBuf};

use rekindle_hub::{companion_name, write_atomic};

use crate::Error;

/// A file that is saved beside weights, such as a tokenizer file or the generation configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Companion {
    /// A copy of this file, under its own name. A named chat template is copied into the directory of these templates.
    Copy(PathBuf),
    /// A file with this name and content.
    Text {
        /// The name.
        name: String,
        /// The content.
        text: String,
    },
}

impl From<PathBuf> for Companion {
    fn from(path: PathBuf) -> Self {
        Self::Copy(path)
    }
}

impl Companion {
    /// Writes the file into `dir`.
    pub(crate) fn write(&self, dir: &Path) -> Result<(), Error> {
        match self {
            Self::Text { name, text } => Ok(write_atomic(&dir.join(name), text.as_bytes())?),
            Self::Copy(file) => {
                let name = companion_name(file).or_else(|| file.file_name().map(PathBuf::from));
                let Some(copy) = name.map(|name| dir.join(name)) else { return Ok(()) };
                let bytes = std::fs::read(file).map_err(|source| Error::Io { path: file.clone(), source })?;
                if let Some(parent) = copy.parent() {
                    std::fs::create_dir_all(parent).map_err(|source| Error::Io { path: parent.to_owned(), source })?;
                }
                Ok(write_atomic(&copy, &bytes)?)
            }
        }
    }
}
