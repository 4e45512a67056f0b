use std::path::Path;

use crate::error::Error;
use crate::row::RowContent;
use crate::spans;
use crate::template::RenderOptions;
use crate::tokenizer::{Tokenized, Tokenizer};

/// The label of a position that does not count in the loss.
pub const IGNORED: i32 = -100;

/// A row as a model takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Example<'a> {
    /// Token ids.
    pub input_ids: &'a [u32],
    /// Beside each id the same id where it is learned, else [`IGNORED`]. `labels[i]` is predicted from the tokens before
    /// `i`; the first never counts.
    pub labels: &'a [i32],
    /// The line of the file that it comes from, counted from 1.
    pub line: usize,
    /// The file.
    pub path: &'a Path,
}

impl Example<'_> {
    /// How many labels count.
    pub fn trained_tokens(&self) -> usize {
        counted(self.labels)
    }
}

/// A row that was just encoded; as [`Example`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Encoded {
    pub(crate) input_ids: Vec<u32>,
    pub(crate) labels: Vec<i32>,
    pub(crate) line: usize,
}

impl Encoded {
    /// How many labels count.
    pub(crate) fn trained_tokens(&self) -> usize {
        counted(&self.labels)
    }
}

fn counted(labels: &[i32]) -> usize {
    labels.iter().skip(1).filter(|&&label| label != IGNORED).count()
}

/// Encodes a row.
///
/// - Messages: the template's text, to which no special tokens are added again; a token counts when it begins inside an
///   assistant turn (see [`spans::locate`]).
/// - Prompt and completion: both as one text with what the tokenizer puts around it and the end token, unless it ends so
///   already; a token counts when it begins in the completion or comes after it.
/// - Text: likewise, and everything counts.
/// - Ids: as given.
pub(crate) fn encode(content: RowContent, line: usize, tokenizer: Option<&Tokenizer>) -> Result<Encoded, String> {
    if let RowContent::InputIds { input_ids, labels } = content {
        let labels = labels.unwrap_or_else(|| input_ids.iter().map(|&id| label(id)).collect());
        return Ok(Encoded { input_ids, labels, line });
    }
    let tokenizer = tokenizer.ok_or("this kind of row needs a tokenizer; only \"input_ids\" does without")?;
    let (input_ids, labels) = match content {
        RowContent::Messages { messages, trained_from, tools, kwargs } => {
            let template = tokenizer.chat_template().map_err(|error| error.to_string())?;
            let options = RenderOptions { add_generation_prompt: false, tools, kwargs };
            let conversation = spans::locate(template, &messages, trained_from, &options)?;
            let encoded = tokenizer.encode_with_starts(&conversation.text, false).map_err(text_error)?;
            masked(encoded, |start| conversation.spans.iter().any(|span| span.contains(&start)))
        }
        RowContent::PromptCompletion { prompt, completion } => raw_text(tokenizer, &prompt, &completion)?,
        RowContent::Text(text) => raw_text(tokenizer, "", &text)?,
        RowContent::InputIds { .. } => unreachable!("returned above"),
    };
    Ok(Encoded { input_ids, labels, line })
}

fn raw_text(tokenizer: &Tokenizer, prompt: &str, completion: &str) -> Result<(Vec<u32>, Vec<i32>), String> {
    let encoded = tokenizer.encode_with_starts(&format!("{prompt}{completion}"), true).map_err(text_error)?;
    let (mut ids, mut labels) = masked(encoded, |start| start >= prompt.len());
    if let Some(eos) = tokenizer.eos_id().filter(|eos| ids.last() != Some(eos)) {
        ids.push(eos);
        labels.push(label(eos));
    }
    Ok((ids, labels))
}

/// Ids and labels, where `counts` decides by where a token begins. What the tokenizer added counts when something that
/// counts stands before it: an end token does, a beginning one does not.
fn masked(encoded: Tokenized, counts: impl Fn(usize) -> bool) -> (Vec<u32>, Vec<i32>) {
    let mut last = false;
    let labels = encoded.ids.iter().zip(&encoded.starts).map(|(&id, start)| {
        last = start.map_or(last, &counts);
        if last { label(id) } else { IGNORED }
    });
    let labels = labels.collect();
    (encoded.ids, labels)
}

fn label(id: u32) -> i32 {
    i32::try_from(id).expect("ids above i32::MAX are refused when a tokenizer or a row is read")
}

fn text_error(error: Error) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests;
