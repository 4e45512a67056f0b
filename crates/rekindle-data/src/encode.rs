use crate::error::Error;
use crate::example::{Encoded, IGNORED, RowNotes};
use crate::mask::TrainOn;
use crate::options::EncodeOptions;
use crate::row::{PromptContent, RowContent};
use crate::tokenizer::{Tokenized, Tokenizer};

mod border;
mod conversation;
mod prepare;
mod shown;

pub(crate) use conversation::end_of_turn;
pub(crate) use prepare::settle;

/// Encodes a row.
///
/// - Messages: see [`conversation::encode`].
/// - Prompt and completion: encoded as one text with the tokenizer's special tokens and the end token, unless the text
///   already ends with it; the loss covers the completion. A token that would span both is split as in [`border::split`].
/// - Text: likewise, and the loss covers everything.
/// - Ids: unchanged.
///
/// A text that begins with the BOS gets no second one.
pub(crate) fn encode(
    content: RowContent,
    line: usize,
    tokenizer: Option<&Tokenizer>,
    options: &EncodeOptions,
) -> Result<Encoded, String> {
    if let RowContent::InputIds { input_ids, labels } = content {
        let labels = labels.unwrap_or_else(|| input_ids.iter().map(|&id| label(id)).collect());
        return Ok(Encoded { input_ids, labels, line, notes: RowNotes::default(), preferred: None });
    }
    let tokenizer = tokenizer.ok_or("this kind of row needs a tokenizer; without one, use rows of \"input_ids\"")?;
    let (input_ids, labels, notes) = match content {
        RowContent::Messages { messages, trained_from, tools, kwargs } => {
            conversation::encode(tokenizer, messages, trained_from, tools, kwargs, options)?
        }
        RowContent::PromptCompletion { prompt, completion } if options.train_on == TrainOn::All => {
            raw_text(tokenizer, "", &(prompt + &completion), true)?
        }
        RowContent::PromptCompletion { prompt, completion } => raw_text(tokenizer, &prompt, &completion, true)?,
        RowContent::Text(text) => raw_text(tokenizer, "", &text, options.text_end_token)?,
        RowContent::InputIds { .. } => unreachable!("returned above"),
    };
    Ok(Encoded { input_ids, labels, line, notes, preferred: None })
}

/// Encodes a prompt, up to the beginning of the assistant's turn in a conversation. The loss covers none of it.
pub(crate) fn encode_prompt(
    content: PromptContent,
    line: usize,
    tokenizer: Option<&Tokenizer>,
    options: &EncodeOptions,
) -> Result<Encoded, String> {
    let needs = "this kind of row needs a tokenizer; without one, use rows of \"prompt_ids\"";
    let input_ids = match content {
        PromptContent::Ids(ids) => ids,
        PromptContent::Text(text) => tokenizer.ok_or(needs)?.encode(&text, true).map_err(text_error)?,
        PromptContent::Chat(mut prompt) => {
            prompt.chat_template.clone_from(&options.chat_template);
            prompt.encode(tokenizer.ok_or(needs)?).map_err(text_error)?
        }
    };
    let labels = vec![IGNORED; input_ids.len()];
    Ok(Encoded { input_ids, labels, line, notes: RowNotes::default(), preferred: None })
}

/// Ids, labels, and notes for the report.
type Parts = (Vec<u32>, Vec<i32>, RowNotes);

/// Encodes plain text; `end` adds the end token.
fn raw_text(tokenizer: &Tokenizer, prompt: &str, completion: &str, end: bool) -> Result<Parts, String> {
    let eos = match tokenizer.eos_id() {
        None if end => {
            return Err("rows of text need an end token, and the checkpoint names none; put eos_token into its \
                        tokenizer_config.json, use rows of \"input_ids\", or set data.text_end_token = false for rows \
                        of \"text\""
                .to_owned());
        }
        eos => eos.filter(|_| end),
    };
    let text = format!("{prompt}{completion}");
    let whole = tokenizer.encode_with_places(&text, true).map_err(text_error)?;
    let (mut encoded, joined) = border::split(tokenizer, &text, whole, [prompt.len()])?;
    let bos = tokenizer.bos_id();
    if let ([first, second, ..], [None, ..]) = (&*encoded.ids, &*encoded.places)
        && first == second
        && Some(*first) == bos
    {
        encoded.ids.remove(0);
        encoded.places.remove(0);
    }
    let (mut ids, mut labels) = masked(encoded, prompt.len());
    if let Some(eos) = eos.filter(|eos| ids.last() != Some(eos)) {
        ids.push(eos);
        labels.push(label(eos));
    }
    Ok((ids, labels, RowNotes { joined, not_shown: false }))
}

/// Returns ids and labels. The loss covers tokens with a part at `from` or later. A token added by the tokenizer counts
/// if it follows a counted token: an end token does, a beginning token does not.
fn masked(encoded: Tokenized, from: usize) -> (Vec<u32>, Vec<i32>) {
    let mut last = false;
    let labels = encoded.ids.iter().zip(&encoded.places).map(|(&id, place)| {
        last = place.as_ref().map_or(last, |place| place.start >= from || place.end > from);
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
