//! `/v1/completions`.

mod response;

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde_json::Value;

use crate::constraint::{Preamble, TokenConstraint};
use crate::engine::{EngineRequest, TokenLogprob};
use crate::error::{ApiError, json_response};
use crate::fields::{Fields, token_id, type_name};
use crate::generation::Generation;
use crate::params::{IGNORED, MAX_LOGPROBS, Params};
use crate::sse;
use crate::state::ServerState;

use response::{Change, Completions};

/// The default of `max_tokens`, as OpenAI's.
const MAX_TOKENS: usize = 16;

/// The most prompts of a request.
const MAX_PROMPTS: usize = 2048;

/// A prompt as the client wrote it.
enum PromptInput {
    Text(String),
    Ids(Vec<u32>),
}

/// A prompt to continue.
struct Prompt {
    ids: Vec<u32>,
    /// The text, if it is to be returned.
    echo: Option<String>,
    /// One for each token, if they are to be returned.
    logprobs: Vec<Option<TokenLogprob>>,
}

/// Answers a request.
pub(crate) async fn answer(state: Arc<ServerState>, body: Value) -> Result<Response<Body>, ApiError> {
    let shared = state.clone();
    let (mut completions, requests) = state.prepare(move || prepare(&shared, body)).await?;
    let mut generation = Generation::submit(&state, requests)?;
    if completions.params.stream.is_some() {
        return Ok(sse::response(generation, completions));
    }
    let mut choices: Vec<Change> = (0..completions.choices()).map(|_| Change::default()).collect();
    while let Some((sample, event)) = generation.next().await {
        let change = completions.change(sample, event)?;
        choices[sample].add(change);
    }
    Ok(json_response(StatusCode::OK, &completions.json(&choices)))
}

/// Reads a body, encodes its prompts and compiles its grammar.
fn prepare(state: &Arc<ServerState>, body: Value) -> Result<(Completions, Vec<EngineRequest>), ApiError> {
    let engine = &state.engine;
    let limits = engine.limits();
    let mut fields = Fields::new(body, "")?;
    let params = Params::take(&mut fields, limits)?;
    let inputs = prompts(&mut fields, limits.vocab_size)?;
    let echo = fields.boolean("echo")?.unwrap_or(false);
    let add_special_tokens = fields.boolean("add_special_tokens")?.unwrap_or(true);
    let logprobs = fields.count("logprobs", 0, MAX_LOGPROBS)?;
    let asked = fields.count("max_tokens", usize::from(!echo), usize::MAX)?;
    if fields.string("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(fields.error("suffix", "is not supported"));
    }
    fields.finish(&IGNORED)?;
    let adapter = state.adapter(&params.model)?;

    let constraint = match &params.grammar {
        None => None,
        Some(grammar) => {
            let param = params.grammar_param;
            let constraint = TokenConstraint::new(&engine.vocabulary()?, grammar, Preamble::None);
            Some(constraint.map_err(|error| ApiError::field(param, format!("{param}: {error}")))?)
        }
    };
    let (mut requests, mut prompts) = (Vec::new(), Vec::new());
    for input in inputs {
        let (ids, text) = match input {
            PromptInput::Text(text) => {
                let ids = engine.encode_prompt(&text, add_special_tokens);
                (ids.map_err(|error| ApiError::from(error).in_field("prompt"))?, Some(text))
            }
            PromptInput::Ids(ids) => (ids, None),
        };
        let max_tokens = state.max_tokens(&ids, asked, MAX_TOKENS, "prompt")?;
        let echo = match (echo, text) {
            (false, _) => None,
            (true, Some(text)) => Some(text),
            (true, None) => Some(engine.decode(&ids, false)?),
        };
        requests.push(EngineRequest {
            adapter: adapter.clone(),
            prompt: ids.clone(),
            n: params.n,
            max_tokens,
            sampling: params.sampling.clone(),
            stops: params.stops.clone(),
            skip_special_tokens: params.skip_special_tokens,
            logprobs,
            prompt_logprobs: logprobs.filter(|_| echo.is_some()),
            constraint: constraint.clone(),
        });
        prompts.push(Prompt { ids, echo, logprobs: Vec::new() });
    }
    Ok((Completions::new(state, params, prompts, logprobs), requests))
}

/// Takes `prompt`: a text, token ids, or a list of either.
fn prompts(fields: &mut Fields, vocab_size: usize) -> Result<Vec<PromptInput>, ApiError> {
    let wrong = |fields: &Fields, found: &Value| {
        let expected = "a string, a list of token ids, or a list of these";
        fields.error("prompt", format_args!("has {} in it; it must be {expected}", type_name(found)))
    };
    let ids = |fields: &Fields, values: &[Value]| {
        let ids: Result<Vec<u32>, String> = values.iter().map(|value| token_id(value, vocab_size)).collect();
        ids.map(PromptInput::Ids).map_err(|problem| fields.error("prompt", problem))
    };
    let prompts = match fields.take("prompt") {
        None => return Err(fields.error("prompt", "is missing")),
        Some(Value::String(text)) => vec![PromptInput::Text(text)],
        Some(Value::Array(values)) => match values.first() {
            None => return Err(fields.error("prompt", "is an empty list")),
            Some(Value::Number(_)) => vec![ids(fields, &values)?],
            Some(_) => {
                let read = values.into_iter().map(|value| match value {
                    Value::String(text) => Ok(PromptInput::Text(text)),
                    Value::Array(values) => ids(fields, &values),
                    other => Err(wrong(fields, &other)),
                });
                read.collect::<Result<_, _>>()?
            }
        },
        Some(other) => return Err(wrong(fields, &other)),
    };
    if prompts.len() > MAX_PROMPTS {
        return Err(fields.error("prompt", format_args!("has {} prompts; {MAX_PROMPTS} at most", prompts.len())));
    }
    Ok(prompts)
}
