//! `rekindle data`.

use std::path::PathBuf;

use clap::Subcommand;
use rekindle::run::ConfigOverride;

#[derive(Debug, Subcommand)]
pub(crate) enum DataCommand {
    /// Show rows with what is trained of them: in colour on a terminal, else between ⟦ and ⟧
    Preview(PreviewArgs),
    /// Lengths, token counts, duplicates, and how full rows are with and without packing
    Stats(StatsArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct PreviewArgs {
    #[command(flatten)]
    pub(crate) run: RunFileArgs,
    /// How many rows to show
    #[arg(long, value_name = "N", default_value_t = 3, conflicts_with = "row")]
    pub(crate) rows: usize,
    /// Show this row alone, counted from 1 over all that are trained
    #[arg(long, value_name = "K")]
    pub(crate) row: Option<usize>,
    /// Show the rows that are evaluated: data.eval, or those of data.eval_fraction
    #[arg(long)]
    pub(crate) eval: bool,
    /// Print one JSON object a row: its place, its pieces with text and whether they are trained, ids and labels
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, clap::Args)]
pub(crate) struct StatsArgs {
    #[command(flatten)]
    pub(crate) run: RunFileArgs,
    /// Print one JSON object for the rows to train on, and one for those of eval
    #[arg(long)]
    pub(crate) json: bool,
}

/// A run file, with changes.
#[derive(Debug, clap::Args)]
pub(crate) struct RunFileArgs {
    /// The run file
    #[arg(value_name = "RUN.toml")]
    pub(crate) run_file: PathBuf,
    /// Replaces or adds a key of the run file
    #[arg(value_name = "section.key=value")]
    pub(crate) overrides: Vec<ConfigOverride>,
}
