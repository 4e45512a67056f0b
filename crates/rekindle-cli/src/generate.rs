//! `rekindle generate`.

use std::io::Read;
use std::path::Path;

use rekindle::{ChatPrompt, Error, Generated, GenerationConfig, Model, Tokenizer};
use serde::Serialize;

use crate::args::{GenerateArgs, PromptArgs};
use crate::failure::Failure;
use crate::{generate_rows, open, output};

pub(crate) fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let (model, tokenizer) = open::open(&args.model)?;
    let vocab = model.causal_lm().config().vocab_size();
    if let Some(id) = args.stop_ids.iter().find(|&&id| id as usize >= vocab) {
        return Err(Failure::Configuration(format!(
            "--stop-ids {id} is outside the model's vocabulary of {vocab} tokens"
        )));
    }
    let config = GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        seed: args.seed,
        eos_ids: [model.end_tokens(tokenizer.as_ref())?, args.stop_ids.clone()].concat(),
        ..args.filters.config()
    };
    if tokenizer.is_none() && !args.stop.is_empty() {
        return Err(Failure::Configuration(
            "--stop is text, and this checkpoint has no tokenizer.json; use --stop-ids".to_owned(),
        ));
    }
    if let (Some(data), Some(out)) = (&args.prompt.data, &args.out) {
        return generate_rows::run(&model, tokenizer.as_ref(), &config, args, [data, out]);
    }
    let prompt = encode(args, &model, tokenizer.as_ref())?;
    match &tokenizer {
        Some(tokenizer) => text(&model, tokenizer, &prompt, &config, args),
        None => ids(&model, &prompt, &config, args.json),
    }
}

fn encode(args: &GenerateArgs, model: &Model, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, Failure> {
    let PromptArgs { prompt, chat, messages, prompt_ids, data: _ } = &args.prompt;
    if let Some(ids) = prompt_ids {
        return Ok(ids.clone());
    }
    let missing;
    let tokenizer = match tokenizer {
        Some(tokenizer) => tokenizer,
        // Text cannot do without one, so this says what the checkpoint lacks.
        None => {
            missing = Tokenizer::from_dir(model.path()).map_err(Error::from)?;
            &missing
        }
    };
    let mut conversation = match (chat, messages) {
        (Some(message), _) => ChatPrompt::new(args.system.as_deref(), message),
        (None, Some(path)) => ChatPrompt::from_json(&read(path)?, path).map_err(Error::from)?,
        (None, None) => {
            return Ok(tokenizer.encode(prompt.as_deref().unwrap_or_default(), true).map_err(Error::from)?);
        }
    };
    conversation.chat_template.clone_from(&args.chat_template);
    Ok(conversation.encode(tokenizer).map_err(Error::from)?)
}

/// Reads the text of a file, or of standard input for `-`.
fn read(path: &Path) -> Result<String, Failure> {
    let mut text = String::new();
    let read = if path == Path::new("-") {
        std::io::stdin().read_to_string(&mut text).map(|_| text)
    } else {
        std::fs::read_to_string(path)
    };
    read.map_err(|source| Failure::File { path: path.to_owned(), source })
}

/// The output of `--json`.
#[derive(Serialize)]
struct Answer<'a> {
    /// The text without special tokens and stop string; null if the checkpoint has no tokenizer.
    text: Option<&'a str>,
    /// The new tokens, including an end token and those of a stop string.
    ids: &'a [u32],
    /// `end_token`, `stop_string` or `length`.
    stop_reason: &'static str,
    /// The stop string at the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    stop: Option<&'a str>,
    prompt_tokens: usize,
    new_tokens: usize,
    /// Seconds until the first new token.
    prompt_seconds: f64,
    /// New tokens per second after the first.
    #[serde(skip_serializing_if = "Option::is_none")]
    tokens_per_second: Option<f64>,
}

impl<'a> Answer<'a> {
    fn of(generated: &'a Generated, stop_reason: &'static str) -> Self {
        Self {
            text: None,
            ids: &generated.ids,
            stop_reason,
            stop: None,
            prompt_tokens: generated.prompt_tokens,
            new_tokens: generated.ids.len(),
            prompt_seconds: generated.first_token.as_secs_f64(),
            tokens_per_second: generated.tokens_per_second(),
        }
    }

    fn print(&self) -> Result<(), Failure> {
        output::line(&serde_json::to_string(self).expect("text and finite numbers serialize"))
    }

    /// Ends the line of a streamed answer, and prints its statistics to stderr.
    fn finish(&self) -> Result<(), Failure> {
        output::line("")?;
        let speed = self.tokens_per_second.map_or_else(String::new, |speed| format!(", {speed:.1} tokens/s"));
        let Self { prompt_tokens, new_tokens, .. } = self;
        let reason = self.stop_reason.replace('_', " ");
        eprintln!("prompt tokens {prompt_tokens}, new tokens {new_tokens}{speed}, ended by: {reason}");
        Ok(())
    }
}

fn text(
    model: &Model,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    config: &GenerationConfig,
    args: &GenerateArgs,
) -> Result<(), Failure> {
    let mut shown = Ok(true);
    let done = model.generate_text(tokenizer, prompt, config, &args.stop, |piece| {
        if !args.json {
            shown = output::piece(piece);
        }
        matches!(shown, Ok(true))
    })?;
    let still_read = shown?;
    let answer = Answer {
        text: Some(&done.text),
        stop: done.stop_string.as_deref(),
        ..Answer::of(&done.generated, done.stop_reason())
    };
    match (args.json, still_read) {
        (true, _) => answer.print(),
        (false, true) => answer.finish(),
        (false, false) => Ok(()),
    }
}

fn ids(model: &Model, prompt: &[u32], config: &GenerationConfig, json: bool) -> Result<(), Failure> {
    let (mut shown, mut separator) = (Ok(true), "");
    let done = model.generate(prompt, config, |id| {
        if !json {
            shown = output::piece(&format!("{}{id}", std::mem::replace(&mut separator, ",")));
        }
        matches!(shown, Ok(true))
    })?;
    let still_read = shown?;
    let answer = Answer::of(&done, done.stop.name());
    match (json, still_read) {
        (true, _) => answer.print(),
        (false, true) => answer.finish(),
        (false, false) => Ok(()),
    }
}
