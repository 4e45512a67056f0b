//! The command line.

mod chat;
#[cfg(feature = "serve")]
mod dashboard;
mod data;
mod export;
mod generate;
mod hub;
#[cfg(all(test, feature = "network"))]
mod notebook;
mod plan;
#[cfg(feature = "network")]
mod push;
mod quant;
mod rewards;
mod sampling;
#[cfg(feature = "serve")]
mod serve;
mod size;

use std::path::{Path, PathBuf};

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Parser, Subcommand};
use rekindle::run::{ConfigOverride, ModelArguments, nearest, parse_value};
use rekindle::{Combination, DeviceKind, Dtype, Resume, RopeScaling, parse_device};

use crate::failure::Failure;

pub(crate) use chat::{ChatArgs, NamedAdapter};
#[cfg(feature = "serve")]
pub(crate) use dashboard::DashboardArgs;
pub(crate) use data::{DataCommand, PreviewArgs, RunFileArgs, StatsArgs};
pub(crate) use export::{ExportCommand, GgufArgs, MetricsArgs};
pub(crate) use generate::{EvalArgs, GenerateArgs, PromptArgs};
pub(crate) use hub::HubArgs;
#[cfg(feature = "network")]
pub(crate) use hub::{CacheCommand, CacheDir, ListArgs, PruneArgs};
pub(crate) use plan::PlanArgs;
#[cfg(feature = "network")]
pub(crate) use push::PushArgs;
pub(crate) use quant::QuantArgs;
pub(crate) use rewards::{RewardsCommand, RewardsTestArgs, TemplateLanguage};
pub(crate) use sampling::SamplingFilterArgs;
#[cfg(feature = "serve")]
pub(crate) use serve::ServeArgs;

/// Fine-tune language models in Rust.
#[derive(Debug, Parser)]
#[command(name = "rekindle", version, after_help = OVERVIEW)]
pub(crate) struct Args {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Fine-tune the built-in example model and show the difference, in under a minute
    Quickstart(QuickstartArgs),
    /// Write a commented run file for a model, rows and this machine
    Init(InitArgs),
    /// Train a model as a run file describes
    Train(TrainArgs),
    /// Show the rows of a run file as they are trained, without loading weights
    #[command(subcommand)]
    Data(DataCommand),
    /// Try the rewards of a run file on rows, or print a program to start from
    #[command(subcommand)]
    Rewards(RewardsCommand),
    /// Plan the memory of a run without loading it, and find settings that fit
    Plan(PlanArgs),
    /// Compute a model's loss on a file of rows
    Eval(EvalArgs),
    /// Continue a prompt or answer a message
    Generate(Box<GenerateArgs>),
    /// Talk to a model in the terminal
    Chat(Box<ChatArgs>),
    /// Serve a model over HTTP with OpenAI's API and a chat page
    #[cfg(feature = "serve")]
    Serve(Box<ServeArgs>),
    /// Show finished and running runs on a local page
    #[cfg(feature = "serve")]
    Dashboard(DashboardArgs),
    /// Merge an adapter into its base and write the checkpoint
    Merge(MergeArgs),
    /// Write a checkpoint with linears in 4 or 8 bits, in bitsandbytes' format
    Quantize(QuantizeArgs),
    /// Export a model or adapter for other programs
    #[command(subcommand)]
    Export(ExportCommand),
    /// Upload the result of a run to the Hugging Face hub
    #[cfg(feature = "network")]
    Push(PushArgs),
    /// Show the contents of a checkpoint or adapter without loading it
    Inspect(InspectArgs),
    /// List or prune the hub's cache
    #[cfg(feature = "network")]
    #[command(subcommand)]
    Cache(CacheCommand),
    /// Show which device runs use; exit code 1 if a GPU cannot be used, with what is missing
    Doctor,
    /// Print the completions of a shell, for its startup file
    Completions(CompletionsArgs),
}

#[derive(Debug, clap::Args)]
pub(crate) struct CompletionsArgs {
    /// The shell
    pub(crate) shell: clap_complete::Shell,
}

#[derive(Debug, clap::Args)]
pub(crate) struct QuickstartArgs {
    /// Directory for the example and its results; an earlier quickstart there is replaced
    #[arg(long, value_name = "DIR", default_value = "rekindle-quickstart")]
    pub(crate) out: PathBuf,
}

#[derive(Debug, clap::Args)]
#[command(after_help = INIT)]
pub(crate) struct InitArgs {
    /// The model: a directory, or a name on the hub, which is downloaded; an adapter's training is continued
    #[arg(long, value_name = "M")]
    pub(crate) model: PathBuf,
    /// Rows to train on
    #[arg(long, value_name = "D")]
    pub(crate) data: PathBuf,
    /// Rows to evaluate, never used for training
    #[arg(long, value_name = "D")]
    pub(crate) eval: Option<PathBuf>,
    /// The run file; an existing file is not overwritten
    #[arg(long, value_name = "RUN.toml", default_value = "run.toml")]
    pub(crate) out: PathBuf,
    /// The device of the run: auto, cpu, cuda, cuda:N, wgpu or wgpu:N
    #[arg(long, value_name = "D", default_value = "auto", value_parser = parse_device)]
    pub(crate) device: DeviceKind,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = RUN_FILE)]
pub(crate) struct TrainArgs {
    /// The run file
    #[arg(value_name = "RUN.toml")]
    pub(crate) run_file: PathBuf,
    /// Sets a key of the run file; the value is TOML, or else plain text
    #[arg(value_name = "section.key=value")]
    pub(crate) overrides: Vec<ConfigOverride>,
    /// Resume from the last checkpoint in output_dir, or from this one
    #[arg(long, value_name = "latest|DIR", num_args = 0..=1, default_missing_value = "latest", value_parser = resume, conflicts_with_all = ["dry_run", "overwrite"])]
    pub(crate) resume: Option<Resume>,
    /// Replace the checkpoints and the adapter or model of an earlier run in output_dir
    #[arg(long)]
    pub(crate) overwrite: bool,
    /// Train with N processes on this machine, started by this command; each takes a GPU of its own, or they share the CPU
    #[arg(long, value_name = "N", value_parser = at_least_one, conflicts_with_all = ["gpus", "dry_run"])]
    pub(crate) ranks: Option<usize>,
    /// Train on N GPUs of this machine, with a process for each; several need NCCL (see rekindle doctor)
    #[arg(long, value_name = "N|all", value_parser = gpu_count)]
    pub(crate) gpus: Option<GpuCount>,
    /// Load everything, print the resolved configuration and a summary of the run, and write nothing
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Show the run, and the runs beside it, on a page at this address while it trains [default address: 127.0.0.1:8001]
    #[cfg(feature = "serve")]
    #[arg(long, value_name = "HOST:PORT", num_args = 0..=1, value_parser = dashboard::address, conflicts_with = "dry_run")]
    pub(crate) dashboard: Option<Option<std::net::SocketAddr>>,
}

#[derive(Debug, clap::Args)]
#[command(after_help = MERGE)]
pub(crate) struct MergeArgs {
    /// An adapter's directory or name on the hub, or the output_dir of a run that trained one; several are combined
    #[arg(value_name = "RUN_OR_ADAPTER", required = true)]
    pub(crate) adapters: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) combine: CombineArgs,
    /// Directory for the merged checkpoint; it must be new or empty
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// The base model, a directory or a name on the hub [default: the base that the adapter was trained on]
    #[arg(long, value_name = "M")]
    pub(crate) model: Option<PathBuf>,
    /// Dtype of the result; auto keeps that of each tensor of the base
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtype())]
    pub(crate) dtype: Dtype,
    /// Compare the losses of the adapter and the merged model, and fail above a bound
    #[arg(long)]
    pub(crate) verify: bool,
    /// Device for --verify: cpu, cuda, cuda:N, wgpu or wgpu:N [default: cpu]
    #[arg(long, value_name = "D", requires = "verify", value_parser = parse_device)]
    pub(crate) device: Option<DeviceKind>,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
}

#[derive(Debug, clap::Args)]
#[command(after_help = QUANTIZE)]
pub(crate) struct QuantizeArgs {
    /// A checkpoint with 16-bit or 32-bit weights: a directory, or a name on the hub
    #[arg(long, value_name = "M")]
    pub(crate) model: PathBuf,
    /// nf4, fp4, int8 or fp8
    #[arg(long, value_name = "FORMAT")]
    pub(crate) to: String,
    /// Directory for the quantized checkpoint: new, or an earlier result, which is replaced
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Weights per scale, a power of two from 32 to 4096 [default: 64]
    #[arg(long, value_name = "N")]
    pub(crate) blocksize: Option<usize>,
    /// Quantize the scales of 4-bit weights too [default: true]
    #[arg(long, value_name = "BOOL")]
    pub(crate) double_quant: Option<bool>,
    /// Modules to leave unquantized, by commas: linears, or paths such as model.layers.0 [default: lm_head]
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub(crate) skip_modules: Option<Vec<String>>,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
}

#[derive(Debug, clap::Args)]
pub(crate) struct InspectArgs {
    /// A directory with a checkpoint or an adapter, or a name on the hub, whose weights are not downloaded
    #[arg(value_name = "M")]
    pub(crate) path: PathBuf,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// The model to load, and the device.
#[derive(Debug, clap::Args)]
pub(crate) struct ModelArgs {
    /// A checkpoint directory in the Hugging Face layout, or a name on the hub; an adapter is loaded with its base
    #[arg(long, value_name = "M")]
    pub(crate) model: PathBuf,
    /// An adapter in PEFT's format: a directory, or a name on the hub; repeat it to combine several
    #[arg(long, value_name = "A")]
    pub(crate) adapter: Vec<PathBuf>,
    #[command(flatten)]
    pub(crate) combine: CombineArgs,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

/// The form in which a model is loaded, and the device.
#[derive(Debug, clap::Args)]
pub(crate) struct LoadArgs {
    /// Dtype of weights and activations; auto is f32 on the CPU and wgpu, bf16 on CUDA
    #[arg(long, value_name = "DTYPE", default_value = "auto", value_parser = dtype())]
    pub(crate) dtype: Dtype,
    #[command(flatten)]
    pub(crate) quant: QuantArgs,
    /// Maximum tokens of a row, or of prompt and answer together [default: 2048, or the model's window if shorter]
    #[arg(long, value_name = "N")]
    pub(crate) max_seq_length: Option<usize>,
    /// Method beyond the model's window: auto, linear, dynamic, yarn or {rope_type="yarn", factor=4.0} [default: auto or the adapter's]
    #[arg(long, value_name = "METHOD", value_parser = rope_scaling)]
    pub(crate) rope_scaling: Option<RopeScaling>,
    /// The device: auto, cpu, cuda, cuda:N, wgpu or wgpu:N
    #[arg(long, value_name = "D", default_value = "auto", value_parser = parse_device)]
    pub(crate) device: DeviceKind,
    /// Vocabulary size; new rows of embedding and head are the mean of the others
    #[arg(long, value_name = "N")]
    pub(crate) resize_model_vocab: Option<usize>,
    #[command(flatten)]
    pub(crate) hub: HubArgs,
}

/// The combination of several adapters.
#[derive(Debug, clap::Args)]
pub(crate) struct CombineArgs {
    /// Weight of each adapter, separated by commas, in their order [default: 1 each]
    #[arg(long, value_name = "W,W", value_delimiter = ',', allow_negative_numbers = true)]
    pub(crate) adapter_weights: Option<Vec<f64>>,
    /// Combination of adapters: cat (the exact sum), linear (sums of A and of B) or svd:N (the sum in rank N)
    #[arg(long, value_name = "HOW", default_value = "cat", value_parser = combination)]
    pub(crate) combine: Combination,
}

impl CombineArgs {
    /// Returns the adapters with their weights.
    pub(crate) fn weighted<T>(&self, adapters: impl IntoIterator<Item = T>) -> Result<Vec<(T, f64)>, Failure> {
        let adapters: Vec<T> = adapters.into_iter().collect();
        let count = adapters.len();
        let weights = self.adapter_weights.clone().unwrap_or_else(|| vec![1.0; count]);
        if weights.len() != count {
            return Err(Failure::Configuration(format!(
                "--adapter-weights has {} numbers for {count} adapters; pass one for each, or omit it",
                weights.len()
            )));
        }
        Ok(adapters.into_iter().zip(weights).collect())
    }
}

impl LoadArgs {
    /// Returns the arguments of `from_pretrained` for a model.
    pub(crate) fn arguments(&self, model: &Path) -> ModelArguments {
        ModelArguments {
            name_or_path: model.to_owned(),
            max_seq_length: self.max_seq_length,
            rope_scaling: self.rope_scaling.clone(),
            dtype: self.dtype,
            load_in_4bit: self.quant.load_in_4bit,
            load_in_8bit: self.quant.load_in_8bit,
            load_in_fp8: self.quant.load_in_fp8,
            load_in_16bit: self.quant.load_in_16bit,
            fp8: self.quant.fp8.unwrap_or_default(),
            quant_type: self.quant.quant_type.clone(),
            blocksize: self.quant.blocksize,
            double_quant: self.quant.double_quant,
            skip_modules: self.quant.skip_modules.clone(),
            resize_model_vocab: self.resize_model_vocab,
            revision: self.hub.revision.clone(),
            cache_dir: self.hub.cache_dir.clone(),
            local_files_only: self.hub.local_files_only,
            ..ModelArguments::default()
        }
    }
}

/// Parses the value of `--resume`, which may accidentally be the next argument.
/// A number of GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GpuCount {
    /// All that the machine has.
    All,
    Number(usize),
}

fn gpu_count(text: &str) -> Result<GpuCount, String> {
    if text == "all" { Ok(GpuCount::All) } else { at_least_one(text).map(GpuCount::Number) }
}

fn at_least_one(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|number| *number > 0).ok_or_else(|| format!("\"{text}\" is not a whole number above 0"))
}

fn resume(text: &str) -> Result<Resume, String> {
    if text == "latest" {
        return Ok(Resume::Latest);
    }
    if !Path::new(text).is_dir() {
        return Err(format!("\"{text}\" is not a directory; put --resume at the end, or write --resume=latest"));
    }
    Ok(Resume::From(text.into()))
}

/// Parses a name, or the parameters as a TOML table.
fn rope_scaling(text: &str) -> Result<RopeScaling, String> {
    match parse_value(text) {
        toml::Value::String(name) => name.parse().map_err(|error: rekindle::RopeError| {
            let near = nearest(&name, RopeScaling::NAMES).map(|near| format!("; nearest: \"{near}\""));
            format!("{error}{}", near.unwrap_or_default())
        }),
        value => value.try_into().map_err(|error| error.message().to_owned()),
    }
}

fn combination(text: &str) -> Result<Combination, String> {
    text.parse().map_err(|error: rekindle::LoraError| error.to_string())
}

fn dtype() -> impl TypedValueParser<Value = Dtype> {
    PossibleValuesParser::new(["auto", "f32", "bf16", "f16"]).map(|name| match name.as_str() {
        "f32" => Dtype::F32,
        "bf16" => Dtype::Bf16,
        "f16" => Dtype::F16,
        _ => Dtype::Auto,
    })
}

const OVERVIEW: &str = "\
Start here:
  rekindle quickstart
  rekindle init --model Qwen/Qwen3-0.6B --data train.jsonl

Results are printed to stdout, progress to stderr.
Models and adapters are directories, or names on the Hugging Face hub such as Qwen/Qwen3-0.6B; a model can also be a GGUF
file. The environment variables HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE apply.
Exit codes: 0 success, 1 failure, 2 usage or configuration, 3 data, 4 not enough memory, 5 network or hub, 6 non-finite
loss or gradient, 7 another rank failed, 130 interrupted.";

const RUN_FILE: &str = r#"Example of a run file; commented keys are optional and show their defaults or an example:
  # output_dir = "outputs/run"      # default: outputs/ and the name of the run file
  # seed = 3407
  # device = "auto"                 # auto | cpu | cuda[:N] | wgpu[:N]

  [model]                           # or model = "…" at the top, if there are no other keys
  name_or_path = "Qwen/Qwen3-0.6B"  # a directory, or a name on the hub; the training of an adapter is continued
  # revision = "main"               # with token, cache_dir, local_files_only
  # max_seq_length = 2048
  # rope_scaling = "auto"           # beyond the model's window: auto | linear | dynamic | yarn | { rope_type = ... }
  # dtype = "auto"                  # auto | bf16 | f16 | f32
  # load_in_4bit = false            # true: QLoRA; with quant_type, blocksize, double_quant, skip_modules
  # load_in_8bit = false            # or load_in_fp8: half of bf16's memory
  # fp8 = false                     # true: products of frozen fp8 linears in fp8; "forward": not those of gradients
  # full_finetuning = false         # true: train all weights, without [lora]
  # resize_model_vocab = 152000     # rows of the embedding and the head

  [lora]
  r = 16                            # lora_alpha, lora_dropout, use_rslora, target_modules ...
  # init_from = "outputs/first/adapter"   # continue training this adapter, or a name on the hub

  [data]
  train = "train.jsonl"             # or .json, .csv, .parquet, .arrow, a directory, a pattern, a dataset on the hub, a list
  # eval = "heldout.jsonl"          # or eval_fraction = 0.05: hold out rows of train; max_rows, sample_seed
  # split = "train"                 # of a directory or a dataset on the hub; eval_split = "test"
  # columns = { instruction = "question", output = "answer" }   # key = the file's column
  # shuffle = true
  # overlong = "error"              # error | drop | truncate | split
  # train_on = "assistant"          # assistant | last_assistant | all
  # thinking = "keep"               # keep | strip | mask: train reasoning, remove it, or render it untrained
  # untrained = "error"             # error | drop: rows without a token to train
  # not_shown = "error"             # error | drop | allow: rows of which the chat template omits a part
  # chat_template = "tool_use"      # the name of one of several templates

  [train]                           # names as in Hugging Face's TrainingArguments
  # method = "sft"                  # or dpo, ipo, kto, orpo, cpo, simpo, grpo, rloo; grpo and rloo need [[rewards]]
  # per_device_train_batch_size = 8, packing = false, num_train_epochs = 3 or max_steps, learning_rate,
  # lr_scheduler_type, warmup_steps, eval_steps, logging_steps, save_steps (below 1: shares of the run), save_total_limit,
  # load_best_model_at_end, early_stopping_patience ...
  # use_gradient_checkpointing = false    # true: recompute activations | "unsloth": offload them | "auto"
  # eval_samples = 2                # answer prompts of eval, for the report; sample_prompts = ["..."] adds others

Relative paths are relative to the current directory, not to the run file.
A run writes into output_dir: adapter/ (or model/ if all weights are trained), report.html, metrics.jsonl, loss.svg,
tensorboard/ and run.toml, the configuration with all defaults filled in. The adapter, model and checkpoints of an
earlier run are only replaced with --overwrite.
The last line on stdout is the path of the adapter or model.
Ctrl-C ends a run after the current step, with a checkpoint for --resume; pressed twice, it ends the run immediately.

Examples:
  rekindle train run.toml --dry-run
  rekindle train run.toml --resume
  rekindle train run.toml train.learning_rate=1e-4 train.max_steps=200 output_dir=outputs/second"#;

const INIT: &str = "\
Reads the model's configuration, the lengths of the rows and the free memory, and chooses max_seq_length, 16 or 4 bits,
batches and epochs. A comment in the file explains every key.

Examples:
  rekindle init --model Qwen/Qwen3-0.6B --data train.jsonl --eval heldout.jsonl
  rekindle train run.toml --dry-run";

const MERGE: &str = "\
A 4-bit or 8-bit base is decoded, because the adapter was trained on it. To merge onto the 16-bit original, give it with
--model.

Examples:
  rekindle merge outputs/run --out models/tuned --verify
  rekindle merge outputs/run/adapter --model models/Qwen3-0.6B --dtype bf16 --out models/tuned
  rekindle merge outputs/sql outputs/chat --adapter-weights 0.7,0.3 --out models/both";

const QUANTIZE: &str = "\
Rekindle, and transformers with bitsandbytes, load the result.

Examples:
  rekindle quantize --model models/Qwen3-0.6B --to nf4 --out models/Qwen3-0.6B-nf4
  rekindle quantize --model models/Qwen3-0.6B --to int8 --out models/Qwen3-0.6B-int8";

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_consistent() {
        Args::command().debug_assert();
    }
}
