//! The ids and labels of a conversation.

use std::ops::Range;

use serde_json::{Map, Value};

use super::{Parts, border, label, prepare, shown, text_error};
use crate::example::{IGNORED, RowNotes};
use crate::mask::{self, NotShown, Thinking, TrainOn};
use crate::message::Message;
use crate::options::EncodeOptions;
use crate::template::{ChatTemplate, REASONING, RenderOptions};
use crate::tokenizer::{NamedTemplate, Tokenized, Tokenizer};
use crate::trained_spans::{self, Conversation, Turn};

/// Encodes the rendered conversation, without adding special tokens again.
///
/// - The loss covers a token if any part of it is in a trained turn, as located by [`trained_spans::locate`]; with a template
///   that marks turns by `{% generation %}`, this equals transformers' `assistant_masks`. With other templates, a token
///   that would span the generation prompt and a trained turn is split, as in [`border::split`].
/// - Every trained assistant turn must end with an end token, so that the model learns to stop: only white space may
///   follow its last special token, which is one that ends a generation, or the one with which the template ends turns.
///   The loss covers it with the turn. If the last turn ends so, earlier turns may end with a special token at which
///   generation does not stop (gpt-oss: `<|end|>`, and `<|return|>` after the last turn). The loss leaves that token out,
///   unless the template marks it as the assistant's.
///
/// Errors: a template that fails or does not reveal the place of a turn; a turn without an end token; two BOS at the
/// beginning; a part of the row that the template omits.
pub(super) fn encode(
    tokenizer: &Tokenizer,
    mut messages: Vec<Message>,
    trained_from: usize,
    tools: Option<Value>,
    kwargs: Map<String, Value>,
    options: &EncodeOptions,
) -> Result<Parts, String> {
    let named = tokenizer.named_template(options.chat_template.as_deref(), tools.is_some()).map_err(text_error)?;
    let template = named.template()?;
    let weights = mask::take_weights(&mut messages)?;
    if options.thinking == Thinking::Strip {
        mask::strip_reasoning(&mut messages)?;
    }
    let turns = mask::turns(&messages, trained_from, options.train_on);
    let render = RenderOptions { add_generation_prompt: false, tools, kwargs };
    prepare::settle(template, &mut messages, &render);
    let Conversation { text, turns } = trained_spans::locate(template, &messages, &turns, &render)?;
    let trained_turns: Vec<usize> = turns.iter().map(|turn| turn.message).filter(|&turn| weights[turn]).collect();
    let encoded = tokenizer.encode_with_places(&text, false).map_err(text_error)?;
    let starts = turns.iter().filter(|turn| weights[turn.message] && !template.has_marks());
    let starts = starts.filter_map(|turn| turn.spans.first()).map(|span| span.start);
    let (encoded, joined) = border::split(tokenizer, &text, encoded, starts)?;
    if let [first, second, ..] = &*encoded.ids
        && first == second
        && Some(*first) == tokenizer.bos_id()
    {
        return Err(
            "begins with two BOS tokens: the chat template writes one, and the messages another; remove it from the \
             messages"
                .to_owned(),
        );
    }
    let inner_ends = inner_ends(tokenizer, named, &encoded, &text, &turns)?;
    let left_out = shown::left_out(template, &messages, &trained_turns, &render, &text);
    if !left_out.is_empty() && options.not_shown == NotShown::Error {
        return Err(not_shown(named, &left_out));
    }
    let (mut trained, mut ignored) = (Vec::new(), Vec::new());
    for turn in &turns {
        for span in &turn.spans {
            let thought = match options.thinking {
                Thinking::Mask => mask::thought_end(&text[span.clone()]).unwrap_or(0),
                Thinking::Keep | Thinking::Strip => 0,
            };
            let start = if weights[turn.message] { span.start + thought } else { span.end };
            ignored.push(span.start..start);
            let end = inner_ends.iter().find(|end| span.contains(*end) && !template.has_marks());
            trained.push(start..end.map_or(span.end, |&end| end.max(start)));
        }
    }
    let counts = |place: &Option<Range<usize>>| match (place, options.train_on) {
        (None, _) => false,
        (Some(place), TrainOn::All) => overlaps(place, &trained) || !begins_in(place, &ignored),
        (Some(place), TrainOn::Assistant | TrainOn::LastAssistant) => overlaps(place, &trained),
    };
    let labels = encoded.ids.iter().zip(&encoded.places);
    let labels = labels.map(|(&id, place)| if counts(place) { label(id) } else { IGNORED }).collect();
    Ok((encoded.ids, labels, RowNotes { joined, not_shown: !left_out.is_empty() }))
}

/// Returns true if a part of a token is in one of the spans.
fn overlaps(place: &Range<usize>, spans: &[Range<usize>]) -> bool {
    spans.iter().any(|span| span.contains(&place.start) || (place.start < span.start && span.start < place.end))
}

fn begins_in(place: &Range<usize>, spans: &[Range<usize>]) -> bool {
    spans.iter().any(|span| span.contains(&place.start))
}

fn not_shown(named: &NamedTemplate, left_out: &[String]) -> String {
    let (first, more) = left_out.split_at(left_out.len().min(3));
    let more = if more.is_empty() { String::new() } else { format!(" and {} more", more.len()) };
    let is_reasoning = |part: &String| {
        part.starts_with(shown::REASONING_OF) || REASONING.iter().any(|name| part.ends_with(&format!(".{name}")))
    };
    let strip = match left_out.iter().all(is_reasoning) {
        true => "data.thinking = \"strip\" to train answers without reasoning, ",
        false => "",
    };
    format!(
        "the chat template {} does not render {}{more}; use a template that does, or set {strip}data.not_shown = \
         \"drop\" to drop such rows or \"allow\" to train them without it",
        named.path.display(),
        first.join(", ")
    )
}

/// Returns the token with which the template ends the assistant's turns, which may differ from the end tokens of
/// generation.
pub(crate) fn end_of_turn(tokenizer: &Tokenizer, template: &ChatTemplate) -> Option<u32> {
    let messages = [Message::new("user", "Q"), Message::new("assistant", "A")];
    let Conversation { text, turns } =
        trained_spans::locate(template, &messages, &[1], &RenderOptions::default()).ok()?;
    let encoded = tokenizer.encode_with_places(&text, false).ok()?;
    last_special(tokenizer, &encoded, &text, turns.first()?).map(|(id, _)| id)
}

/// Returns the special token that ends a turn, ignoring white space, and its position.
fn last_special(tokenizer: &Tokenizer, encoded: &Tokenized, text: &str, turn: &Turn) -> Option<(u32, usize)> {
    let span = turn.spans.last()?;
    let tokens = encoded.ids.iter().zip(&encoded.places).rev();
    let mut inside =
        tokens.filter_map(|(&id, place)| Some((id, place.clone()?))).filter(|(_, p)| span.contains(&p.start));
    let (id, place) = inside.find(|&(id, _)| tokenizer.is_special(id))?;
    // The span of an inner turn may end within the token, if the last turn's token begins with the same characters.
    let rest = text.get(place.end..span.end.max(place.end))?;
    rest.trim().is_empty().then_some((id, place.start))
}

/// Returns the positions of the special tokens that end turns before the last and at which generation does not stop.
///
/// # Errors
/// A turn without an end token, or a last turn whose end token does not end a generation.
fn inner_ends(
    tokenizer: &Tokenizer,
    named: &NamedTemplate,
    encoded: &Tokenized,
    text: &str,
    turns: &[Turn],
) -> Result<Vec<usize>, String> {
    let stops = |id: u32| tokenizer.eos_ids().contains(&id) || tokenizer.end_of_turn_of(named) == Some(id);
    let ends: Vec<Option<(u32, usize)>> =
        turns.iter().map(|turn| last_special(tokenizer, encoded, text, turn)).collect();
    let last_stops = ends.last().is_some_and(|end| end.is_some_and(|(id, _)| stops(id)));
    let mut inner = Vec::new();
    for (turn, end) in turns.iter().zip(ends) {
        match end {
            Some((id, _)) if stops(id) => {}
            Some((_, start)) if last_stops => inner.push(start),
            // The token that ends it has nothing in common with the last turn's, so it is outside the span.
            None if last_stops && next_special(tokenizer, encoded, text, turn).is_some_and(|id| !stops(id)) => {}
            end => return Err(no_end(tokenizer, named, turn, end.map(|(id, _)| id))),
        }
    }
    Ok(inner)
}

/// Returns the special token that follows a turn, ignoring white space.
fn next_special(tokenizer: &Tokenizer, encoded: &Tokenized, text: &str, turn: &Turn) -> Option<u32> {
    let span = turn.spans.last()?;
    let tokens = encoded.ids.iter().zip(&encoded.places).filter_map(|(&id, place)| Some((id, place.clone()?)));
    let (id, place) = tokens.filter(|(_, p)| p.start >= span.end).find(|&(id, _)| tokenizer.is_special(id))?;
    text[span.end..place.start].trim().is_empty().then_some(id)
}

fn no_end(tokenizer: &Tokenizer, named: &NamedTemplate, turn: &Turn, last: Option<u32>) -> String {
    let message = turn.message;
    let from = named.path.display();
    let ends: Vec<String> = tokenizer.eos_ids().iter().filter_map(|&id| tokenizer.id_to_token(id)).collect();
    let found = match last.and_then(|id| tokenizer.id_to_token(id)) {
        Some(token) => format!("ends messages[{message}] (assistant) with {token}"),
        None => format!("ends messages[{message}] (assistant) without an end token"),
    };
    let marks = named.template().is_ok_and(ChatTemplate::has_marks);
    let way_out = match (ends.is_empty(), marks) {
        (true, _) => "the checkpoint names none: put eos_token into its tokenizer_config.json".to_owned(),
        (false, true) => format!("put {} before {{% endgeneration %}}", ends.join(" or ")),
        (false, false) => format!(
            "let it write {} after every assistant turn, or train the last turn alone with data.train_on = \
             \"last_assistant\" where that one ends so",
            ends.join(" or ")
        ),
    };
    format!("the chat template {from} {found}, so the model would not learn to stop; {way_out}")
}
