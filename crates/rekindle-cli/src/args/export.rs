//! The arguments of `rekindle export`.

use std::path::PathBuf;

use clap::Subcommand;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use rekindle::{GgufFileType, MetricsFormat};

use super::HubArgs;
use super::size::bytes;

#[derive(Debug, Subcommand)]
pub(crate) enum ExportCommand {
    /// Write GGUF files for llama.cpp, Ollama and LM Studio
    Gguf(GgufArgs),
    /// Write a run's metrics for spreadsheets, MLflow or Weights & Biases; nothing is sent
    Metrics(MetricsArgs),
}

#[derive(Debug, clap::Args)]
#[command(after_help = METRICS)]
pub(crate) struct MetricsArgs {
    /// The output directory of a run
    #[arg(value_name = "RUN")]
    pub(crate) run: PathBuf,
    /// The format
    #[arg(long, value_name = "FORMAT", value_parser = metrics_format())]
    pub(crate) to: MetricsFormat,
    /// The file, or the directory to which the run is added [default: metrics.csv in RUN, mlruns or wandb]
    #[arg(long, value_name = "PATH")]
    pub(crate) out: Option<PathBuf>,
}

fn metrics_format() -> impl TypedValueParser<Value = MetricsFormat> {
    PossibleValuesParser::new(MetricsFormat::NAMES).try_map(|name| name.parse::<MetricsFormat>())
}

const METRICS: &str = "\
Metrics have the names of transformers' trainer: train/loss, eval/loss. An earlier export of the run is replaced.
MLflow reads the directory with `mlflow ui --backend-store-uri mlruns`. `wandb sync DIR` uploads a run to Weights & Biases
when you start it; Rekindle itself sends nothing.

Examples:
  rekindle export metrics outputs/run --to csv
  rekindle export metrics outputs/run --to mlflow --out mlruns
  rekindle export metrics outputs/run --to wandb-offline";

#[derive(Debug, clap::Args)]
#[command(after_help = GGUF)]
pub(crate) struct GgufArgs {
    /// A checkpoint, an adapter, or the output directory of a run: a directory or a name on the hub; an adapter is merged
    /// into its base
    #[arg(value_name = "MODEL_OR_RUN")]
    pub(crate) model: PathBuf,
    /// Precisions, separated by commas: f32, f16, bf16, q8_0, q6_k, q5_k_m, q5_k_s, q5_0, q5_1, q4_k_m, q4_k_s, q4_0,
    /// q4_1, iq4_nl, q3_k_l, q3_k_m, q3_k_s, q2_k, mxfp4_moe [default: q4_k_m]
    #[arg(long, value_name = "TYPE,TYPE", value_delimiter = ',', value_parser = file_type)]
    pub(crate) quant: Vec<GgufFileType>,
    /// Directory for the files; files of the same name are replaced
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Merge an adapter into its base, which is the default
    #[arg(long, conflicts_with = "adapter_only")]
    pub(crate) merge_adapters: bool,
    /// Write the adapter alone, as a GGUF adapter for llama.cpp's --lora, with --quant f16 (default), f32 or bf16
    #[arg(long, conflicts_with_all = ["imatrix", "split_max_size"])]
    pub(crate) adapter_only: bool,
    /// The base of an adapter: a directory or a name on the hub [default: the base that it was trained on]
    #[arg(long, value_name = "M")]
    pub(crate) base: Option<PathBuf>,
    /// Name of the model, with which file names begin [default: the name of the directory]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<String>,
    /// Importance matrix: a file of llama-imatrix
    #[arg(long, value_name = "FILE")]
    pub(crate) imatrix: Option<PathBuf>,
    /// Split larger models into files of this size, such as 2GB or 1.5GiB
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) split_max_size: Option<usize>,
    /// llama.cpp's name of the pre-tokenizer, for a tokenizer whose own is not recognized
    #[arg(long, value_name = "NAME")]
    pub(crate) pre_tokenizer: Option<String>,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
}

pub(super) fn file_type(text: &str) -> Result<GgufFileType, String> {
    text.parse().map_err(|error: rekindle::GgufError| error.to_string())
}

const GGUF: &str = "\
Weights are quantized as llama.cpp's own tools do it, without a 16-bit file between. A Modelfile for `ollama create` is
written beside the files; with --adapter-only it is named Modelfile-adapter.

Examples:
  rekindle export gguf outputs/run --quant q4_k_m,q8_0 --out models/run-gguf
  rekindle export gguf outputs/run --adapter-only --out models/run-gguf
  rekindle export gguf Qwen/Qwen3-0.6B --quant q6_k --out models/qwen3";
