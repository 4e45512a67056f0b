//! `/v1/chat/completions`.

mod request;
mod response;
mod tools;

use std::sync::Arc;

use axum::body::Body;
use axum::http::{Response, StatusCode};
use serde_json::Value;

use crate::answer::{AnswerParser, CLOSE};
use crate::constraint::{Preamble, TokenConstraint};
use crate::engine::{EngineRequest, RenderedChat};
use crate::error::{ApiError, json_response};
use crate::generation::Generation;
use crate::sse;
use crate::state::ServerState;

use response::{Answers, Chunks};
use tools::ToolChoice;

pub(crate) use request::ChatRequest;
pub(crate) use response::stop_reason;

/// The tag that opens the reasoning.
const OPEN: &str = "<think>";

/// Answers a request.
pub(crate) async fn answer(state: Arc<ServerState>, body: Value) -> Result<Response<Body>, ApiError> {
    let shared = state.clone();
    let (request, engine_request, parser) = state.prepare(move || prepare(&shared, body)).await?;
    let prompt = engine_request.prompt.clone();
    let mut generation = Generation::submit(&state, vec![engine_request])?;
    let answers = Answers::new(&state, request, prompt, parser);
    if answers.is_stream() {
        return Ok(sse::response(generation, Chunks::new(answers)));
    }
    let mut answers = answers;
    while let Some((sample, event)) = generation.next().await {
        answers.add(sample, event)?;
    }
    Ok(json_response(StatusCode::OK, &answers.json()))
}

/// Creates the parser of a sample.
type NewParser = Box<dyn Fn() -> AnswerParser + Send>;

/// Reads a body, renders its conversation and compiles its grammar.
fn prepare(state: &Arc<ServerState>, body: Value) -> Result<(ChatRequest, EngineRequest, NewParser), ApiError> {
    let engine = &state.engine;
    let mut request = ChatRequest::read(body, engine.limits())?;
    let adapter = state.adapter(&request.params.model)?;
    let format = engine.chat_format();
    let uses_tools = request.chat.tools.is_some() && request.tool_choice != ToolChoice::None;
    if uses_tools && format.tools.is_none() {
        let message = "the model's chat template shows no form of tool calls that this server can read; send the \
                       request without tools, or with tool_choice = \"none\"";
        return Err(ApiError::field("tools", message));
    }
    let mut chat = std::mem::take(&mut request.chat);
    if !uses_tools {
        chat.tools = None;
    }
    let rendered = engine.render_chat(&chat).map_err(|error| ApiError::from(error).in_field("messages"));
    let RenderedChat { text, ids } = rendered?;
    let max_tokens = state.max_tokens(&ids, request.max_tokens, usize::MAX, "messages")?;
    let in_reasoning = format.thinks && text.trim_end().ends_with(OPEN);
    let tools = if uses_tools { format.tools } else { None };
    let max_calls = if request.parallel_tool_calls { usize::MAX } else { 1 };

    let demands_call = matches!(request.tool_choice, ToolChoice::Required | ToolChoice::Named(_));
    let grammar = match (tools, &chat.tools) {
        (Some(tools), Some(described)) if demands_call => {
            let vocabulary = engine.vocabulary()?;
            let special = |text: &str| vocabulary.id(text).filter(|&id| vocabulary.is_special(id));
            tools::grammar(tools, described, &request.tool_choice, request.parallel_tool_calls, special)
        }
        _ => None,
    };
    let (grammar, param) = match (grammar, request.params.grammar.take()) {
        (Some(_), Some(_)) => {
            let message = "constrains the answer, and tool_choice demands a call; leave one of them out";
            let param = request.params.grammar_param;
            return Err(ApiError::field(param, format!("{param} {message}")));
        }
        (Some(grammar), None) => (Some(grammar), "tools"),
        (None, grammar) => (grammar, request.params.grammar_param),
    };
    let constraint = match grammar {
        None => None,
        Some(grammar) => {
            let vocabulary = engine.vocabulary()?;
            let may_think = format.thinks && !text.trim_end().ends_with(CLOSE);
            let preamble = match vocabulary.id(OPEN) {
                _ if in_reasoning => Preamble::Open { end: CLOSE.to_owned() },
                Some(open) if may_think => Preamble::May { open, end: CLOSE.to_owned() },
                _ => Preamble::None,
            };
            let constraint = TokenConstraint::new(&vocabulary, &grammar, preamble);
            Some(constraint.map_err(|error| ApiError::field(param, format!("{param}: {error}")))?)
        }
    };
    // Marks of calls are special tokens in some vocabularies.
    let skip_special_tokens = request.params.skip_special_tokens && tools.is_none();
    let engine_request = EngineRequest {
        adapter,
        prompt: ids,
        n: request.params.n,
        max_tokens,
        sampling: request.params.sampling.clone(),
        stops: request.params.stops.clone(),
        skip_special_tokens,
        logprobs: request.logprobs,
        prompt_logprobs: None,
        constraint,
    };
    let parser = move || AnswerParser::new(format.thinks, in_reasoning, tools, max_calls);
    Ok((request, engine_request, Box::new(parser)))
}
