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
    /// A name that is not among [`RopeScaling::NAMES`](crate::RopeScaling::NAMES).
    #[error(
        "rope_scaling \"{name}\" is not a method; choose auto, linear, dynamic or yarn, or give its parameters: {{ rope_type = \"{name}\", ... }}"
    )]
    UnknownMethod {
        /// The name.
        name: String,
    },
    /// More than `auto` does.
    #[error(
        "max_seq_length is {length}, {:.1} times the window of {window} (max_position_embeddings); rope_scaling = \"auto\" goes up to 4 times: lower max_seq_length, or insist with rope_scaling: {insist}",
        *.length as f64 / *.window as f64
    )]
    TooFar {
        /// What was wanted.
        length: usize,
        /// What the model has.
        window: usize,
        /// How to go on.
        insist: String,
    },
    /// A method for a length within the window.
    #[error(
        "rope_scaling \"{name}\" has nothing to scale: max_seq_length {length} is within the window of {window} (max_position_embeddings); raise max_seq_length or leave rope_scaling out"
    )]
    NothingToScale {
        /// The method.
        name: String,
        /// What was wanted.
        length: usize,
        /// What the model has.
        window: usize,
    },
    /// A method that is not the native one.
    #[error(
        "rope_scaling \"{name}\" would replace the {native} scaling that this model was trained with; \"auto\" keeps and widens it, and {{ rope_type = \"{name}\", factor = ... }} replaces it all the same"
    )]
    Replaces {
        /// The method.
        name: String,
        /// What the model has.
        native: String,
    },
    /// A native linear scaling, of which nobody knows the window.
    #[error(
        "max_seq_length is {length} and max_position_embeddings {window}, and config.json does not say whether that counts the factor {factor} of its linear scaling; give rope_scaling = {{ rope_type = \"linear\", factor = {grown} }} if it does, or factor = {factor} if {length} is within what the model was trained for"
    )]
    UnknownWindow {
        /// What was wanted.
        length: usize,
        /// `max_position_embeddings`.
        window: usize,
        /// The native factor.
        factor: String,
        /// The factor for the wanted length if `max_position_embeddings` counts the native one.
        grown: String,
    },
    /// More than the run went to that the parameters are of.
    #[error(
        "max_seq_length is {length}; the adapter was trained with a window of {window}: lower max_seq_length, or widen the model anew with rope_scaling and train on"
    )]
    BeyondSaved {
        /// What was wanted.
        length: usize,
        /// The window of that run.
        window: usize,
    },
}
