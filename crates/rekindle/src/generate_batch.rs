//! Generation for many prompts at once.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use rekindle_data::Tokenizer;
use rekindle_engine::{Engine, EngineConfig, Event, FinishReason, Request, RequestId};
use rekindle_models::{GenerationConfig, StopReason};

use crate::{Error, Generated, GeneratedText, Model, TextStream};

/// Prompts that the engine holds for each one that runs, so that it never waits for new ones.
const AHEAD: usize = 2;

/// A prompt whose answer is being generated.
struct Pending<'t> {
    /// Its number.
    index: usize,
    prompt_tokens: usize,
    start: Instant,
    first_token: Option<Duration>,
    ids: Vec<u32>,
    /// The text so far, if there is a tokenizer; taken at a stop string.
    stream: Option<TextStream<'t>>,
    text: String,
    stop_string: Option<String>,
}

impl Model {
    /// Returns an engine for this model: many requests at once, with a key/value cache that they share.
    ///
    /// # Errors
    /// [`Error::Engine`] for limits that contradict each other, and when the device has no memory for the cache.
    pub fn engine(&self, config: EngineConfig) -> Result<Engine<&rekindle_models::CausalLm>, Error> {
        Ok(Engine::new(self.causal_lm(), config)?)
    }

    /// Continues many prompts, as [`generate_text`](Self::generate_text) continues one. `on_answer` receives each answer
    /// with the number of its prompt as soon as it is complete, in no fixed order, and returns false to end the
    /// generation.
    ///
    /// The prompt with number i draws with `config.seed + i`, so an answer does not depend on the other prompts. Without
    /// a tokenizer, texts are empty and `stop` must be.
    ///
    /// # Errors
    /// As [`generate_text`](Self::generate_text); the first prompt that fails ends the generation.
    pub fn generate_batch(
        &self,
        tokenizer: Option<&Tokenizer>,
        prompts: impl IntoIterator<Item = (usize, Vec<u32>)>,
        config: &GenerationConfig,
        stop: &[String],
        limits: EngineConfig,
        mut on_answer: impl FnMut(usize, GeneratedText) -> Result<bool, Error>,
    ) -> Result<(), Error> {
        if tokenizer.is_none() && !stop.is_empty() {
            return Err(Error::Argument("stop strings need a tokenizer; use stop ids".to_owned()));
        }
        let seeded = |index: usize| GenerationConfig { seed: config.seed.wrapping_add(index as u64), ..config.clone() };
        let mut prompts = prompts.into_iter();
        let mut engine = self.engine(limits)?;
        let mut pending: HashMap<RequestId, Pending<'_>> = HashMap::new();
        let mut stop_ids = config.eos_ids.clone();
        if let Some(tokenizer) = tokenizer {
            stop_ids.extend(TextStream::new(tokenizer, stop)?.1);
        }
        loop {
            while pending.len() < AHEAD * limits.max_sequences {
                let Some((index, prompt)) = prompts.next() else { break };
                let stream = tokenizer.map(|tokenizer| TextStream::new(tokenizer, stop)).transpose()?;
                let mut one = Pending::new(index, prompt.len());
                one.stream = stream.map(|(stream, _)| stream);
                let request = Request {
                    max_tokens: config.max_new_tokens,
                    sampling: seeded(index).sampling(),
                    stop_ids: stop_ids.clone(),
                    ..Request::new(prompt)
                };
                pending.insert(engine.submit(request)?, one);
            }
            if pending.is_empty() {
                return Ok(());
            }
            for event in engine.step() {
                let request = event.request();
                match event {
                    Event::Token { token, .. } => {
                        let Some(one) = pending.get_mut(&request) else { continue };
                        if one.push(token.id, &stop_ids)? {
                            engine.abort(request);
                        }
                    }
                    Event::Finished { reason, .. } => {
                        let Some(one) = pending.remove(&request) else { continue };
                        let index = one.index;
                        if !on_answer(index, one.finish(tokenizer, reason)?)? {
                            return Ok(());
                        }
                    }
                    Event::Failed { error, .. } => return Err(error.into()),
                    Event::Prompt { .. } => {}
                }
            }
        }
    }
}

impl Pending<'_> {
    fn new(index: usize, prompt_tokens: usize) -> Self {
        Self {
            index,
            prompt_tokens,
            start: Instant::now(),
            first_token: None,
            ids: Vec::new(),
            stream: None,
            text: String::new(),
            stop_string: None,
        }
    }

    /// Adds a token; returns true if a stop string ends the text.
    fn push(&mut self, id: u32, stop_ids: &[u32]) -> Result<bool, Error> {
        if self.stop_string.is_some() {
            return Ok(false);
        }
        self.first_token.get_or_insert_with(|| self.start.elapsed());
        self.ids.push(id);
        // An end token that the vocabulary does not call special would be shown.
        if let Some(stream) = self.stream.as_mut().filter(|_| !stop_ids.contains(&id)) {
            let piece = stream.push(id)?;
            self.text += &piece.text;
            self.stop_string = piece.stop;
        }
        Ok(self.stop_string.is_some())
    }

    fn finish(mut self, tokenizer: Option<&Tokenizer>, reason: FinishReason) -> Result<GeneratedText, Error> {
        let stop = match reason {
            _ if self.stop_string.is_some() => StopReason::Caller,
            FinishReason::Stop(_) => StopReason::EndToken,
            FinishReason::Length => StopReason::Length,
            FinishReason::Aborted => StopReason::Caller,
        };
        if let Some(stream) = self.stream.take().filter(|_| self.stop_string.is_none()) {
            let rest = stream.finish()?;
            self.text += &rest.text;
            self.stop_string = rest.stop;
        }
        if let Some(tokenizer) = tokenizer.filter(|_| self.stop_string.is_none()) {
            let end = usize::from(stop == StopReason::EndToken);
            self.text = tokenizer.decode(&self.ids[..self.ids.len() - end], true)?;
        }
        let time = self.start.elapsed();
        let Self { ids, prompt_tokens, first_token, text, stop_string, .. } = self;
        let generated = Generated { ids, stop, prompt_tokens, first_token: first_token.unwrap_or(time), time };
        Ok(GeneratedText { text, stop_string, generated })
    }
}
