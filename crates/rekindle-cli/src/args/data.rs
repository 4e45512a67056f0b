//! `rekindle data`.

use std::path::PathBuf;

use clap::Subcommand;
use rekindle::run::ConfigOverride;

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Show rows with their trained tokens: in color on a terminal, else between ⟦ and ⟧
    Preview(PreviewArgs),
    /// Show lengths, token counts, duplicates, and the share of filled rows with and without packing
    Stats(StatsArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct PreviewArgs {
    #[command(flatten)]
    pub(crate) run: RunFileArgs,
    /// Number of rows to show
    #[arg(long, value_name = "N", default_value_t = 3, conflicts_with = "row")]
    pub(crate) rows: usize,
    /// Show only this row, counted from 1 over all trained rows
    #[arg(long, value_name = "K")]
    pub(crate) row: Option<usize>,
    /// Show the rows to evaluate: data.eval, or those of data.eval_fraction
    #[arg(long)]
    pub(crate) eval: bool,
    /// Print one JSON object per row: its place, its pieces with text and trained flags, ids and labels
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    pub(crate) run: RunFileArgs,
    /// Print one JSON object for the rows to train on, and one for those to evaluate
    #[arg(long)]
    pub(crate) json: bool,
}

/// A run file with overrides.
#[derive(Debug, clap::Args)]
pub(crate) struct RunFileArgs {
    /// The run file
    #[arg(value_name = "RUN.toml")]
    pub(crate) run_file: PathBuf,
    /// Sets a key of the run file
    #[arg(value_name = "section.key=value")]
    pub(crate) overrides: Vec<ConfigOverride>,
}
