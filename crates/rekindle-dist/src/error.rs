use core::fmt;

/// A reason that ranks cannot work together.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A variable of the launcher is missing or invalid.
    #[error("{0}")]
    Variables(String),
    /// The ranks did not find each other.
    #[error("{0}")]
    Rendezvous(String),
    /// A rank failed, and all ranks end.
    #[error(transparent)]
    Rank(#[from] RankFailure),
}

/// The first failure of a run with several ranks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankFailure {
    /// The rank that failed.
    pub rank: usize,
    /// The name of its host.
    pub host: String,
    /// The error, in one sentence.
    pub message: String,
}

impl fmt::Display for RankFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} on {} failed: {}", self.rank, self.host, self.message)
    }
}

impl core::error::Error for RankFailure {}
