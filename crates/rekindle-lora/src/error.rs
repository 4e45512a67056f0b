use std::path::PathBuf;

use thiserror::Error as ThisError;

/// An error of configuring, attaching or reading an adapter.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// Arguments that are out of range or not supported, one sentence each.
    #[error("{}", .problems.join("; "))]
    Config {
        /// One sentence for each argument.
        problems: Vec<String>,
    },
    /// `target_modules` or `layers_to_transform` do not match the model, one sentence each.
    #[error("{}", .problems.join("; "))]
    Targets {
        /// One sentence for each target or layer.
        problems: Vec<String>,
    },
    /// The adapter's tensors are not those of this model's adapted linears, one sentence each.
    #[error("{}: {}", .path.display(), .problems.join("; "))]
    Tensors {
        /// The adapter's tensor file.
        path: PathBuf,
        /// One sentence for each tensor that is missing, unexpected or misshaped.
        problems: Vec<String>,
    },
    /// A file of the adapter cannot be read or written.
    #[error(transparent)]
    File(#[from] rekindle_hub::Error),
    /// `adapter_config.json` is malformed, or has a setting that changes the result and is not supported.
    #[error("adapter_config.json: {}", .problems.join("; "))]
    AdapterConfig {
        /// One sentence for each field.
        problems: Vec<String>,
    },
}

/// Returns the candidate most similar to `word`, if any is similar enough.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Below 0.7 the suggestions are noise: "embed" would suggest "k_proj".
    let scored = candidates.into_iter().map(|candidate| (strsim::jaro_winkler(word, candidate), candidate));
    scored.filter(|(score, _)| *score >= 0.7).max_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, candidate)| candidate)
}

/// Returns `; nearest: "…"`, or an empty text.
pub(crate) fn nearest_hint<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, candidates).map(|name| format!("; nearest: \"{name}\"")).unwrap_or_default()
}
