//! Text from tokens that arrive one by one.

use rekindle_data::{StreamDecoder, Tokenizer};

use crate::Error;
use crate::stop_strings::StopStrings;

/// The text of new tokens, in pieces that are final: incomplete characters and possible beginnings of stop strings are
/// held back. Special tokens are not shown.
///
/// ```no_run
/// # fn main() -> Result<(), rekindle::Error> {
/// # let tokenizer = rekindle::Tokenizer::from_dir("model".as_ref())?;
/// let (mut stream, stop_ids) = rekindle::TextStream::new(&tokenizer, &["\n\n".to_owned()])?;
/// for id in [15, 27, 9] {
///     let piece = stream.push(id)?;
///     print!("{}", piece.text);
///     if piece.stop.is_some() || stop_ids.contains(&id) {
///         return Ok(());
///     }
/// }
/// print!("{}", stream.finish()?.text);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct TextStream<'a> {
    decoder: StreamDecoder<'a>,
    stops: StopStrings,
}

/// The next part of a text.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TextPiece {
    /// Text that is final; it may be empty.
    pub text: String,
    /// The stop string that begins after `text`, if one is complete. The text ends there.
    pub stop: Option<String>,
}

impl<'a> TextStream<'a> {
    /// Returns a stream that ends at the strings `stop`, and the ids of those of them that are special tokens, which no
    /// text contains: they must end the generation as end tokens do.
    ///
    /// # Errors
    /// [`Error::Argument`] for a stop string that is empty or contains a special token among other text.
    pub fn new(tokenizer: &'a Tokenizer, stop: &[String]) -> Result<(Self, Vec<u32>), Error> {
        let (stops, ids) = StopStrings::new(tokenizer, stop)?;
        Ok((Self { decoder: tokenizer.stream_decoder(true), stops }, ids))
    }

    /// Returns the stream with special tokens in its text. Nothing may have been added yet.
    #[must_use]
    pub fn with_special_tokens(self, tokenizer: &'a Tokenizer) -> Self {
        Self { decoder: tokenizer.stream_decoder(false), ..self }
    }

    /// Adds a token; returns the text that has become final.
    ///
    /// # Errors
    /// [`Error::Data`] if the tokenizer's decoder fails.
    pub fn push(&mut self, id: u32) -> Result<TextPiece, Error> {
        let piece = self.decoder.push(id)?.unwrap_or_default();
        let (text, stop) = self.stops.push(&piece);
        Ok(TextPiece { text, stop })
    }

    /// Returns the text that was held back, with `U+FFFD` for incomplete characters.
    ///
    /// # Errors
    /// [`Error::Data`] if the tokenizer's decoder fails.
    pub fn finish(self) -> Result<TextPiece, Error> {
        let Self { decoder, mut stops } = self;
        let (mut text, stop) = stops.push(&decoder.finish()?.unwrap_or_default());
        if stop.is_none() {
            text += &stops.finish();
        }
        Ok(TextPiece { text, stop })
    }
}
