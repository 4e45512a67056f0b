//! The arguments of `rekindle push`.

use std::path::PathBuf;

use rekindle::GgufFileType;

use super::export::file_type;

#[derive(Debug, clap::Args)]
#[command(after_help = PUSH)]
pub(crate) struct PushArgs {
    /// The output directory of a run, or the directory of an adapter or a checkpoint
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    /// The repository on the hub; it is created if it does not exist
    #[arg(long, value_name = "user/name")]
    pub(crate) to: String,
    /// Create a private repository; a public one is refused
    #[arg(long)]
    pub(crate) private: bool,
    /// Merge the adapter into its base and upload the whole model
    #[arg(long, conflicts_with = "gguf")]
    pub(crate) merge: bool,
    /// Upload GGUF files of these precisions instead, separated by commas: q4_k_m, q8_0 and the others of `export gguf`
    #[arg(long, value_name = "TYPE,TYPE", value_delimiter = ',', value_parser = file_type)]
    pub(crate) gguf: Vec<GgufFileType>,
    /// Name on the hub of a base model that was trained from a directory
    #[arg(long, value_name = "organization/name")]
    pub(crate) base_model: Option<String>,
    /// Message of the commit
    #[arg(long, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    /// Show what would be uploaded, and send nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
}

const PUSH: &str = "\
Uploads the adapter or model with its tokenizer, the model card (README.md) and the plot of the losses in one commit.
A merged model and GGUF files are written to a temporary directory beside the run. An interrupted upload continues when
the command is repeated: large files that the hub has are not sent again.
The token is read from HF_TOKEN, or from the login of `hf auth login`; it needs write permission.

Examples:
  rekindle push outputs/run --to ada/run --dry-run
  rekindle push outputs/run --to ada/run --private
  rekindle push outputs/run --to ada/run-gguf --gguf q4_k_m,q8_0";
