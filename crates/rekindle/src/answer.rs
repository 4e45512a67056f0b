//! The answer to a prompt while its tokens arrive.

use std::time::{Duration, Instant};

use rekindle_data::Tokenizer;
use rekindle_models::StopReason;

use crate::{Error, Generated, GeneratedText, TextStream};

/// An answer that is being generated.
pub(crate) struct Answer<'t> {
    prompt_tokens: usize,
    start: Instant,
    first_token: Option<Duration>,
    ids: Vec<u32>,
    /// The text, if there is a tokenizer.
    text: Option<AnswerText<'t>>,
}

/// The text of an answer.
struct AnswerText<'t> {
    tokenizer: &'t Tokenizer,
    stream: TextStream<'t>,
    text: String,
    stop_string: Option<String>,
}

impl<'t> Answer<'t> {
    /// Returns an answer without tokens, whose time begins now.
    pub(crate) fn new(prompt_tokens: usize, text: Option<(&'t Tokenizer, TextStream<'t>)>) -> Self {
        let text =
            text.map(|(tokenizer, stream)| AnswerText { tokenizer, stream, text: String::new(), stop_string: None });
        Self { prompt_tokens, start: Instant::now(), first_token: None, ids: Vec::new(), text }
    }

    /// Adds a token; returns the text that is final with it. Ignores tokens after a stop string.
    pub(crate) fn push(&mut self, id: u32, end_ids: &[u32]) -> Result<String, Error> {
        if self.is_stopped() {
            return Ok(String::new());
        }
        self.first_token.get_or_insert_with(|| self.start.elapsed());
        self.ids.push(id);
        // An end token that the vocabulary does not call special would be shown.
        let Some(text) = self.text.as_mut().filter(|_| !end_ids.contains(&id)) else { return Ok(String::new()) };
        let piece = text.stream.push(id)?;
        text.text += &piece.text;
        text.stop_string = piece.stop;
        Ok(piece.text)
    }

    /// Returns true if a stop string has ended the answer.
    pub(crate) fn is_stopped(&self) -> bool {
        self.text.as_ref().is_some_and(|text| text.stop_string.is_some())
    }

    /// Returns the complete answer. `on_text` receives the text that was held back.
    pub(crate) fn finish(self, stop: StopReason, mut on_text: impl FnMut(&str)) -> Result<GeneratedText, Error> {
        let Self { prompt_tokens, start, first_token, ids, text } = self;
        let (text, stop_string) = match text {
            Some(text) => text.finish(&ids, stop, &mut on_text)?,
            None => (String::new(), None),
        };
        let time = start.elapsed();
        let generated = Generated { ids, stop, prompt_tokens, first_token: first_token.unwrap_or(time), time };
        Ok(GeneratedText { text, stop_string, generated })
    }
}

impl AnswerText<'_> {
    fn finish(
        self,
        ids: &[u32],
        stop: StopReason,
        on_text: &mut impl FnMut(&str),
    ) -> Result<(String, Option<String>), Error> {
        let Self { tokenizer, stream, text, stop_string } = self;
        if stop_string.is_some() {
            return Ok((text, stop_string));
        }
        let rest = stream.finish()?;
        if !rest.text.is_empty() && stop != StopReason::Caller {
            on_text(&rest.text);
        }
        if rest.stop.is_some() {
            return Ok((text + &rest.text, rest.stop));
        }
        let end = usize::from(stop == StopReason::EndToken);
        Ok((tokenizer.decode(&ids[..ids.len() - end], true)?, None))
    }
}
