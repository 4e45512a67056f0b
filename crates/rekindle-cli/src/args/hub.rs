//! Arguments for access to the hub.

use std::path::{Path, PathBuf};

use rekindle::{HubAccess, ModelSource};

const HEADING: &str = "Names on the Hugging Face hub";

/// Access to the hub. The token is read from the environment, because command lines are visible to other users.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct HubArgs {
    /// Branch, tag or commit of the model, or of the adapter to merge [default: main]
    #[arg(long, value_name = "R", help_heading = HEADING)]
    pub(crate) revision: Option<String>,
    /// Directory for downloads [default: HF_HUB_CACHE, or hub in HF_HOME, or ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR", help_heading = HEADING)]
    pub(crate) cache_dir: Option<PathBuf>,
    /// Do not use the network; fail if the cache lacks a file
    #[arg(long, help_heading = HEADING)]
    pub(crate) local_files_only: bool,
}

impl HubArgs {
    /// Returns the model or adapter with this name or path.
    pub(crate) fn source(&self, name_or_path: &Path) -> ModelSource<'static> {
        let source = ModelSource::new(name_or_path).hub(self.access());
        match &self.revision {
            Some(revision) => source.revision(revision),
            None => source,
        }
    }

    /// Returns the access to the hub, with the token of the environment.
    pub(crate) fn access(&self) -> HubAccess {
        HubAccess { token: None, cache_dir: self.cache_dir.clone(), local_files_only: self.local_files_only }
    }
}

/// `rekindle cache`.
#[cfg(feature = "network")]
#[derive(Debug, clap::Subcommand)]
pub(crate) enum CacheCommand {
    /// List models and adapters, with their revisions and sizes
    Ls(ListArgs),
    /// Remove revisions without a branch or tag, interrupted downloads and files without a revision
    Prune(PruneArgs),
}

/// `rekindle cache ls`.
#[cfg(feature = "network")]
#[derive(Debug, clap::Args)]
pub(crate) struct ListArgs {
    #[command(flatten)]
    pub(crate) place: CacheDir,
    /// Print one JSON object per line
    #[arg(long)]
    pub(crate) json: bool,
}

/// `rekindle cache prune`.
#[cfg(feature = "network")]
#[derive(Debug, clap::Args)]
pub(crate) struct PruneArgs {
    /// Remove this model instead, with all its revisions
    #[arg(value_name = "organization/model")]
    pub(crate) model: Option<String>,
    #[command(flatten)]
    pub(crate) place: CacheDir,
}

/// The directory of a cache.
#[cfg(feature = "network")]
#[derive(Debug, clap::Args)]
pub(crate) struct CacheDir {
    /// The cache [default: HF_HUB_CACHE, or hub in HF_HOME, or ~/.cache/huggingface/hub]
    #[arg(long, value_name = "DIR")]
    pub(crate) cache_dir: Option<PathBuf>,
}
