//! Why a command ends early, and the exit code that says so.

use std::io;
use std::path::PathBuf;

use rekindle::ErrorKind;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// The command line or the run file.
    #[error("{0}")]
    Configuration(String),
    /// Everything that the library refuses.
    #[error(transparent)]
    Library(#[from] rekindle::Error),
    /// Something that a command looked for and that is not there.
    #[error("{0}")]
    Missing(String),
    /// A file or directory that this program reads or makes itself.
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    /// Standard output cannot be written.
    #[error("cannot write the result to standard output: {0}")]
    Output(#[from] io::Error),
}

impl Failure {
    /// 1 failed, 2 usage or configuration, 3 data, 5 network or hub.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Configuration(_) => 2,
            Self::Library(error) => match error.kind() {
                ErrorKind::Configuration => 2,
                ErrorKind::Data => 3,
                ErrorKind::Hub => 5,
                _ => 1,
            },
            Self::Missing(_) | Self::File { .. } | Self::Output(_) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rekindle::{Error, FastLanguageModel, Tokenizer};

    use super::*;

    #[test]
    fn codes() {
        let missing = FastLanguageModel::from_pretrained("/no/such/model").load_model().unwrap_err();
        assert_eq!(Failure::from(missing).exit_code(), 1);
        let name = FastLanguageModel::from_pretrained("qwen3").load_model().unwrap_err();
        assert_eq!(Failure::from(name).exit_code(), if cfg!(feature = "network") { 5 } else { 1 });
        let tokenizer = Tokenizer::from_dir(Path::new("/no/such/model")).unwrap_err();
        assert_eq!(Failure::from(Error::from(tokenizer)).exit_code(), 1);
        let device = rekindle::parse_device("gpu").unwrap_err();
        assert_eq!(Failure::from(Error::from(device)).exit_code(), 2);
        assert_eq!(Failure::Configuration(String::new()).exit_code(), 2);
        assert_eq!(Failure::from(io::Error::other("full")).exit_code(), 1);
    }
}
