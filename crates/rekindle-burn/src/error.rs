use thiserror::Error as ThisError;

/// An error of adding, saving or loading adapters, or of quantizing.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// Arguments of the adapter that modules of Burn do not have yet, one sentence each.
    #[error("{}", .problems.join("; "))]
    Unsupported {
        /// One sentence for each argument.
        problems: Vec<String>,
    },
    /// The model has adapters already.
    #[error("linear \"{module}\" already has an adapter; start from the base model, or train the adapter that it has")]
    Wrapped {
        /// The first linear with an adapter.
        module: String,
    },
    /// The model has no adapter to save.
    #[error("no linear of this model has an adapter; add one with wrap or load_adapter")]
    NotWrapped,
    /// The arguments, targets or files of the adapter.
    #[error(transparent)]
    Lora(#[from] rekindle_lora::Error),
    /// A weight cannot be quantized.
    #[error(transparent)]
    Quant(#[from] rekindle_quant::Error),
}
