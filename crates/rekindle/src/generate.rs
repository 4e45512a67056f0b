//! Generation of tokens and of text.

use std::time::{Duration, Instant};

use rekindle_data::Tokenizer;
use rekindle_engine::{Engine, EngineModel, Event, FinishReason, Request};
use rekindle_models::{GenerationConfig, StopReason};

use crate::answer::Answer;
use crate::{Error, Model, TextStream};

/// The result of [`Model::generate`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, including an end token.
    pub ids: Vec<u32>,
    /// The reason for the end.
    pub stop: StopReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// The time until the first new token, including the forward pass over the prompt.
    pub first_token: Duration,
    /// The total time.
    pub time: Duration,
}

/// The result of [`Model::generate_text`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GeneratedText {
    /// The new text, without special tokens, up to the end token or the stop string.
    pub text: String,
    /// The stop string that ended it.
    pub stop_string: Option<String>,
    /// Its tokens, including those of a stop string.
    pub generated: Generated,
}

impl Generated {
    /// Returns new tokens per second after the first one; `None` if there is only one.
    pub fn tokens_per_second(&self) -> Option<f64> {
        let seconds = (self.time - self.first_token).as_secs_f64();
        (self.ids.len() > 1 && seconds > 0.0).then(|| (self.ids.len() - 1) as f64 / seconds)
    }
}

impl GeneratedText {
    /// Returns the reason for the end: `"end_token"`, `"stop_string"`, `"length"` or `"caller"`.
    pub fn stop_reason(&self) -> &'static str {
        if self.stop_string.is_some() { "stop_string" } else { self.generated.stop.name() }
    }
}

impl Model {
    /// Continues `prompt` token by token, until `on_token` returns false.
    ///
    /// # Errors
    /// [`Error::Model`] for a prompt that is empty, too long or beyond the vocabulary, and for logits that are not
    /// finite.
    pub fn generate(
        &self,
        prompt: &[u32],
        config: &GenerationConfig,
        mut on_token: impl FnMut(u32) -> bool,
    ) -> Result<Generated, Error> {
        let (start, mut first_token) = (Instant::now(), None);
        let (ids, stop) = self.causal_lm().generate(prompt, config, |id| {
            first_token.get_or_insert_with(|| start.elapsed());
            on_token(id)
        })?;
        let time = start.elapsed();
        let first_token = first_token.unwrap_or(time);
        Ok(Generated { ids, stop, prompt_tokens: prompt.len(), first_token, time })
    }

    /// Continues `prompt` with text, until an end token, one of the strings `stop`, or until `on_text` returns false.
    /// `on_text` receives each piece of text as soon as it is final. The pieces are [`GeneratedText::text`], except for
    /// bytes that turn out to be invalid UTF-8 later.
    ///
    /// A stop string is removed exactly, even if it begins or ends within a token. A stop string that is a special
    /// token, such as `<|im_end|>`, acts as an end token. Only new text is searched.
    ///
    /// # Errors
    /// As [`generate`](Self::generate); [`Error::Argument`] for a stop string that is empty or contains a special
    /// token, [`Error::Data`] if the tokenizer's decoder fails.
    pub fn generate_text(
        &self,
        tokenizer: &Tokenizer,
        prompt: &[u32],
        config: &GenerationConfig,
        stop: &[String],
        mut on_text: impl FnMut(&str) -> bool,
    ) -> Result<GeneratedText, Error> {
        let (stream, stop_ids) = TextStream::new(tokenizer, stop)?;
        let mut config = config.clone();
        config.eos_ids.extend(stop_ids);
        let (mut answer, mut failure) = (Answer::new(prompt.len(), Some((tokenizer, stream))), None);
        let (_, stop) = self.causal_lm().generate(prompt, &config, |id| match answer.push(id, &config.eos_ids) {
            Ok(piece) => (piece.is_empty() || on_text(&piece)) && !answer.is_stopped(),
            Err(error) => {
                failure = Some(error);
                false
            }
        })?;
        match failure {
            Some(error) => Err(error),
            None => answer.finish(stop, |rest| {
                on_text(rest);
            }),
        }
    }
}

/// Continues `prompt` on an engine as [`Model::generate_text`] does without one. The engine keeps the keys and values of
/// prompt and text, so a later prompt that begins with them computes only the rest.
///
/// # Errors
/// As [`Model::generate_text`]; [`Error::Argument`] for an engine that has other requests, whose events would be lost.
pub fn generate_text_on<M: EngineModel>(
    engine: &mut Engine<M>,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    config: &GenerationConfig,
    stop: &[String],
    mut on_text: impl FnMut(&str) -> bool,
) -> Result<GeneratedText, Error> {
    if engine.has_work() {
        return Err(Error::Argument("the engine has other requests; run it until they are complete".to_owned()));
    }
    let (stream, stop_ids) = TextStream::new(tokenizer, stop)?;
    let stop_ids = [config.eos_ids.as_slice(), &stop_ids].concat();
    let mut answer = Answer::new(prompt.len(), Some((tokenizer, stream)));
    let id = engine.submit(request(prompt.to_vec(), config, &stop_ids))?;
    loop {
        for event in engine.step() {
            match event {
                Event::Token { token, .. } => {
                    let piece = answer.push(token.id, &stop_ids)?;
                    if !(piece.is_empty() || on_text(&piece)) || answer.is_stopped() {
                        engine.abort(id);
                    }
                }
                Event::Finished { reason, .. } => {
                    return answer.finish(stop_reason(reason), |rest| {
                        on_text(rest);
                    });
                }
                Event::Failed { error, .. } => return Err(error.into()),
                Event::Prompt { .. } => {}
            }
        }
    }
}

/// Returns a request that continues a prompt with these settings.
pub(crate) fn request(prompt: Vec<u32>, config: &GenerationConfig, stop_ids: &[u32]) -> Request {
    Request {
        max_tokens: config.max_new_tokens,
        sampling: config.sampling(),
        stop_ids: stop_ids.to_vec(),
        ..Request::new(prompt)
    }
}

/// Returns the reason for the end of an answer.
pub(crate) fn stop_reason(reason: FinishReason) -> StopReason {
    match reason {
        FinishReason::Stop(_) => StopReason::EndToken,
        FinishReason::Length => StopReason::Length,
        FinishReason::Aborted => StopReason::Caller,
    }
}
