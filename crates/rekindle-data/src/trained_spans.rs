//! Locates the trained tokens of a conversation in the text that its chat template renders.

use std::ops::Range;

use crate::message::Message;
use crate::template::{ChatTemplate, MarkedRendering, REASONING, RenderOptions, STOPPED};

/// A conversation's text, and the positions of some assistant turns in it.
#[derive(Debug, PartialEq)]
pub(crate) struct Conversation {
    pub(crate) text: String,
    pub(crate) turns: Vec<Turn>,
}

/// The assistant's text in one turn.
#[derive(Debug, PartialEq)]
pub(crate) struct Turn {
    /// The index of its message.
    pub(crate) message: usize,
    /// Byte ranges, in order and disjoint; at least one.
    pub(crate) spans: Vec<Range<usize>>,
}

/// A placeholder for a turn's content while its position is searched: private-use characters, which no template
/// rewrites.
const MARK: &str = "\u{f5a3}\u{f1c7}\u{f5a3}";

/// Renders `messages` and locates the assistant's `turns`.
///
/// A template with `{% generation %}` blocks says itself what the assistant's is, see [`by_marks`]. With any other,
/// turn `i` begins where the rendering of `messages[..i]` with the generation prompt ends, which is where a model takes
/// over, and ends where the rendering of `messages[..=i]` ends: its end token is inside, and so is what the template
/// writes after that token before the next turn (ChatML's newline).
///
/// Some templates write a turn differently once others follow it (they drop its reasoning), so that the two renderings
/// are no beginnings of the whole. Then the turn's content is replaced by a mark, which shows what stands before and
/// after it in the whole; see [`span_by_mark`].
pub(crate) fn locate(
    template: &ChatTemplate,
    messages: &[Message],
    turns: &[usize],
    options: &RenderOptions,
) -> Result<Conversation, String> {
    if template.has_marks() {
        return by_marks(template, messages, turns, options);
    }
    let text = template.try_render(messages, options).map_err(failed(template))?;
    let messages = &without_dropped_text(template, messages, &text, options);
    let mut located: Vec<Turn> = Vec::new();
    let mut end = 0;
    for &turn in turns {
        let span = span(template, messages, turn, &text, options)
            .map_err(|reason| format!("cannot find messages[{turn}] in the chat template's output: {reason}"))?;
        if end > span.start {
            return Err(format!("the chat template mixes messages[{turn}] with the assistant turn before it"));
        }
        end = span.end;
        located.push(Turn { message: turn, spans: vec![span] });
    }
    Ok(Conversation { text, turns: located })
}

/// Returns the turns of a template that marks them.
///
/// Templates usually have one block for each assistant turn. If there are more or fewer, turn `i` has the blocks that
/// the rendering of `messages[..=i]` adds to that of the assistant turn before.
fn by_marks(
    template: &ChatTemplate,
    messages: &[Message],
    turns: &[usize],
    options: &RenderOptions,
) -> Result<Conversation, String> {
    let MarkedRendering { text, spans } = template.try_render_marked(messages, options).map_err(failed(template))?;
    let assistant: Vec<usize> = (0..messages.len()).filter(|&turn| messages[turn].is_assistant()).collect();
    let ends: Vec<usize> = if spans.len() == assistant.len() {
        (1..=spans.len()).collect()
    } else {
        let count =
            |&turn: &usize| template.try_render_marked(&messages[..=turn], options).map(|part| part.spans.len());
        assistant.iter().map(count).collect::<Result<_, _>>().map_err(failed(template))?
    };
    if !ends.is_sorted() || ends.last() != Some(&spans.len()) {
        return Err(format!(
            "cannot match the {} {{% generation %}} blocks of the chat template to the assistant turns",
            spans.len()
        ));
    }
    let starts = std::iter::once(0).chain(ends.iter().copied());
    let all = assistant.iter().zip(starts.zip(&ends)).filter(|(turn, _)| turns.contains(turn));
    let located = all.map(|(&message, (start, &end))| match &spans[start..end] {
        [] => Err(format!("the chat template marks nothing of messages[{message}] with {{% generation %}}")),
        spans => Ok(Turn { message, spans: spans.to_vec() }),
    });
    let turns = located.collect::<Result<_, _>>()?;
    Ok(Conversation { text, turns })
}

/// Returns the messages without the text of calls that the template drops once an answer follows (gpt-oss). It would be
/// in the rendering of the messages up to such a call, and of those up to the answer.
fn without_dropped_text(
    template: &ChatTemplate,
    messages: &[Message],
    text: &str,
    options: &RenderOptions,
) -> Vec<Message> {
    let mut messages = messages.to_vec();
    for turn in 0..messages.len() {
        let message = &messages[turn];
        let calls = message.extra.get("tool_calls").is_some_and(|calls| !calls.is_null());
        let reasons = REASONING.iter().any(|&name| message.extra.contains_key(name));
        if !calls || (message.text().is_empty() && !reasons) {
            continue;
        }
        let mut without = messages.clone();
        without[turn].content = Some(String::new());
        for name in REASONING {
            without[turn].extra.shift_remove(name);
        }
        if template.try_render(&without, options).is_ok_and(|rendering| rendering == text) {
            messages = without;
        }
    }
    messages
}

fn failed(template: &ChatTemplate) -> impl Fn(String) -> String {
    move |error| match error.contains(STOPPED) {
        true => format!("the chat template {} was stopped: {error}", template.origin()),
        false => format!("the chat template failed: {error}"),
    }
}

fn span(
    template: &ChatTemplate,
    messages: &[Message],
    turn: usize,
    text: &str,
    options: &RenderOptions,
) -> Result<Range<usize>, String> {
    // A template may refuse an incomplete conversation; then the mark decides.
    let prompt = template.try_render(&messages[..turn], &with_generation_prompt(options)).ok();
    let up_to = template.try_render(&messages[..=turn], options).ok();
    if let (Some(prompt), Some(up_to)) = (&prompt, &up_to)
        && up_to.len() > prompt.len()
        && up_to.starts_with(prompt)
        && text.starts_with(up_to)
    {
        return Ok(prompt.len()..up_to.len());
    }
    let marked = Surroundings::new(template, messages, turn, text, options)?;
    span_by_mark(template, messages, turn, text, options, prompt.as_deref(), &marked)
}

/// Returns the span of a turn whose content is between `marked.before` and `marked.after` in the rendering.
///
/// - It begins at the end of the longest common prefix of the prompt and `before`, if the prompt differs from the whole
///   only in the opening of the turn; else at the content.
/// - It ends after the text that the rendering of `messages[..=turn]` adds after the content, as far as the whole has
///   it too.
fn span_by_mark(
    template: &ChatTemplate,
    messages: &[Message],
    turn: usize,
    text: &str,
    options: &RenderOptions,
    prompt: Option<&str>,
    marked: &Surroundings,
) -> Result<Range<usize>, String> {
    let before = marked.before.as_str();
    let history = template.try_render(&messages[..turn], options).ok();
    let start = match (prompt, history) {
        (Some(prompt), Some(history)) if before.starts_with(&history) && prompt.starts_with(&history) => {
            common_prefix(prompt, before)
        }
        _ => before.len(),
    };
    let content_end = text.len() - marked.after.len();
    let ending = template
        .try_render(&with_mark(&messages[..=turn], turn), options)
        .map_err(|error| format!("it cannot be rendered as the last message: {error}"))?;
    let (_, ending) = ending.split_once(MARK).ok_or("it is not rendered when it is the last message")?;
    let ending = ending.strip_prefix(marked.joint.as_str()).unwrap_or(ending);
    let end = content_end + common_prefix(ending, &marked.after);
    if start < end { Ok(start..end) } else { Err("none of it is rendered".to_owned()) }
}

/// The text around a turn's content in the rendering of the whole.
struct Surroundings {
    before: String,
    after: String,
    /// The text between a content and the calls after it, which templates omit for an empty content.
    joint: String,
}

impl Surroundings {
    fn new(
        template: &ChatTemplate,
        messages: &[Message],
        turn: usize,
        text: &str,
        options: &RenderOptions,
    ) -> Result<Self, String> {
        let marked = template
            .try_render(&with_mark(messages, turn), options)
            .map_err(|error| format!("its place could not be marked: {error}"))?;
        let parts: Vec<&str> = marked.split(MARK).collect();
        let &[before, after] = parts.as_slice() else {
            return Err(format!("its content is rendered {} times", parts.len() - 1));
        };
        let rest = text.strip_prefix(before).unwrap_or_default();
        let joint = match after.strip_suffix(rest) {
            Some(joint) if messages[turn].text().trim().is_empty() => joint,
            _ => "",
        };
        let after = &after[joint.len()..];
        if before.len() + after.len() > text.len() || !text.starts_with(before) || !text.ends_with(after) {
            return Err("the text around it depends on its content".to_owned());
        }
        Ok(Surroundings { before: before.to_owned(), after: after.to_owned(), joint: joint.to_owned() })
    }
}

fn with_mark(messages: &[Message], turn: usize) -> Vec<Message> {
    let mut messages = messages.to_vec();
    messages[turn].content = Some(MARK.to_owned());
    messages
}

fn with_generation_prompt(options: &RenderOptions) -> RenderOptions {
    RenderOptions { add_generation_prompt: true, ..options.clone() }
}

/// Returns the length in bytes of the longest common prefix, on a character boundary.
fn common_prefix(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

#[cfg(test)]
mod tests;
