//! Generation for many prompts at once.

use std::collections::HashMap;

use rekindle_data::Tokenizer;
use rekindle_engine::{Engine, EngineConfig, Event, RequestId};
use rekindle_models::GenerationConfig;

use crate::answer::Answer;
use crate::generate::{request, stop_reason};
use crate::{Error, GeneratedText, Model, TextStream};

/// Prompts that the engine holds for each one that runs, so that it never waits for new ones.
const AHEAD: usize = 2;

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
        let mut pending: HashMap<RequestId, (usize, Answer<'_>)> = HashMap::new();
        let mut stop_ids = config.eos_ids.clone();
        if let Some(tokenizer) = tokenizer {
            stop_ids.extend(TextStream::new(tokenizer, stop)?.1);
        }
        loop {
            while pending.len() < AHEAD * limits.max_sequences {
                let Some((index, prompt)) = prompts.next() else { break };
                let stream = tokenizer.map(|tokenizer| TextStream::new(tokenizer, stop)).transpose()?;
                let answer = Answer::new(prompt.len(), tokenizer.zip(stream.map(|(stream, _)| stream)));
                let id = engine.submit(request(prompt, &seeded(index), &stop_ids))?;
                pending.insert(id, (index, answer));
            }
            if pending.is_empty() {
                return Ok(());
            }
            for event in engine.step() {
                let id = event.request();
                match event {
                    Event::Token { token, .. } => {
                        let Some((_, answer)) = pending.get_mut(&id) else { continue };
                        answer.push(token.id, &stop_ids)?;
                        if answer.is_stopped() {
                            engine.abort(id);
                        }
                    }
                    Event::Finished { reason, .. } => {
                        let Some((index, answer)) = pending.remove(&id) else { continue };
                        if !on_answer(index, answer.finish(stop_reason(reason), |_| ())?)? {
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
