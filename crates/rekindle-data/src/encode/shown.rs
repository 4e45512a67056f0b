//! Detection of parts of a row that a template omits.

use std::collections::BTreeSet;

use serde_json::Value;

use super::prepare::{calls, function};
use crate::mask::thought_end;
use crate::message::Message;
use crate::template::{ChatTemplate, REASONING, RenderOptions};

/// Returns the parts of a conversation that the template omits, such as `messages[1].tool_calls`.
///
/// A mark is inserted into every text of the conversation; a part is rendered if its mark is. Reasoning may be missing,
/// because templates drop that of earlier turns. The reasoning of turns in `trained` must be in the rendering that ends
/// with the turn, where the model would generate it.
pub(super) fn left_out(
    template: &ChatTemplate,
    messages: &[Message],
    trained: &[usize],
    options: &RenderOptions,
    text: &str,
) -> Vec<String> {
    let mut marked = Marked::new(messages, options, text);
    marked.mark_all();
    let Marked { messages: with_marks, options, parts, base, .. } = marked;
    let shown = |messages: &[Message]| {
        template.try_render(messages, &options).ok().map(|rendering| marks_in(&rendering, &base))
    };
    let in_whole = shown(&with_marks);
    let shows_arguments = |of: &str, marks: &BTreeSet<usize>| {
        parts.iter().enumerate().any(|(number, part)| part.name == of && !part.is_callee && marks.contains(&number))
    };
    let mut missing: Vec<String> = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        let is_shown = match (&in_whole, part.reasoning_of) {
            // A template of one function may show its arguments alone.
            (Some(marks), _) if part.is_callee && shows_arguments(&part.name, marks) => true,
            (Some(marks), _) if marks.contains(&number) => true,
            (_, Some(turn)) if !trained.contains(&turn) => true,
            (_, Some(turn)) => shown(&with_marks[..=turn]).is_some_and(|marks| marks.contains(&number)),
            // A template may branch on a text, so that a mark changes the rendering.
            (Some(_), None) => part.text.len() >= TELLING && part.stands_in(text),
            (None, None) => part.stands_in(text),
        };
        if !is_shown && !missing.contains(&part.name) {
            missing.push(part.name.clone());
        }
    }
    missing
}

/// The prefix of the name of a turn whose reasoning is part of its content.
pub(super) const REASONING_OF: &str = "the reasoning of";

/// The length from which a text does not occur in a rendering by chance.
const TELLING: usize = 24;

/// A text of a conversation with its mark.
struct Part {
    name: String,
    /// The turn, if the text is its reasoning.
    reasoning_of: Option<usize>,
    /// True if the text is the name of a called function.
    is_callee: bool,
    text: String,
}

impl Part {
    /// Returns true if the text is in a rendering, verbatim or as JSON.
    fn stands_in(&self, rendering: &str) -> bool {
        let text = self.text.trim();
        let json = Value::from(text).to_string();
        rendering.contains(text) || rendering.contains(&json[1..json.len() - 1])
    }
}

/// A conversation with marks.
struct Marked {
    messages: Vec<Message>,
    options: RenderOptions,
    parts: Vec<Part>,
    /// The digits at the beginning of every mark.
    base: String,
}

/// The number of digits that distinguish marks.
const DIGITS: usize = 6;

impl Marked {
    fn new(messages: &[Message], options: &RenderOptions, text: &str) -> Self {
        // Digits, which no template rewrites or escapes, and which can stand for a number.
        let base = (0..).map(|i| (7_036_874_417_u64 + i).to_string()).find(|base| !text.contains(base.as_str()));
        Marked {
            messages: messages.to_vec(),
            options: options.clone(),
            parts: Vec::new(),
            base: base.expect("a text does not contain all numbers"),
        }
    }

    fn mark_all(&mut self) {
        for turn in 0..self.messages.len() {
            self.mark_content(turn);
            self.mark_reasoning(turn);
            self.mark_calls(turn);
        }
        let mut tools = self.options.tools.take();
        for (index, tool) in tools.iter_mut().filter_map(Value::as_array_mut).flatten().enumerate() {
            if let Some(name) = function(tool).get_mut("name") {
                self.mark_value(name, &format!("tools[{index}]"));
            }
        }
        self.options.tools = tools;
    }

    /// Adds a part; returns its mark.
    fn mark(&mut self, name: String, reasoning_of: Option<usize>, text: &str) -> String {
        let mark = format!("{}{:0DIGITS$}", self.base, self.parts.len());
        self.parts.push(Part { name, reasoning_of, is_callee: false, text: text.to_owned() });
        mark
    }

    fn mark_content(&mut self, turn: usize) {
        let message = &self.messages[turn];
        let Some(content) = message.content.clone() else { return };
        let is_assistant = message.is_assistant();
        let thought = if is_assistant { thought_end(&content).unwrap_or(0) } else { 0 };
        let (thought, answer) = content.split_at(thought);
        let inner = thought.replace("<think>", "").replace("</think>", "");
        let mut marked = thought.to_owned();
        if !inner.trim().is_empty() {
            let mark = self.mark(format!("{REASONING_OF} messages[{turn}]"), Some(turn), inner.trim());
            marked = marked.replacen("</think>", &format!("{mark}</think>"), 1);
        }
        if !answer.trim().is_empty() {
            let name = format!("messages[{turn}].content ({})", self.messages[turn].role);
            let mark = self.mark(name, None, answer.trim());
            marked.push_str(&insert(answer, &mark));
        } else {
            marked.push_str(answer);
        }
        self.messages[turn].content = Some(marked);
    }

    fn mark_reasoning(&mut self, turn: usize) {
        let extra = &self.messages[turn].extra;
        let name = REASONING.into_iter().find(|name| extra.get(*name).is_some_and(|value| !value.is_null()));
        let Some(name) = name.filter(|_| self.messages[turn].is_assistant()) else { return };
        let Some(text) = extra[name].as_str().filter(|text| !text.trim().is_empty()).map(str::to_owned) else { return };
        let mark = self.mark(format!("messages[{turn}].{name}"), Some(turn), text.trim());
        self.messages[turn].extra[name] = Value::from(insert(&text, &mark));
    }

    fn mark_calls(&mut self, turn: usize) {
        let mut message = self.messages[turn].clone();
        for (index, call) in calls(&mut message).enumerate() {
            let name = format!("messages[{turn}].tool_calls[{index}]");
            let function = function(call);
            if let Some(called) = function.get_mut("name") {
                let before = self.parts.len();
                self.mark_value(called, &name);
                self.parts[before..].iter_mut().for_each(|part| part.is_callee = true);
            }
            if let Some(arguments) = function.get_mut("arguments") {
                self.mark_arguments(arguments, &name);
            }
        }
        self.messages[turn] = message;
    }

    fn mark_arguments(&mut self, arguments: &mut Value, name: &str) {
        if let Value::String(text) = arguments {
            match serde_json::from_str::<Value>(text) {
                Ok(mut parsed @ Value::Object(_)) => {
                    self.mark_leaves(&mut parsed, name);
                    *text = parsed.to_string();
                }
                _ => self.mark_value(arguments, name),
            }
            return;
        }
        self.mark_leaves(arguments, name);
    }

    /// Marks the texts and integers in a value; without any, marks other values in it.
    fn mark_leaves(&mut self, value: &mut Value, name: &str) {
        let before = self.parts.len();
        self.mark_where(value, name, &|leaf| leaf.is_string() || leaf.is_i64() || leaf.is_u64());
        if self.parts.len() == before {
            self.mark_where(value, name, &|_| true);
        }
    }

    fn mark_where(&mut self, value: &mut Value, name: &str, which: &dyn Fn(&Value) -> bool) {
        match value {
            Value::Array(values) => values.iter_mut().for_each(|value| self.mark_where(value, name, which)),
            Value::Object(fields) => fields.values_mut().for_each(|value| self.mark_where(value, name, which)),
            leaf if which(leaf) => self.mark_value(leaf, name),
            _ => {}
        }
    }

    /// Replaces a value by a mark: an integer by a number, anything else by a text.
    fn mark_value(&mut self, value: &mut Value, name: &str) {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        if text.trim().is_empty() {
            return;
        }
        let mark = self.mark(name.to_owned(), None, &text);
        *value = match (value.is_i64() || value.is_u64(), mark.parse::<i64>()) {
            (true, Ok(number)) => Value::from(number),
            _ => Value::from(mark),
        };
    }
}

/// Inserts the mark near the middle of the text, but not into a tag, because templates check the beginning and end of
/// texts.
fn insert(text: &str, mark: &str) -> String {
    let middle = text.len() / 2;
    let fits = |at: &usize| {
        let before = &text[..*at];
        before.rfind('<').is_none_or(|open| before[open..].contains('>') || !text[open..].contains('>'))
    };
    let boundaries = (middle..=text.len()).filter(|at| text.is_char_boundary(*at));
    let at = boundaries.into_iter().find(fits).unwrap_or(text.len());
    // Not in the white space around it, which is often taken off.
    let at = at.clamp(text.len() - text.trim_start().len(), text.trim_end().len());
    format!("{}{mark}{}", &text[..at], &text[at..])
}

/// Returns the numbers of the marks in a rendering.
fn marks_in(rendering: &str, base: &str) -> BTreeSet<usize> {
    let number = |(at, _): (usize, &str)| rendering.get(at + base.len()..at + base.len() + DIGITS)?.parse().ok();
    rendering.match_indices(base).filter_map(number).collect()
}

#[cfg(test)]
mod tests;
