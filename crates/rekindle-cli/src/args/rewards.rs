//! `rekindle rewards`.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

use super::RunFileArgs;

#[derive(Debug, Subcommand)]
pub(crate) enum RewardsCommand {
    /// Score rows with the rewards of a run file, and show a table with a line for each reward
    Test(RewardsTestArgs),
    /// Print a program for a reward of type "command"
    Template {
        /// The language
        language: TemplateLanguage,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum TemplateLanguage {
    /// A program around a reward function with TRL's signature
    Python,
}

#[derive(Debug, clap::Args)]
pub(crate) struct RewardsTestArgs {
    #[command(flatten)]
    pub(crate) run: RunFileArgs,
    /// Number of rows to score
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub(crate) rows: usize,
    /// Completions to score instead of the rows' own answers: JSON lines with text or completion, as written by
    /// rekindle generate --data; row is the row's number, or else the line's
    #[arg(long, value_name = "FILE")]
    pub(crate) completions: Option<PathBuf>,
    /// Print one JSON object per completion
    #[arg(long)]
    pub(crate) json: bool,
}
