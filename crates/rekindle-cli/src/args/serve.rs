//! The arguments of `rekindle serve`.

use std::path::PathBuf;

use super::size::bytes;
use super::{LoadArgs, NamedAdapter};

#[derive(Debug, clap::Args)]
#[command(after_help = SERVE)]
pub(crate) struct ServeArgs {
    /// A checkpoint directory in the Hugging Face layout, or a name on the hub; an adapter is served beside its base
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// An adapter in PEFT's format and the name that requests use for it; may be repeated
    #[arg(long, value_name = "NAME=DIR")]
    pub(crate) adapter: Vec<NamedAdapter>,
    /// The name that requests use for the base model [default: MODEL as given, or the directory of an adapter's base]
    #[arg(long, value_name = "NAME")]
    pub(crate) served_model_name: Option<String>,
    /// The address to listen at; 0.0.0.0 is reachable from other machines
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// The port; 0 for any free one
    #[arg(long, value_name = "PORT", default_value_t = 8000)]
    pub(crate) port: u16,
    /// A key that requests must have [default: the environment variable REKINDLE_API_KEY, or none]
    #[arg(long, value_name = "KEY")]
    pub(crate) api_key: Option<String>,
    /// Maximum tokens of a prompt [default: --max-seq-length]
    #[arg(long, value_name = "N")]
    pub(crate) max_prompt_tokens: Option<usize>,
    /// Maximum samples that run or wait; further requests get status 429
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub(crate) max_in_flight: usize,
    /// Maximum samples that run at once; others wait [default: 64, on CUDA 256]
    #[arg(long, value_name = "N")]
    pub(crate) max_sequences: Option<usize>,
    /// Memory of the key/value cache, such as 8GiB [default: 1GiB, on CUDA nine tenths of the free memory; not more than
    /// --max-sequences of --max-seq-length need]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub(crate) cache_memory: Option<usize>,
    /// Maximum size of a request's body in MiB
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub(crate) max_body_mib: usize,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
}

const SERVE: &str = "\
Routes: /v1/models, /v1/chat/completions, /v1/completions, /tokenize, /detokenize, /v1/load_lora_adapter,
/v1/unload_lora_adapter, /health, /metrics, and a chat page at /.
Ctrl-C ends the server after the running answers; pressed twice, at once.

Examples:
  rekindle serve Qwen/Qwen3-0.6B
  rekindle serve models/Qwen3-0.6B --adapter sql=outputs/sql/adapter --adapter tone=outputs/tone/adapter
  REKINDLE_API_KEY=secret rekindle serve outputs/run/adapter --host 0.0.0.0";
