//! Completions as one object and as chunks.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::chat::stop_reason;
use crate::engine::{EngineEvent, TokenLogprob};
use crate::error::ApiError;
use crate::generation::{Usage, reason_name};
use crate::params::{Params, StreamOptions};
use crate::sse::ChunkWriter;
use crate::state::{ServerState, now};

use super::Prompt;

/// The choices of a request, as they grow.
pub(super) struct Completions {
    state: Arc<ServerState>,
    id: String,
    created: u64,
    pub(super) params: Params,
    prompts: Vec<Prompt>,
    logprobs: Option<usize>,
    usage: Usage,
    /// The characters of each choice so far, for `text_offset`.
    offsets: Vec<usize>,
    /// Choices that have had their first event.
    begun: Vec<bool>,
}

/// An addition to a choice, by one event or several.
#[derive(Default)]
pub(super) struct Change {
    text: String,
    logprobs: Option<Logprobs>,
    ids: Vec<u32>,
    /// The prompt's ids, in the first change of a choice.
    prompt_ids: Option<Vec<u32>>,
    finish: Option<(&'static str, Value)>,
}

/// Log-probabilities in the form of completions.
#[derive(Default)]
struct Logprobs {
    tokens: Vec<String>,
    token_logprobs: Vec<Value>,
    top_logprobs: Vec<Value>,
    text_offset: Vec<usize>,
}

impl Change {
    /// Appends a later change of the same choice.
    pub(super) fn add(&mut self, later: Self) {
        self.text += &later.text;
        self.ids.extend(later.ids);
        if let Some(Logprobs { tokens, token_logprobs, top_logprobs, text_offset }) = later.logprobs {
            let all = self.logprobs.get_or_insert_default();
            all.tokens.extend(tokens);
            all.token_logprobs.extend(token_logprobs);
            all.top_logprobs.extend(top_logprobs);
            all.text_offset.extend(text_offset);
        }
        self.prompt_ids = self.prompt_ids.take().or(later.prompt_ids);
        self.finish = later.finish.or(self.finish.take());
    }

    /// Returns true if a client would see nothing of it.
    fn is_empty(&self) -> bool {
        let Self { text, logprobs, ids, prompt_ids, finish } = self;
        let shows_tokens = logprobs.is_some() || prompt_ids.is_some() || !ids.is_empty();
        text.is_empty() && finish.is_none() && !shows_tokens
    }
}

impl Logprobs {
    /// Adds a token whose text begins at character `offset`; returns the offset after it.
    fn add(&mut self, state: &ServerState, id: u32, found: Option<&TokenLogprob>, offset: usize) -> usize {
        let text = |id| String::from_utf8_lossy(&state.engine.token_bytes(id)).into_owned();
        let token = text(id);
        let end = offset + token.chars().count();
        self.tokens.push(token);
        self.text_offset.push(offset);
        match found {
            None => {
                self.token_logprobs.push(Value::Null);
                self.top_logprobs.push(Value::Null);
            }
            Some(found) => {
                self.token_logprobs.push(json!(found.logprob));
                let mut top: Map<String, Value> = Map::new();
                for &(id, logprob) in &found.top {
                    // Tokens with the same text: the more likely one comes first.
                    top.entry(text(id)).or_insert_with(|| json!(logprob));
                }
                top.entry(text(id)).or_insert_with(|| json!(found.logprob));
                self.top_logprobs.push(Value::Object(top));
            }
        }
        end
    }

    fn json(&self) -> Value {
        let Self { tokens, token_logprobs, top_logprobs, text_offset } = self;
        json!({
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": top_logprobs,
            "text_offset": text_offset,
        })
    }
}

impl Completions {
    pub(super) fn new(state: &Arc<ServerState>, params: Params, prompts: Vec<Prompt>, logprobs: Option<usize>) -> Self {
        let choices = prompts.len() * params.n;
        let usage = Usage { prompt_tokens: prompts.iter().map(|prompt| prompt.ids.len()).sum(), ..Usage::default() };
        Self {
            state: state.clone(),
            id: state.id("cmpl-"),
            created: now(),
            params,
            prompts,
            logprobs,
            usage,
            offsets: vec![0; choices],
            begun: vec![false; choices],
        }
    }

    /// Returns the number of choices.
    pub(super) fn choices(&self) -> usize {
        self.begun.len()
    }

    /// Returns the choice's part of the prompt: its ids, and text and log-probabilities if they are echoed.
    fn echo(&mut self, choice: usize) -> Change {
        let prompt = &self.prompts[choice / self.params.n];
        let mut change = Change::default();
        if self.params.return_token_ids {
            change.prompt_ids = Some(prompt.ids.clone());
        }
        if let Some(text) = &prompt.echo {
            change.text.clone_from(text);
            if self.logprobs.is_some() {
                let mut logprobs = Logprobs::default();
                let mut offset = 0;
                for (at, &id) in prompt.ids.iter().enumerate() {
                    let found = prompt.logprobs.get(at).and_then(Option::as_ref);
                    offset = logprobs.add(&self.state, id, found, offset);
                }
                change.logprobs = Some(logprobs);
                self.offsets[choice] = offset;
            }
        }
        change
    }

    /// Returns what an event adds to a choice. The prompt is in the first change of each.
    pub(super) fn change(&mut self, choice: usize, event: EngineEvent) -> Result<Change, ApiError> {
        if let EngineEvent::Prompt(logprobs) = event {
            self.prompts[choice / self.params.n].logprobs = logprobs;
            return Ok(Change::default());
        }
        let is_first = !std::mem::replace(&mut self.begun[choice], true);
        let mut change = if is_first { self.echo(choice) } else { Change::default() };
        match event {
            EngineEvent::Prompt(_) => {}
            EngineEvent::Tokens { text, ids, logprobs } => {
                self.usage.completion_tokens += ids.len();
                change.text += &text;
                if self.logprobs.is_some() {
                    let list = change.logprobs.get_or_insert_default();
                    for token in &logprobs {
                        self.offsets[choice] = list.add(&self.state, token.id, Some(token), self.offsets[choice]);
                    }
                }
                change.ids = ids;
            }
            EngineEvent::Finished { reason, stop, cached_tokens } => {
                self.usage.cached_tokens += if choice.is_multiple_of(self.params.n) { cached_tokens } else { 0 };
                change.finish = Some((reason_name(reason), stop_reason(stop)));
            }
            EngineEvent::Failed(error) => return Err(error.into()),
        }
        Ok(change)
    }

    fn object(&self, choices: Vec<Value>) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.params.model,
            "system_fingerprint": null,
            "choices": choices,
        })
    }

    /// Returns a choice as JSON: a whole one, or a change of it.
    fn choice(&self, index: usize, change: &Change) -> Value {
        let mut choice = json!({"index": index, "text": change.text, "logprobs": null, "finish_reason": null});
        if let Some(logprobs) = change.logprobs.as_ref().filter(|_| self.logprobs.is_some()) {
            choice["logprobs"] = logprobs.json();
        }
        if let Some((reason, stop)) = &change.finish {
            choice["finish_reason"] = Value::from(*reason);
            choice["stop_reason"] = stop.clone();
        }
        if self.params.return_token_ids {
            choice["token_ids"] = json!(change.ids);
            if let Some(ids) = &change.prompt_ids {
                choice["prompt_token_ids"] = json!(ids);
            }
        }
        choice
    }

    /// Returns the whole answer.
    pub(super) fn json(&self, choices: &[Change]) -> Value {
        let choices = choices.iter().enumerate().map(|(index, choice)| self.choice(index, choice));
        let mut object = self.object(choices.collect());
        object["usage"] = self.usage.json();
        object
    }

    fn options(&self) -> StreamOptions {
        self.params.stream.unwrap_or_default()
    }
}

impl ChunkWriter for Completions {
    fn begin(&mut self) -> Vec<Value> {
        Vec::new()
    }

    fn event(&mut self, choice: usize, event: EngineEvent) -> Result<Vec<Value>, ApiError> {
        let change = self.change(choice, event)?;
        if change.is_empty() {
            return Ok(Vec::new());
        }
        let mut chunk = self.object(vec![self.choice(choice, &change)]);
        if self.options().continuous_usage {
            chunk["usage"] = self.usage.json();
        } else if self.options().include_usage {
            chunk["usage"] = Value::Null;
        }
        Ok(vec![chunk])
    }

    fn end(&mut self) -> Vec<Value> {
        if !self.options().include_usage {
            return Vec::new();
        }
        let mut chunk = self.object(Vec::new());
        chunk["usage"] = self.usage.json();
        vec![chunk]
    }
}
