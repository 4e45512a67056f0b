//! The arguments of `rekindle chat`, and named adapters.

use std::path::PathBuf;
use std::str::FromStr;

use super::{LoadArgs, SamplingFilterArgs};

#[derive(Debug, clap::Args)]
#[command(after_help = CHAT)]
pub(crate) struct ChatArgs {
    /// A checkpoint directory in the Hugging Face layout, or a name on the hub; an adapter is loaded with its base
    #[arg(value_name = "MODEL")]
    pub(crate) model: PathBuf,
    /// An adapter in PEFT's format and a name for it; may be repeated. The last one is active at the start
    #[arg(long, value_name = "NAME=DIR")]
    pub(crate) adapter: Vec<NamedAdapter>,
    #[command(flatten)]
    pub(crate) load: LoadArgs,
    /// A system prompt
    #[arg(long, value_name = "TEXT")]
    pub(crate) system: Option<String>,
    /// Maximum number of tokens of an answer [default: all that fit into --max-seq-length]
    #[arg(long, value_name = "N")]
    pub(crate) max_new_tokens: Option<usize>,
    /// Temperature of sampling; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.7, allow_negative_numbers = true)]
    pub(crate) temperature: f32,
    #[command(flatten)]
    pub(crate) filters: SamplingFilterArgs,
    /// Seed of sampling; each answer continues it
    #[arg(long, value_name = "S", default_value_t = 3407)]
    pub(crate) seed: u64,
}

/// An adapter with a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedAdapter {
    pub(crate) name: String,
    /// A directory or a name on the hub.
    pub(crate) path: PathBuf,
}

impl FromStr for NamedAdapter {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(Self { name: name.to_owned(), path: path.into() })
            }
            _ => Err("expected NAME=DIR, such as sql=outputs/sql/adapter".to_owned()),
        }
    }
}

const CHAT: &str = "\
Commands in the chat: /system, /adapter on|off|NAME, /retry, /reset, /save, /help. Ctrl-C stops an answer; Ctrl-D ends the
program. Messages may also come from a pipe, one a line.

Examples:
  rekindle chat Qwen/Qwen3-0.6B --system 'Answer in one sentence.'
  rekindle chat outputs/run/adapter
  rekindle chat models/Qwen3-0.6B --adapter sql=outputs/sql/adapter --adapter tone=outputs/tone/adapter";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adapters_have_names() {
        let adapter: NamedAdapter = "a=b=c".parse().unwrap();
        assert_eq!((adapter.name.as_str(), adapter.path), ("a", PathBuf::from("b=c")));
        for text in ["a", "=b", "a=", ""] {
            assert!(text.parse::<NamedAdapter>().is_err(), "{text}");
        }
    }
}
