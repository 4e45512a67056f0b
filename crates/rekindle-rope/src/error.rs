use thiserror::Error as ThisError;

/// Why a configuration gives no rotary embedding.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// `rope_type` names a rule that this crate does not know.
    #[error("rope_type \"{name}\" is not supported; supported: {supported}")]
    UnknownType {
        /// The value of `rope_type` (or `type`).
        name: String,
        /// The supported names, separated by commas.
        supported: String,
    },
    /// Parameters that are missing, ill-typed, out of range, or of no effect for the rope type.
    #[error("{}", .problems.join("; "))]
    Parameters {
        /// One sentence for each parameter.
        problems: Vec<String>,
    },
    /// Both spellings are present and mean different things.
    #[error("config.json has both rope_parameters and rope_scaling and they disagree; remove one of them")]
    Conflict,
}
