//! The engine's thread, and the text of its tokens.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use rekindle::engine::{
    AdapterChoice, Engine, EngineConfig, EngineHandle, Error as RunError, Event, FinishReason as End, NewToken,
    Request, SamplingParams, TokenLogProb, TokenMask,
};
use rekindle::{Error, Model, TextPiece, TextStream, Tokenizer};
use rekindle_serve::{
    EngineError, EngineErrorKind, EngineEvent, EngineRequest, EngineStats, EventSink, FinishReason, RequestId,
    Sampling, StopMatch, TokenConstraint, TokenLogprob,
};

use super::invalid;

/// An engine on its thread.
pub(super) struct Worker {
    handle: EngineHandle<Model>,
    tokenizer: &'static Tokenizer,
    end_tokens: Vec<u32>,
    vocab_size: usize,
}

impl Worker {
    /// Moves a model to a new thread.
    pub(super) fn start(
        model: Model,
        tokenizer: &'static Tokenizer,
        end_tokens: Vec<u32>,
        config: EngineConfig,
    ) -> Result<Self, RunError> {
        let vocab_size = model.causal_lm().config().vocab_size();
        let handle = EngineHandle::spawn(Engine::new(model, config)?)?;
        Ok(Self { handle, tokenizer, end_tokens, vocab_size })
    }

    /// Queues a request; `user` is kept until its end.
    pub(super) fn submit(
        &self,
        request: EngineRequest,
        events: EventSink,
        user: Option<Arc<()>>,
    ) -> Result<RequestId, EngineError> {
        let EngineRequest { n, stops, .. } = &request;
        let mut ends = if stops.ignore_eos { Vec::new() } else { self.end_tokens.clone() };
        ends.extend_from_slice(&stops.ids);
        let mut texts = Vec::new();
        for _ in 0..*n {
            let (text, ids) = TextStream::new(self.tokenizer, &stops.strings).map_err(invalid)?;
            let text = if request.skip_special_tokens { text } else { text.with_special_tokens(self.tokenizer) };
            if texts.is_empty() {
                ends.extend(ids);
            }
            texts.push(Some(text));
        }
        let mut receiver = Receiver {
            events,
            texts,
            end_tokens: self.end_tokens.clone(),
            stop_ids: stops.ids.clone(),
            ends: ends.clone(),
            include_stop: stops.include_stop,
            logprobs: request.logprobs.is_some(),
            tokenizer: self.tokenizer,
            handle: self.handle.clone(),
            _user: user,
        };
        let vocab_size = self.vocab_size;
        let constraint = request.constraint.map(|inner| Box::new(Constraint { inner, vocab_size }) as _);
        let request = Request {
            n: request.n,
            max_tokens: request.max_tokens,
            sampling: sampling(request.sampling),
            stop_ids: ends,
            min_tokens: request.stops.min_tokens,
            top_log_probs: request.logprobs.unwrap_or(0),
            prompt_log_probs: request.prompt_logprobs,
            adapter: request.adapter.map_or(AdapterChoice::Base, AdapterChoice::Named),
            constraint,
            ..Request::new(request.prompt)
        };
        let id = self.handle.submit_with(request, Box::new(move |event| receiver.receive(event)));
        id.map(|id| RequestId(id.0)).map_err(refusal)
    }

    pub(super) fn abort(&self, id: RequestId) {
        self.handle.abort(rekindle::engine::RequestId(id.0));
    }

    /// Calls `change` with the model between two steps.
    pub(super) fn change<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Model) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, EngineError> {
        self.handle.with_model(change).map_err(refusal)?.map_err(invalid)
    }

    pub(super) fn stats(&self) -> EngineStats {
        let Ok(stats) = self.handle.stats() else { return EngineStats::default() };
        EngineStats {
            running: stats.running,
            waiting: stats.waiting,
            kv_cache_usage: stats.pages_used as f64 / stats.pages.max(1) as f64,
            prefix_cache_queries: stats.prefix_queries,
            prefix_cache_hits: stats.prefix_hits,
            preemptions: stats.preemptions,
        }
    }
}

fn sampling(sampling: Sampling) -> SamplingParams {
    SamplingParams {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
        repetition_penalty: sampling.repetition_penalty,
        presence_penalty: sampling.presence_penalty,
        frequency_penalty: sampling.frequency_penalty,
        logit_bias: sampling.logit_bias,
        seed: sampling.seed.unwrap_or_else(|| RandomState::new().build_hasher().finish()),
    }
}

/// Returns the refusal of a request.
fn refusal(error: RunError) -> EngineError {
    let kind = match &error {
        RunError::QueueFull { .. } => EngineErrorKind::Overloaded,
        RunError::Stopped | RunError::Step(_) => EngineErrorKind::Internal,
        _ => EngineErrorKind::Invalid,
    };
    EngineError::new(kind, error.to_string())
}

/// The receiver of a request's events, on the engine's thread.
struct Receiver {
    events: EventSink,
    /// The text of each sample; `None` after its end.
    texts: Vec<Option<TextStream<'static>>>,
    /// The end tokens of the model.
    end_tokens: Vec<u32>,
    /// The stop ids of the request.
    stop_ids: Vec<u32>,
    /// All tokens that end a sample.
    ends: Vec<u32>,
    include_stop: bool,
    logprobs: bool,
    tokenizer: &'static Tokenizer,
    handle: EngineHandle<Model>,
    _user: Option<Arc<()>>,
}

impl Receiver {
    /// Passes an event on; returns false if nobody waits for it.
    fn receive(&mut self, event: Event) -> bool {
        match event {
            Event::Prompt { tokens, .. } => {
                let tokens =
                    tokens.into_iter().map(|token| token.map(|token| logprob(token.id, token.log_prob, &token.top)));
                self.events.send(0, EngineEvent::Prompt(tokens.collect()))
            }
            Event::Token { request, sample, token } => self.token(request, sample, &token),
            Event::Finished { sample, reason, usage, .. } => self.finished(sample, reason, usage.cached_tokens),
            Event::Failed { sample, error, .. } => self.failed(sample, error.to_string()),
        }
    }

    fn token(&mut self, request: rekindle::engine::RequestId, sample: usize, token: &NewToken) -> bool {
        // After a stop string, tokens may come that were on their way.
        let Some(text) = &mut self.texts[sample] else { return true };
        // A token that ends the text is not part of it.
        let piece = if self.ends.contains(&token.id) { Ok(TextPiece::default()) } else { text.push(token.id) };
        let piece = match piece {
            Ok(piece) => piece,
            Err(error) => {
                self.handle.abort_sample(request, sample);
                return self.failed(sample, error.to_string());
            }
        };
        let logprobs = self.logprobs.then(|| logprob(token.id, token.log_prob, &token.top)).into_iter().collect();
        let mut shown = piece.text;
        if let Some(stop) = piece.stop.as_ref().filter(|_| self.include_stop) {
            shown += stop;
        }
        let mut is_read = self.events.send(sample, EngineEvent::Tokens { text: shown, ids: vec![token.id], logprobs });
        if let Some(stop) = piece.stop {
            self.texts[sample] = None;
            self.handle.abort_sample(request, sample);
            is_read &= self.end(sample, FinishReason::Stop, Some(StopMatch::Text(stop)), 0);
        }
        is_read
    }

    fn finished(&mut self, sample: usize, reason: End, cached_tokens: usize) -> bool {
        let Some(text) = self.texts[sample].take() else { return true };
        let (reason, mut stop) = match reason {
            // The caller has gone.
            End::Aborted => return false,
            End::Length => (FinishReason::Length, None),
            End::Stop(id) if self.end_tokens.contains(&id) => (FinishReason::Stop, None),
            End::Stop(id) if self.stop_ids.contains(&id) => (FinishReason::Stop, Some(StopMatch::Id(id))),
            // A stop string that is a special token.
            End::Stop(id) => (FinishReason::Stop, self.tokenizer.id_to_token(id).map(StopMatch::Text)),
        };
        let piece = match text.finish() {
            Ok(piece) => piece,
            Err(error) => return self.events.send(sample, EngineEvent::Failed(internal(error.to_string()))),
        };
        let mut shown = piece.text;
        // The rest may have a stop string in it.
        stop = piece.stop.map(StopMatch::Text).or(stop);
        if let Some(StopMatch::Text(stop)) = stop.as_ref().filter(|_| self.include_stop) {
            shown += stop;
        }
        if !shown.is_empty() {
            self.events.send(sample, EngineEvent::Tokens { text: shown, ids: Vec::new(), logprobs: Vec::new() });
        }
        self.end(sample, reason, stop, cached_tokens)
    }

    fn end(&mut self, sample: usize, reason: FinishReason, stop: Option<StopMatch>, cached_tokens: usize) -> bool {
        self.events.send(sample, EngineEvent::Finished { reason, stop, cached_tokens })
    }

    fn failed(&mut self, sample: usize, message: String) -> bool {
        match self.texts[sample].take() {
            Some(_) => self.events.send(sample, EngineEvent::Failed(internal(message))),
            None => true,
        }
    }
}

fn internal(message: String) -> EngineError {
    EngineError::new(EngineErrorKind::Internal, message)
}

fn logprob(id: u32, log_prob: f32, top: &[TokenLogProb]) -> TokenLogprob {
    TokenLogprob { id, logprob: log_prob, top: top.iter().map(|token| (token.id, token.log_prob)).collect() }
}

/// A grammar as the engine asks for it.
#[derive(Debug)]
struct Constraint {
    inner: TokenConstraint,
    vocab_size: usize,
}

impl rekindle::engine::TokenConstraint for Constraint {
    fn allowed(&mut self) -> Result<TokenMask, String> {
        Ok(TokenMask::from_words(self.inner.allowed()?, self.vocab_size))
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        self.inner.accept(id)
    }

    fn fork(&self) -> Box<dyn rekindle::engine::TokenConstraint> {
        Box::new(Self { inner: self.inner.clone(), vocab_size: self.vocab_size })
    }
}
