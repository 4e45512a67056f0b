use std::path::PathBuf;

use crate::Diverged;

/// A reason that a run cannot start or continue.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Arguments that are out of range, one sentence each.
    #[error("{}", .0.join("; "))]
    Config(Vec<String>),
    /// Nothing in the model is trained.
    #[error("nothing to train: add an adapter with get_peft_model, or load with full_finetuning = true")]
    NothingToTrain,
    /// A loss or a gradient is infinite or not a number.
    #[error(transparent)]
    Diverged(Box<Diverged>),
    /// The output directory holds checkpoints of an earlier run.
    #[error(
        "{} is a checkpoint of an earlier run in {}; pass --resume to continue that run, --overwrite to remove its \
         checkpoints and start \
         again, or set another output_dir",
        .latest.display(), .output_dir.display()
    )]
    EarlierRun {
        /// The directory.
        output_dir: PathBuf,
        /// The last of its checkpoints.
        latest: PathBuf,
    },
    /// The output directory holds the result of an earlier run, and no checkpoint.
    #[error(
        "{} is the result of an earlier run{}; pass --overwrite to replace it, or set another output_dir",
        .result.display(), if *.resumes { ", and there is no checkpoint to resume from" } else { "" }
    )]
    FinishedRun {
        /// The adapter or model.
        result: PathBuf,
        /// True if the run was to resume.
        resumes: bool,
    },
    /// The run differs from the one that wrote the checkpoint.
    #[error("cannot resume from {}: {}; a resumed run must keep these \
         settings", .path.display(), .differences.join("; "))]
    Differs {
        /// The checkpoint.
        path: PathBuf,
        /// One sentence for each difference.
        differences: Vec<String>,
    },
    /// A checkpoint that a run cannot resume from.
    #[error("{}: {problem}", .path.display())]
    Checkpoint {
        /// The checkpoint or its file.
        path: PathBuf,
        /// The problem.
        problem: String,
    },
    /// The model refused a batch.
    #[error(transparent)]
    Model(#[from] rekindle_models::Error),
    /// The engine refused a prompt.
    #[error(transparent)]
    Engine(rekindle_engine::Error),
    /// The ranks of the run cannot work together, or another rank failed.
    #[error(transparent)]
    Ranks(#[from] rekindle_dist::Error),
    /// A reward failed to score completions.
    #[error(transparent)]
    Reward(#[from] rekindle_rewards::RewardError),
    /// A result cannot be written.
    #[error(transparent)]
    File(#[from] rekindle_hub::Error),
    /// A file of the run cannot be written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

impl From<rekindle_engine::Error> for Error {
    fn from(error: rekindle_engine::Error) -> Self {
        match error {
            rekindle_engine::Error::Model(error) => Self::Model(error),
            other => Self::Engine(other),
        }
    }
}
