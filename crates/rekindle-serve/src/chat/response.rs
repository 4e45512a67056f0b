//! Chat completions as one object and as chunks.

use std::collections::VecDeque;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::answer::{AnswerParser, AnswerPart, ToolCall};
use crate::engine::{EngineEvent, StopMatch, TokenLogprob};
use crate::error::ApiError;
use crate::generation::{Usage, reason_name};
use crate::params::StreamOptions;
use crate::sse::ChunkWriter;
use crate::state::{ServerState, now};

use super::NewParser;
use super::request::ChatRequest;

/// The samples of a request, as they grow.
pub(super) struct Answers {
    state: Arc<ServerState>,
    id: String,
    created: u64,
    request: ChatRequest,
    prompt: Vec<u32>,
    samples: Vec<Sample>,
    usage: Usage,
}

struct Sample {
    parser: AnswerParser,
    reasoning: String,
    content: String,
    calls: Vec<Value>,
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    finish_reason: &'static str,
    stop: Value,
}

/// The addition of an event to a sample.
struct Change {
    parts: Vec<AnswerPart>,
    logprobs: Vec<Value>,
    ids: Vec<u32>,
    is_finished: bool,
}

impl Answers {
    pub(super) fn new(state: &Arc<ServerState>, request: ChatRequest, prompt: Vec<u32>, parser: NewParser) -> Self {
        let sample = |_| Sample {
            parser: parser(),
            reasoning: String::new(),
            content: String::new(),
            calls: Vec::new(),
            logprobs: Vec::new(),
            ids: Vec::new(),
            finish_reason: "stop",
            stop: Value::Null,
        };
        let usage = Usage { prompt_tokens: prompt.len(), ..Usage::default() };
        let samples = (0..request.params.n).map(sample).collect();
        Self { state: state.clone(), id: state.id("chatcmpl-"), created: now(), request, prompt, samples, usage }
    }

    pub(super) fn is_stream(&self) -> bool {
        self.request.params.stream.is_some()
    }

    /// Adds an event to its sample.
    pub(super) fn add(&mut self, sample: usize, event: EngineEvent) -> Result<(), ApiError> {
        let change = self.change(sample, event)?;
        let calls: Vec<Value> = change
            .parts
            .iter()
            .filter_map(|part| match part {
                AnswerPart::Call(call) => Some(self.call(call)),
                _ => None,
            })
            .collect();
        let sample = &mut self.samples[sample];
        for part in change.parts {
            match part {
                AnswerPart::Reasoning(text) => sample.reasoning += &text,
                AnswerPart::Content(text) => sample.content += &text,
                AnswerPart::Call(_) => {}
            }
        }
        sample.calls.extend(calls);
        sample.logprobs.extend(change.logprobs);
        sample.ids.extend(change.ids);
        Ok(())
    }

    fn change(&mut self, at: usize, event: EngineEvent) -> Result<Change, ApiError> {
        let sample = &mut self.samples[at];
        let mut change = Change { parts: Vec::new(), logprobs: Vec::new(), ids: Vec::new(), is_finished: false };
        match event {
            EngineEvent::Prompt(_) => {}
            EngineEvent::Tokens { text, ids, logprobs } => {
                self.usage.completion_tokens += ids.len();
                change.parts = sample.parser.push(&text);
                change.ids = ids;
                change.logprobs = logprobs.iter().map(|token| self.logprob(token)).collect();
            }
            EngineEvent::Finished { reason, stop, cached_tokens } => {
                change.parts = sample.parser.finish();
                change.is_finished = true;
                sample.finish_reason = if sample.parser.calls() > 0 { "tool_calls" } else { reason_name(reason) };
                sample.stop = stop_reason(stop);
                self.usage.cached_tokens = self.usage.cached_tokens.max(cached_tokens);
            }
            EngineEvent::Failed(error) => return Err(error.into()),
        }
        Ok(change)
    }

    fn call(&self, call: &ToolCall) -> Value {
        let id = self.state.id("call_");
        json!({"id": id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}})
    }

    /// Returns a token of `logprobs.content`.
    fn logprob(&self, token: &TokenLogprob) -> Value {
        let one = |id: u32, logprob: f32| {
            let bytes = self.state.engine.token_bytes(id);
            json!({"token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes})
        };
        let mut value = one(token.id, token.logprob);
        value["top_logprobs"] = token.top.iter().map(|&(id, logprob)| one(id, logprob)).collect();
        value
    }

    fn object(&self, kind: &str, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.request.params.model,
            "system_fingerprint": null,
            "choices": choices,
        })
    }

    /// Returns the whole answer.
    pub(super) fn json(&self) -> Value {
        let choices = self.samples.iter().enumerate().map(|(index, sample)| {
            let content = if sample.content.is_empty() && !sample.calls.is_empty() {
                Value::Null
            } else {
                Value::from(sample.content.as_str())
            };
            let mut message = json!({"role": "assistant", "content": content, "refusal": null});
            if !sample.reasoning.is_empty() {
                message["reasoning_content"] = Value::from(sample.reasoning.as_str());
            }
            if !sample.calls.is_empty() {
                message["tool_calls"] = Value::Array(sample.calls.clone());
            }
            let mut choice = json!({
                "index": index,
                "message": message,
                "logprobs": null,
                "finish_reason": sample.finish_reason,
                "stop_reason": sample.stop,
            });
            if self.request.logprobs.is_some() {
                choice["logprobs"] = json!({"content": sample.logprobs, "refusal": null});
            }
            if self.request.params.return_token_ids {
                choice["token_ids"] = json!(sample.ids);
            }
            choice
        });
        let mut object = self.object("chat.completion", choices.collect());
        object["usage"] = self.usage.json();
        if self.request.params.return_token_ids {
            object["prompt_token_ids"] = json!(self.prompt);
        }
        object
    }
}

/// Returns the value of `stop_reason`: the stop string or stop id at the end.
pub(crate) fn stop_reason(stop: Option<StopMatch>) -> Value {
    match stop {
        None => Value::Null,
        Some(StopMatch::Text(text)) => Value::String(text),
        Some(StopMatch::Id(id)) => Value::from(id),
    }
}

/// The samples of a request as a stream of chunks.
pub(super) struct Chunks {
    answers: Answers,
    options: StreamOptions,
}

impl Chunks {
    pub(super) fn new(answers: Answers) -> Self {
        let options = answers.request.params.stream.unwrap_or_default();
        Self { answers, options }
    }

    /// Returns a chunk with one choice, or the last chunk with none.
    fn chunk(&self, choice: Option<Value>) -> Value {
        let is_last = choice.is_none();
        let mut chunk = self.answers.object("chat.completion.chunk", choice.into_iter().collect());
        if is_last || self.options.continuous_usage {
            chunk["usage"] = self.answers.usage.json();
        } else if self.options.include_usage {
            chunk["usage"] = Value::Null;
        }
        chunk
    }
}

impl ChunkWriter for Chunks {
    fn begin(&mut self) -> Vec<Value> {
        let first = |index| {
            let delta = json!({"role": "assistant", "content": ""});
            let mut choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
            let returns_ids = self.answers.request.params.return_token_ids;
            if returns_ids {
                choice["token_ids"] = json!([]);
            }
            let mut chunk = self.chunk(Some(choice));
            if returns_ids {
                chunk["prompt_token_ids"] = json!(self.answers.prompt);
            }
            chunk
        };
        (0..self.answers.samples.len()).map(first).collect()
    }

    fn event(&mut self, at: usize, event: EngineEvent) -> Result<Vec<Value>, ApiError> {
        let Change { parts, logprobs, ids, is_finished } = self.answers.change(at, event)?;
        let mut deltas: VecDeque<Value> = VecDeque::new();
        for part in parts {
            deltas.push_back(match part {
                AnswerPart::Reasoning(text) => json!({"reasoning_content": text}),
                AnswerPart::Content(text) => json!({"content": text}),
                AnswerPart::Call(call) => {
                    let mut call = self.answers.call(&call);
                    let calls = &mut self.answers.samples[at].calls;
                    call["index"] = Value::from(calls.len());
                    calls.push(Value::Null);
                    json!({"tool_calls": [call]})
                }
            });
        }
        let request = &self.answers.request;
        let shows_tokens = (request.logprobs.is_some() && !logprobs.is_empty())
            || (request.params.return_token_ids && !ids.is_empty());
        if deltas.is_empty() && shows_tokens {
            deltas.push_back(json!({"content": ""}));
        }
        let (mut logprobs, mut ids) = (Some(logprobs), Some(ids));
        let mut chunks = Vec::new();
        if is_finished {
            deltas.push_back(Value::Object(Map::new()));
        }
        while let Some(delta) = deltas.pop_front() {
            let mut choice = json!({"index": at, "delta": delta, "logprobs": null, "finish_reason": null});
            // The tokens of an event belong to its first chunk.
            if let Some(logprobs) = logprobs.take().filter(|list| request.logprobs.is_some() && !list.is_empty()) {
                choice["logprobs"] = json!({"content": logprobs, "refusal": null});
            }
            if let Some(ids) = ids.take().filter(|_| request.params.return_token_ids) {
                choice["token_ids"] = json!(ids);
            }
            if is_finished && deltas.is_empty() {
                let sample = &self.answers.samples[at];
                choice["finish_reason"] = Value::from(sample.finish_reason);
                choice["stop_reason"] = sample.stop.clone();
            }
            chunks.push(self.chunk(Some(choice)));
        }
        Ok(chunks)
    }

    fn end(&mut self) -> Vec<Value> {
        if self.options.include_usage { vec![self.chunk(None)] } else { Vec::new() }
    }
}
