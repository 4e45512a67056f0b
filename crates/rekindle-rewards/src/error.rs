//! The error of rewards.

/// An error of a reward. Each names the reward.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RewardError {
    /// An option of a reward that cannot work.
    #[error("reward {reward:?}: {problem}")]
    Config {
        /// The reward's name.
        reward: String,
        /// The option, its value and a way out.
        problem: String,
    },
    /// A number of scores that differs from the number of samples.
    #[error(
        "reward {reward:?} returned {got} {} for {expected} {}; return one number or null for each",
        if *got == 1 { "score" } else { "scores" },
        if *expected == 1 { "completion" } else { "completions" }
    )]
    Count {
        /// The reward's name.
        reward: String,
        /// The number of scores.
        got: usize,
        /// The number of samples.
        expected: usize,
    },
    /// A score that is NaN or infinite.
    #[error(
        "reward {reward:?} returned {value} for completion {index}; return a finite number, or null to leave the \
         completion out"
    )]
    NotFinite {
        /// The reward's name.
        reward: String,
        /// The index of the sample in the batch, from 0.
        index: usize,
        /// The score.
        value: f64,
    },
    /// A reward that could not score a sample or a batch.
    #[error("reward {reward:?}: {problem}")]
    Failed {
        /// The reward's name.
        reward: String,
        /// The cause and a way out.
        problem: String,
    },
}

impl RewardError {
    /// Returns [`RewardError::Config`].
    pub fn config(reward: impl Into<String>, problem: impl Into<String>) -> Self {
        RewardError::Config { reward: reward.into(), problem: problem.into() }
    }

    /// Returns [`RewardError::Failed`].
    pub fn failed(reward: impl Into<String>, problem: impl Into<String>) -> Self {
        RewardError::Failed { reward: reward.into(), problem: problem.into() }
    }

    /// Returns the name of the reward that failed.
    pub fn reward(&self) -> &str {
        match self {
            RewardError::Config { reward, .. }
            | RewardError::Count { reward, .. }
            | RewardError::NotFinite { reward, .. }
            | RewardError::Failed { reward, .. } => reward,
        }
    }
}
