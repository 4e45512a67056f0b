/// An error of this crate, from loading to saving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Arguments that contradict each other or cannot be satisfied.
    #[error("{0}")]
    Argument(String),
    /// A run file or its overrides are invalid.
    #[error("{name}:{}", list(.problems))]
    RunFile {
        /// The file.
        name: String,
        /// Every problem in it, one sentence each.
        problems: Vec<String>,
    },
    /// The device is not available.
    #[error(transparent)]
    Device(#[from] rekindle_kernels::DeviceError),
    /// The dataset, the tokenizer or the chat template is invalid.
    #[error(transparent)]
    Data(#[from] rekindle_data::Error),
    /// A checkpoint or a result cannot be read or written.
    #[error(transparent)]
    File(#[from] rekindle_hub::Error),
    /// The model or its adapter is invalid.
    #[error(transparent)]
    Model(#[from] rekindle_models::Error),
    /// The engine refuses a request or its configuration.
    #[error(transparent)]
    Engine(rekindle_engine::Error),
    /// A GGUF file cannot be read or written.
    #[error(transparent)]
    Gguf(#[from] rekindle_gguf::Error),
    /// The run cannot start or continue.
    #[error(transparent)]
    Train(#[from] rekindle_train::Error),
    /// A reward cannot be set up, or failed to score completions.
    #[error(transparent)]
    Reward(#[from] rekindle_rewards::RewardError),
    /// The run exceeds the available memory.
    #[error("{}", .0.refusal())]
    DoesNotFit(Box<rekindle_train::MemoryFit>),
    /// The base model of an adapter cannot be loaded.
    #[error("the base model of the adapter {}: {source}; to use another base, pass it as the model and the adapter \
         separately", .adapter.display())]
    AdapterBase {
        /// The adapter, as given.
        adapter: std::path::PathBuf,
        /// The error for the base model.
        source: Box<Error>,
    },
    /// Rows that exist neither on disk nor on the hub.
    #[error("{}: no such file or directory; as a dataset on the hub: {source}", .path.display())]
    NoSuchRows {
        /// The path or name, as given.
        path: std::path::PathBuf,
        /// The hub's error.
        source: Box<Error>,
    },
}

impl From<rekindle_dist::Error> for Error {
    fn from(error: rekindle_dist::Error) -> Self {
        Self::Train(error.into())
    }
}

impl From<rekindle_engine::Error> for Error {
    fn from(error: rekindle_engine::Error) -> Self {
        match error {
            rekindle_engine::Error::Model(error) => Self::Model(error),
            other => Self::Engine(other),
        }
    }
}

/// Formats a single problem on the same line, several on a line each.
fn list(problems: &[String]) -> String {
    match problems {
        [only] => format!(" {only}"),
        several => several.iter().map(|problem| format!("\n  {problem}")).collect(),
    }
}

/// The subject of an [`Error`], which determines the exit code of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A model, adapter or file that is missing, broken or cannot be written.
    Failed,
    /// An argument or a configuration.
    Configuration,
    /// A dataset, a row or a token id.
    Data,
    /// A value that is infinite or not a number: a loss or gradient, a weight, or logits to sample from.
    Diverged,
    /// Insufficient memory.
    Memory,
    /// A name that could not be downloaded from the Hugging Face hub.
    Hub,
    /// Another rank of a run with several ranks.
    OtherRank,
}

impl Error {
    /// Returns the subject.
    pub fn kind(&self) -> ErrorKind {
        use rekindle_models::Error as Model;
        use rekindle_train::Error as Train;
        match self {
            Self::Argument(_) | Self::RunFile { .. } | Self::Device(_) => ErrorKind::Configuration,
            Self::Data(error) => match error.kind() {
                rekindle_data::ErrorKind::Data => ErrorKind::Data,
                rekindle_data::ErrorKind::Options => ErrorKind::Configuration,
                _ => ErrorKind::Failed,
            },
            Self::File(error) if error.hub_kind().is_some() => ErrorKind::Hub,
            Self::File(_) | Self::Gguf(_) => ErrorKind::Failed,
            Self::Reward(rekindle_rewards::RewardError::Config { .. }) => ErrorKind::Configuration,
            Self::Reward(_) => ErrorKind::Failed,
            Self::DoesNotFit(_) => ErrorKind::Memory,
            Self::AdapterBase { source, .. } | Self::NoSuchRows { source, .. } => source.kind(),
            Self::Model(error) | Self::Train(Train::Model(error)) => match error {
                Model::Argument(_) => ErrorKind::Configuration,
                Model::Lora(rekindle_lora::Error::Config { .. } | rekindle_lora::Error::Targets { .. }) => {
                    ErrorKind::Configuration
                }
                Model::Row(_) => ErrorKind::Data,
                Model::NonFinite { .. } => ErrorKind::Diverged,
                _ => ErrorKind::Failed,
            },
            Self::Train(
                Train::Config(_)
                | Train::NothingToTrain
                | Train::EarlierRun { .. }
                | Train::FinishedRun { .. }
                | Train::Differs { .. },
            ) => ErrorKind::Configuration,
            Self::Engine(rekindle_engine::Error::Argument(_)) => ErrorKind::Configuration,
            Self::Engine(_) => ErrorKind::Failed,
            Self::Train(Train::Diverged(_)) => ErrorKind::Diverged,
            Self::Train(Train::Ranks(rekindle_dist::Error::Rank(_))) => ErrorKind::OtherRank,
            Self::Train(Train::Ranks(rekindle_dist::Error::Variables(_))) => ErrorKind::Configuration,
            Self::Train(_) => ErrorKind::Failed,
        }
    }
}
