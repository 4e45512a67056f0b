/// An error of the engine or of one request.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The model cannot take the request, or computing it failed.
    #[error(transparent)]
    Model(#[from] rekindle_models::Error),
    /// A value of a request or of the configuration is out of range.
    #[error("{0}")]
    Argument(String),
    /// Too many samples are waiting.
    #[error("{waiting} samples are waiting and max_waiting is {max_waiting}; try again later")]
    QueueFull {
        /// Samples that are waiting.
        waiting: usize,
        /// The limit of the configuration.
        max_waiting: usize,
    },
    /// A constraint failed.
    #[error("the constraint of the request failed: {0}")]
    Constraint(String),
    /// A constraint, stop ids and `min_tokens` together allow no token.
    #[error("no token is allowed as new token {number}; check the constraint, min_tokens and stop_ids")]
    NothingAllowed {
        /// The number of the new token, from 1.
        number: usize,
    },
    /// A step failed, for every sample of it.
    #[error("computing a step failed: {0}")]
    Step(String),
    /// The engine's thread has ended.
    #[error("the engine has stopped")]
    Stopped,
}
