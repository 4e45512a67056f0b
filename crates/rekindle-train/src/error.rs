use std::path::PathBuf;

/// Why a run cannot start or go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Arguments that are out of range, one sentence each.
    #[error("{}", .0.join("; "))]
    Config(Vec<String>),
    /// Nothing in the model is trained.
    #[error("nothing to train: add an adapter with get_peft_model, or load with full_finetuning = true")]
    NothingToTrain,
    /// The loss or a gradient is infinite or not a number.
    #[error(
        "step {step}: {what} is {value}; lower learning_rate or max_grad_norm, and check the rows of this step \
             (lines {lines:?})"
    )]
    NonFinite {
        /// The optimizer step.
        step: usize,
        /// `loss` or `grad_norm`.
        what: &'static str,
        /// What it became.
        value: f64,
        /// Lines of the dataset that the step used.
        lines: Vec<usize>,
    },
    /// The model refused a batch.
    #[error(transparent)]
    Model(#[from] rekindle_models::Error),
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
