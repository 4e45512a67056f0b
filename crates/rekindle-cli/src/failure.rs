//! The failures of a command, and their exit codes.

use std::io;
use std::path::PathBuf;

use rekindle::ErrorKind;

/// The exit code of a rank that ends because another rank failed.
pub(crate) const OTHER_RANK: u8 = 7;

/// The exit code of an interrupted run: 128 and the number of SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// An error in the command line.
    #[error("{0}")]
    Configuration(String),
    /// An error of the library.
    #[error(transparent)]
    Library(#[from] rekindle::Error),
    /// A row that cannot be used.
    #[error("{0}")]
    Row(String),
    /// A missing installation or file.
    #[error("{0}")]
    Missing(String),
    /// A file or directory that this program cannot read or create.
    #[error("{}: {source}", .path.display())]
    File { path: PathBuf, source: io::Error },
    /// Signals cannot be handled.
    #[error("cannot listen for signals: {0}")]
    Signals(io::Error),
    /// The run was interrupted; how to resume it.
    #[error("{0}")]
    Interrupted(String),
    /// Another rank failed; empty if another process prints the cause.
    #[error("{0}")]
    OtherRank(String),
    /// A rank that this process started failed.
    #[error("{text}")]
    StartedRank { text: String, code: u8 },
    /// Standard output cannot be written.
    #[error("cannot write the result to standard output: {0}")]
    Output(#[from] io::Error),
}

impl From<rekindle::dist::Error> for Failure {
    fn from(error: rekindle::dist::Error) -> Self {
        Self::Library(error.into())
    }
}

impl Failure {
    /// Returns the exit code: 1 failure, 2 usage or configuration, 3 data, 4 memory, 5 network or hub, 6 non-finite
    /// value, 7 another rank failed, 130 interrupted.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Self::Configuration(_) => 2,
            Self::Row(_) => 3,
            Self::Library(error) => match error.kind() {
                ErrorKind::Configuration => 2,
                ErrorKind::Data => 3,
                ErrorKind::Memory => 4,
                ErrorKind::Hub => 5,
                ErrorKind::Diverged => 6,
                ErrorKind::OtherRank => OTHER_RANK,
                _ => 1,
            },
            Self::Interrupted(_) => INTERRUPTED,
            Self::OtherRank(_) => OTHER_RANK,
            Self::StartedRank { code, .. } => *code,
            Self::Missing(_) | Self::Signals(_) | Self::File { .. } | Self::Output(_) => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rekindle::dist::RankFailure;
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
        assert_eq!(Failure::Row(String::new()).exit_code(), 3);
        let lost = RankFailure { rank: 1, host: String::new(), message: String::new() };
        assert_eq!(Failure::from(rekindle::dist::Error::Rank(lost)).exit_code(), 7);
        assert_eq!(Failure::Interrupted(String::new()).exit_code(), 130);
        assert_eq!(Failure::from(io::Error::other("full")).exit_code(), 1);
    }
}
