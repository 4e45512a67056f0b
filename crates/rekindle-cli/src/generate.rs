//! `rekindle generate`.

use rekindle::{Error, GenerationConfig, Model, Tokenizer};
use serde::Serialize;

use crate::args::{GenerateArgs, PromptArgs};
use crate::chat::chat_prompt;
use crate::failure::Failure;
use crate::{open, output};

pub(crate) fn run(args: &GenerateArgs) -> Result<(), Failure> {
    let (model, tokenizer) = open::open(&args.model)?;
    let prompt = encode(&args.prompt, &model, tokenizer.as_ref())?;
    let config = GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        seed: args.seed,
        eos_ids: match &tokenizer {
            // An adapter's tokenizer need not know how its base ends an answer.
            Some(tokenizer) => [tokenizer.eos_ids(), &model.eos_ids()?].concat(),
            None => model.eos_ids()?,
        },
    };
    match (args.json, &tokenizer) {
        (true, tokenizer) => print_json(&model, tokenizer.as_ref(), &prompt, &config),
        (false, Some(tokenizer)) => stream_text(&model, tokenizer, &prompt, &config),
        (false, None) => stream_ids(&model, &prompt, &config),
    }
}

fn encode(prompt: &PromptArgs, model: &Model, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, Failure> {
    if let Some(ids) = &prompt.prompt_ids {
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
    match (&prompt.chat, &prompt.prompt) {
        (Some(message), _) => chat_prompt(tokenizer, message),
        (None, text) => Ok(tokenizer.encode(text.as_deref().unwrap_or_default(), true).map_err(Error::from)?),
    }
}

/// The answer of `--json`.
#[derive(Serialize)]
struct Answer {
    /// Without special tokens; null where the checkpoint has no tokenizer.
    text: Option<String>,
    /// The new tokens, an end token included.
    ids: Vec<u32>,
}

fn print_json(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    prompt: &[u32],
    config: &GenerationConfig,
) -> Result<(), Failure> {
    let ids = model.generate(prompt, config, |_| true)?.ids;
    let text = tokenizer.map(|tokenizer| tokenizer.decode(&ids, true)).transpose().map_err(Error::from)?;
    output::line(&serde_json::to_string(&Answer { text, ids }).expect("text and numbers serialize"))
}

fn stream_text(model: &Model, tokenizer: &Tokenizer, prompt: &[u32], config: &GenerationConfig) -> Result<(), Failure> {
    let mut decoder = tokenizer.stream_decoder(true);
    stream(model, prompt, config, |id| match decoder.push(id).map_err(Error::from)? {
        Some(text) => output::piece(&text),
        None => Ok(true),
    })?;
    let rest = decoder.finish().map_err(Error::from)?;
    output::line(&rest.unwrap_or_default())
}

fn stream_ids(model: &Model, prompt: &[u32], config: &GenerationConfig) -> Result<(), Failure> {
    let mut separator = "";
    stream(model, prompt, config, |id| output::piece(&format!("{}{id}", std::mem::replace(&mut separator, ","))))?;
    output::line("")
}

/// Generates until `show` fails or has no reader left.
fn stream(
    model: &Model,
    prompt: &[u32],
    config: &GenerationConfig,
    mut show: impl FnMut(u32) -> Result<bool, Failure>,
) -> Result<(), Failure> {
    let mut shown = Ok(true);
    model.generate(prompt, config, |id| {
        shown = show(id);
        matches!(shown, Ok(true))
    })?;
    shown.map(|_| ())
}
