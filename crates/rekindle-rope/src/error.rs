use thiserror::Error as ThisError;

/// An invalid or unsupported rotary embedding configuration.
#[derive(Debug, Clone, PartialEq, Eq, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// `rope_type` names an unsupported rule.
    #[error("rope_type \"{name}\" is not supported; supported: {supported}")]
    UnknownType {
        /// The value of `rope_type` (or `type`).
        name: String,
        /// The supported names, comma-separated.
        supported: String,
    },
    /// Parameters that are missing, have the wrong type, are out of range, or have no effect for the rope type.
    #[error("{}", .problems.join("; "))]
    Parameters {
        /// One sentence per parameter.
        problems: Vec<String>,
    },
    /// `rope_parameters` and `rope_scaling` are both present and differ.
    #[error("config.json has both rope_parameters and rope_scaling and they disagree; remove one of them")]
    Conflict,
    /// A method that is not one of [`RopeScaling::NAMES`](crate::RopeScaling::NAMES).
    #[error(
        "rope_scaling \"{name}\" is not a method; use auto, linear, dynamic or yarn, or give its parameters: {{ rope_type = \"{name}\", ... }}"
    )]
    UnknownMethod {
        /// The name.
        name: String,
    },
    /// A length beyond the range of `auto`.
    #[error(
        "max_seq_length is {length}, {:.1} times the window of {window} (max_position_embeddings); rope_scaling = \"auto\" extends it up to 4 times: lower max_seq_length, or {explicit}",
        *.length as f64 / *.window as f64
    )]
    TooFar {
        /// The requested `max_seq_length`.
        length: usize,
        /// The model's window.
        window: usize,
        /// The explicit request for the length.
        explicit: String,
    },
    /// A scaling method was given, but the length is within the window.
    #[error(
        "rope_scaling \"{name}\" has nothing to scale: max_seq_length {length} is within the window of {window} (max_position_embeddings); raise max_seq_length or remove rope_scaling"
    )]
    NothingToScale {
        /// The method.
        name: String,
        /// The requested `max_seq_length`.
        length: usize,
        /// The model's window.
        window: usize,
    },
    /// A named method that differs from the model's native scaling.
    #[error(
        "rope_scaling \"{name}\" would replace the {native} scaling this model was trained with; use \"auto\" to keep and extend it, or {{ rope_type = \"{name}\", factor = ... }} to replace it"
    )]
    Replaces {
        /// The method.
        name: String,
        /// The model's native `rope_type`.
        native: String,
    },
    /// A native linear scaling, whose window is ambiguous.
    #[error(
        "max_seq_length is {length} and max_position_embeddings is {window}, but config.json does not say whether that includes the factor {factor} of its linear scaling; set rope_scaling = {{ rope_type = \"linear\", factor = {grown} }} if it does, or factor = {factor} if the model was trained for {length} tokens"
    )]
    UnknownWindow {
        /// The requested `max_seq_length`.
        length: usize,
        /// `max_position_embeddings`.
        window: usize,
        /// The native factor.
        factor: String,
        /// The factor that reaches the requested length if `max_position_embeddings` includes the native factor.
        grown: String,
    },
    /// A length beyond the window of the run that saved the parameters.
    #[error(
        "max_seq_length is {length}, but the adapter was trained with a window of {window}; lower max_seq_length, or extend the model with rope_scaling and continue training"
    )]
    BeyondSaved {
        /// The requested `max_seq_length`.
        length: usize,
        /// The window of that run.
        window: usize,
    },
}
