//! `rekindle plan`.

use std::path::PathBuf;

use rekindle::run::ConfigOverride;

use super::at_least_one;
use super::size::bytes;

const PLAN: &str = "\
Prints the peak of memory by use, the longest rows and the largest batch that fit and, if the run does not fit, settings
to change, with exit code 4. Of a name on the hub, only the configuration is downloaded. device=cuda with --device-memory
plans for a GPU that need not exist.

Examples:
  rekindle plan run.toml
  rekindle plan run.toml --device-memory 24GiB device=cuda model.load_in_4bit=true --json
  rekindle plan run.toml --gpus 8 --device-memory 80GiB device=cuda";

#[derive(Debug, clap::Args)]
#[command(after_help = PLAN)]
pub(crate) struct PlanArgs {
    /// The run file
    #[arg(value_name = "RUN.toml")]
    pub(crate) run_file: PathBuf,
    /// Sets a key of the run file; the value is TOML, or else plain text
    #[arg(value_name = "section.key=value")]
    pub(crate) overrides: Vec<ConfigOverride>,
    /// Memory of the device, such as 24GiB [default: its free memory]; the device need not exist then
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) device_memory: Option<usize>,
    /// Plan for N of these GPUs: memory of each, bytes that each sends in a step, and what they have to divide to fit
    #[arg(long, value_name = "N", value_parser = at_least_one)]
    pub(crate) gpus: Option<usize>,
    /// Plan for M machines with the GPUs of --gpus each
    #[arg(long, value_name = "M", value_parser = at_least_one, requires = "gpus")]
    pub(crate) nodes: Option<usize>,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
