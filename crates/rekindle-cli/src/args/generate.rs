//! The arguments of `rekindle eval` and `rekindle generate`.

use std::path::PathBuf;

use super::{ModelArgs, SamplingFilterArgs};

#[derive(Debug, clap::Args)]
#[command(after_help = EVAL)]
pub(crate) struct EvalArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Rows: a file of JSON lines, JSON, CSV, Parquet or Arrow, a directory or a dataset on the hub (its split test), or a pattern
    #[arg(long, value_name = "ROWS")]
    pub(crate) data: PathBuf,
    /// Omit the end token after rows of "text", which the loss covers as in training
    #[arg(long)]
    pub(crate) no_end_token: bool,
    /// Also print the loss of every row
    #[arg(long)]
    pub(crate) per_row: bool,
    /// Print one JSON object: loss, perplexity, tokens, and nll and tokens of every row
    #[arg(long)]
    pub(crate) json: bool,
    /// Add the loss of every token to the JSON object: token_nll of each row, with position, id, token and nll
    #[arg(long, requires = "json")]
    pub(crate) per_token: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_help = GENERATE)]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    /// A system prompt before the message of --chat
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["prompt", "messages", "prompt_ids", "data"])]
    pub(crate) system: Option<String>,
    /// Name of one of the checkpoint's chat templates [default: tool_use with tools, else default]
    #[arg(long, value_name = "NAME", conflicts_with_all = ["prompt", "prompt_ids"])]
    pub(crate) chat_template: Option<String>,
    /// Maximum number of tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_new_tokens: usize,
    /// Temperature of sampling; 0 always takes the most likely token
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub(crate) temperature: f32,
    #[command(flatten)]
    pub(crate) filters: SamplingFilterArgs,
    /// End at this text, which is not printed; may be repeated
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Additional end tokens, separated by commas
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    pub(crate) stop_ids: Vec<u32>,
    /// Seed of sampling
    #[arg(long, value_name = "S", default_value_t = 3407)]
    pub(crate) seed: u64,
    /// Print one JSON object at the end instead of streaming text: text, ids, stop_reason, token counts and speed
    #[arg(long, conflicts_with = "data")]
    pub(crate) json: bool,
    /// File for the answers to --data, one JSON object a line; rows that it answers already are skipped
    #[arg(long, value_name = "FILE", requires = "data", conflicts_with_all = ["prompt", "chat", "messages", "prompt_ids"])]
    pub(crate) out: Option<PathBuf>,
    /// Rows of --data that are answered at the same time
    #[arg(long, value_name = "N", default_value_t = 64, requires = "data")]
    pub(crate) batch_size: usize,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
pub(crate) struct PromptArgs {
    /// Text to continue
    #[arg(long, value_name = "T")]
    pub(crate) prompt: Option<String>,
    /// A user's message to answer, in the model's chat template
    #[arg(long, value_name = "T")]
    pub(crate) chat: Option<String>,
    /// A conversation to answer, as JSON: a list of messages, or an object with messages, tools and chat_template_kwargs; - reads standard input
    #[arg(long, value_name = "FILE")]
    pub(crate) messages: Option<PathBuf>,
    /// Token ids to continue, separated by commas; needs no tokenizer
    #[arg(long, value_name = "1,2,3", value_delimiter = ',')]
    pub(crate) prompt_ids: Option<Vec<u32>>,
    /// A file of JSON lines to answer all at once, each with prompt (a text or a list of messages), messages or prompt_ids; needs --out
    #[arg(long, value_name = "FILE", requires = "out")]
    pub(crate) data: Option<PathBuf>,
}

const EVAL: &str = "\
Examples:
  rekindle eval --model Qwen/Qwen3-0.6B --data heldout.jsonl
  rekindle eval --model models/Qwen3-0.6B --adapter outputs/run/adapter --data heldout.jsonl --json
  rekindle eval --model models/Qwen3-0.6B --load-in-4bit --data heldout.jsonl
  rekindle eval --model models/Qwen3-0.6B --adapter outputs/sql/adapter --adapter outputs/chat/adapter \\
    --adapter-weights 0.7,0.3 --data heldout.jsonl";

const GENERATE: &str = "\
Generation ends at the model's end tokens: those of generation_config.json or config.json, the tokenizer's eos_token, and
the token with which the chat template ends a turn. --stop and --stop-ids add others.

Examples:
  rekindle generate --model Qwen/Qwen3-0.6B --chat 'What is a whale?' --system 'Answer in one sentence.'
  rekindle generate --model outputs/run/adapter --messages conversation.json --json
  rekindle generate --model models/Qwen3-0.6B --adapter outputs/run/adapter --prompt 'Once' --temperature 0.8 --min-p 0.05
  rekindle generate --model outputs/run/adapter --data prompts.jsonl --out answers.jsonl";

#[cfg(test)]
mod tests {
    use clap::Parser;
    use rekindle::{DeviceKind, Dtype};

    use super::*;
    use crate::args::{Args, Command};

    fn parse(more: &[&str]) -> Result<GenerateArgs, clap::Error> {
        match Args::try_parse_from(["rekindle", "generate", "--model", "m"].iter().chain(more))?.command {
            Command::Generate(args) => Ok(*args),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn one_prompt_is_needed_and_only_one() {
        assert!(parse(&[]).is_err());
        assert!(parse(&["--prompt", "a", "--chat", "b"]).is_err());
        assert!(parse(&["--messages", "a", "--chat", "b"]).is_err());
        let args = parse(&["--prompt-ids", "1,2,3"]).unwrap();
        assert_eq!(args.prompt.prompt_ids, Some(vec![1, 2, 3]));
        assert_eq!(
            (args.temperature, args.model.load.dtype, args.model.load.device),
            (0.0, Dtype::Auto, DeviceKind::Auto)
        );
    }

    #[test]
    fn rows_need_a_file_for_answers() {
        assert!(parse(&["--data", "a"]).is_err() && parse(&["--prompt", "a", "--out", "b"]).is_err());
        assert!(parse(&["--data", "a", "--out", "b", "--json"]).is_err());
        let args = parse(&["--data", "a", "--out", "b", "--batch-size", "3"]).unwrap();
        assert_eq!((args.prompt.data, args.out, args.batch_size), (Some("a".into()), Some("b".into()), 3));
    }

    #[test]
    fn what_belongs_to_another_argument_needs_it() {
        assert!(parse(&["--prompt", "a", "--system", "b"]).is_err(), "there is no conversation");
        assert_eq!(parse(&["--chat", "a", "--system", "b"]).unwrap().system.as_deref(), Some("b"));
        let args = parse(&["--prompt", "a", "--stop", "---", "--stop", "\n", "--stop-ids", "3,4"]).unwrap();
        assert_eq!((args.stop, args.stop_ids), (vec!["---".to_owned(), "\n".to_owned()], vec![3, 4]));
        let eval = ["rekindle", "eval", "--model", "m", "--data", "d", "--per-token"];
        assert!(Args::try_parse_from(eval).is_err());
        assert!(Args::try_parse_from(eval.iter().chain(&["--json"])).is_ok());
    }
}
