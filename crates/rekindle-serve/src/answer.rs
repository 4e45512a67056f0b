//! The parts of an answer: reasoning, content and tool calls, found while the text arrives.

use serde_json::{Map, Value};

use crate::chat_format::ToolFormat;

const OPEN: &str = "<think>";
pub(crate) const CLOSE: &str = "</think>";
const CALL_END: &str = "</tool_call>";
const PYTHON_TAG: &str = "<|python_tag|>";

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum AnswerPart {
    Reasoning(String),
    Content(String),
    Call(ToolCall),
}

/// A call of a tool.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct ToolCall {
    pub(crate) name: String,
    /// A JSON object, as text.
    pub(crate) arguments: String,
}

/// The place in the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Section {
    /// At the beginning, where `<think>` may come.
    Start,
    /// Before the first character of the reasoning.
    ReasoningStart,
    Reasoning,
    /// Before the first character of the content.
    ContentStart,
    Content,
    /// After `<tool_call>`.
    Call,
    /// Calls up to the end of the answer.
    CallsToEnd,
}

/// A parser of an answer that arrives in pieces.
///
/// White space around reasoning and calls is dropped. Text that may be the beginning of a tag waits for what follows.
/// A call that is not valid JSON stays content, tags included.
#[derive(Debug)]
pub(crate) struct AnswerParser {
    section: Section,
    tools: Option<ToolFormat>,
    held: String,
    calls: usize,
    max_calls: usize,
}

impl AnswerParser {
    /// Returns a parser. `thinks` says that the answer may begin with `<think>`, `in_reasoning` that it begins after it;
    /// calls of the form `tools` are found, `max_calls` at most.
    pub(crate) fn new(thinks: bool, in_reasoning: bool, tools: Option<ToolFormat>, max_calls: usize) -> Self {
        let section = match (thinks, in_reasoning, tools) {
            (_, true, _) => Section::ReasoningStart,
            (true, false, _) => Section::Start,
            (false, false, Some(_)) => Section::ContentStart,
            (false, false, None) => Section::Content,
        };
        Self { section, tools, held: String::new(), calls: 0, max_calls }
    }

    /// Returns the number of calls found.
    pub(crate) fn calls(&self) -> usize {
        self.calls
    }

    /// Adds text; returns the parts that are final.
    pub(crate) fn push(&mut self, text: &str) -> Vec<AnswerPart> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        parts
    }

    /// Returns the rest at the end of the answer.
    pub(crate) fn finish(&mut self) -> Vec<AnswerPart> {
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        let held = std::mem::take(&mut self.held);
        match self.section {
            Section::Reasoning => push(&mut parts, AnswerPart::Reasoning, held.trim_end()),
            Section::Call => {
                if !self.parse_calls(&held, &mut parts) {
                    push(&mut parts, AnswerPart::Content, &format!("<tool_call>{held}"));
                }
            }
            Section::CallsToEnd => {
                if !self.parse_calls(&held, &mut parts) {
                    let marker = self.tools.and_then(ToolFormat::marker).unwrap_or_default();
                    push(&mut parts, AnswerPart::Content, &format!("{marker}{held}"));
                }
            }
            // White space after reasoning or calls.
            Section::ReasoningStart | Section::ContentStart if held.trim().is_empty() => {}
            Section::ReasoningStart | Section::Start | Section::ContentStart | Section::Content => {
                push(&mut parts, AnswerPart::Content, &held)
            }
        }
        parts
    }

    /// Moves on within the held text; returns false if it must wait for more.
    fn step(&mut self, parts: &mut Vec<AnswerPart>) -> bool {
        match self.section {
            Section::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(OPEN) {
                    self.held = rest.to_owned();
                    self.section = Section::ReasoningStart;
                } else if OPEN.starts_with(text) {
                    return false;
                } else {
                    self.section = if self.tools.is_some() { Section::ContentStart } else { Section::Content };
                }
                true
            }
            Section::ReasoningStart => {
                self.held = self.held.trim_start().to_owned();
                if self.held.is_empty() {
                    return false;
                }
                self.section = Section::Reasoning;
                true
            }
            Section::Reasoning => {
                if let Some(at) = self.held.find(CLOSE) {
                    push(parts, AnswerPart::Reasoning, self.held[..at].trim_end());
                    self.held.drain(..at + CLOSE.len());
                    self.section = Section::ContentStart;
                    return true;
                }
                let end = certain(&self.held, &[CLOSE]);
                let end = self.held[..end].trim_end().len();
                self.emit(parts, AnswerPart::Reasoning, end);
                false
            }
            Section::ContentStart => {
                let text = self.held.trim_start();
                if text.is_empty() {
                    return false;
                }
                if self.tools == Some(ToolFormat::Llama) {
                    if text.starts_with('{') || text.starts_with(PYTHON_TAG) {
                        self.section = Section::CallsToEnd;
                        return false;
                    }
                    if PYTHON_TAG.starts_with(text) {
                        return false;
                    }
                }
                self.held = text.to_owned();
                self.section = Section::Content;
                true
            }
            Section::Content => {
                let Some(marker) = self.tools.and_then(ToolFormat::marker) else {
                    let end = self.held.len();
                    self.emit(parts, AnswerPart::Content, end);
                    return false;
                };
                if let Some(at) = self.held.find(marker) {
                    push(parts, AnswerPart::Content, self.held[..at].trim_end());
                    self.held.drain(..at + marker.len());
                    let hermes = self.tools == Some(ToolFormat::Hermes);
                    self.section = if hermes { Section::Call } else { Section::CallsToEnd };
                    return hermes;
                }
                let end = certain(&self.held, &[marker]);
                let end = self.held[..end].trim_end().len();
                self.emit(parts, AnswerPart::Content, end);
                false
            }
            Section::Call => {
                let Some(at) = self.held.find(CALL_END) else { return false };
                let body = self.held[..at].to_owned();
                self.held.drain(..at + CALL_END.len());
                if !self.parse_calls(&body, parts) {
                    push(parts, AnswerPart::Content, &format!("<tool_call>{body}{CALL_END}"));
                }
                self.section = Section::ContentStart;
                true
            }
            Section::CallsToEnd => false,
        }
    }

    /// Moves the first `end` bytes of the held text to `parts`.
    fn emit(&mut self, parts: &mut Vec<AnswerPart>, part: fn(String) -> AnswerPart, end: usize) {
        let text: String = self.held.drain(..end).collect();
        push(parts, part, &text);
    }

    /// Adds the calls in `text`; returns false if there are none.
    fn parse_calls(&mut self, text: &str, parts: &mut Vec<AnswerPart>) -> bool {
        let Some(tools) = self.tools else { return false };
        let Some(calls) = calls(text, tools) else { return false };
        for call in calls.into_iter().take(self.max_calls.saturating_sub(self.calls)) {
            self.calls += 1;
            parts.push(AnswerPart::Call(call));
        }
        true
    }
}

fn push(parts: &mut Vec<AnswerPart>, part: fn(String) -> AnswerPart, text: &str) {
    if !text.is_empty() {
        parts.push(part(text.to_owned()));
    }
}

/// Returns the number of bytes of `text` before a possible beginning of one of `tags` at its end.
fn certain(text: &str, tags: &[&str]) -> usize {
    let longest = tags.iter().map(|tag| tag.len()).max().unwrap_or(0);
    let first = text.len().saturating_sub(longest.saturating_sub(1));
    let mut starts = (first..text.len()).filter(|&at| text.is_char_boundary(at));
    starts.find(|&at| tags.iter().any(|tag| tag.starts_with(&text[at..]))).unwrap_or(text.len())
}

/// Reads calls; `None` if `text` is anything else.
fn calls(text: &str, format: ToolFormat) -> Option<Vec<ToolCall>> {
    let text = text.trim();
    let text = text.strip_prefix(PYTHON_TAG).unwrap_or(text);
    let mut found = Vec::new();
    let mut rest = text.trim_end_matches(|c: char| c.is_whitespace() || c == ';');
    loop {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        match values.next()?.ok()? {
            Value::Array(list) => {
                for call in list {
                    found.push(call_of(call, format)?);
                }
            }
            call => found.push(call_of(call, format)?),
        }
        rest = rest[values.byte_offset()..].trim_start();
        if rest.is_empty() {
            return (!found.is_empty()).then_some(found);
        }
        rest = rest.strip_prefix(';').unwrap_or(rest);
    }
}

fn call_of(value: Value, format: ToolFormat) -> Option<ToolCall> {
    let Value::Object(mut fields) = value else { return None };
    let Some(Value::String(name)) = fields.shift_remove("name") else { return None };
    let other = if format.arguments_key() == "arguments" { "parameters" } else { "arguments" };
    let arguments = fields.shift_remove(format.arguments_key()).or_else(|| fields.shift_remove(other));
    let arguments = match arguments {
        None | Some(Value::Null) => Value::Object(Map::new()),
        // Arguments that the model encoded a second time.
        Some(Value::String(text)) => serde_json::from_str(&text).ok()?,
        Some(arguments) => arguments,
    };
    arguments.is_object().then(|| ToolCall { name, arguments: arguments.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns reasoning, content and calls of `text`, which must not depend on how it is cut into pieces.
    fn parse(text: &str, thinks: bool, in_reasoning: bool, tools: Option<ToolFormat>) -> (String, String, Vec<String>) {
        let run = |pieces: &[&str]| {
            let mut parser = AnswerParser::new(thinks, in_reasoning, tools, usize::MAX);
            let mut parts: Vec<AnswerPart> = pieces.iter().flat_map(|piece| parser.push(piece)).collect();
            parts.extend(parser.finish());
            let mut all = (String::new(), String::new(), Vec::new());
            for part in parts {
                match part {
                    AnswerPart::Reasoning(text) => all.0 += &text,
                    AnswerPart::Content(text) => all.1 += &text,
                    AnswerPart::Call(ToolCall { name, arguments }) => all.2.push(format!("{name}{arguments}")),
                }
            }
            all
        };
        let whole = run(&[text]);
        let cuts: Vec<usize> = (0..=text.len()).filter(|&at| text.is_char_boundary(at)).collect();
        for pair in cuts.iter().flat_map(|&a| cuts.iter().filter(move |&&b| b >= a).map(move |&b| (a, b))) {
            let pieces = [&text[..pair.0], &text[pair.0..pair.1], &text[pair.1..]];
            assert_eq!(run(&pieces), whole, "{pieces:?}");
        }
        let letters: Vec<&str> = cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
        assert_eq!(run(&letters), whole, "letter by letter");
        whole
    }

    fn text(reasoning: &str, content: &str) -> (String, String, Vec<String>) {
        (reasoning.to_owned(), content.to_owned(), Vec::new())
    }

    #[test]
    fn reasoning_is_split_off() {
        assert_eq!(parse("<think>\nah\n</think>\n\nyes é", true, false, None), text("ah", "yes é"));
        assert_eq!(parse("ah\nso\n</think>\n\nyes", true, true, None), text("ah\nso", "yes"));
        assert_eq!(parse("<think>\n\n</think>\n\nyes", true, false, None), text("", "yes"));
        // Reasoning that never ends, and an answer without any.
        assert_eq!(parse("<think>ah </th", true, false, None), text("ah </th", ""));
        assert_eq!(parse(" yes <think>", true, false, None), text("", " yes <think>"));
        assert_eq!(parse("<thin", true, false, None), text("", "<thin"));
        assert_eq!(parse("<think>\nah\n</think>", false, false, None), text("", "<think>\nah\n</think>"));
    }

    #[test]
    fn calls_of_hermes() {
        let hermes = Some(ToolFormat::Hermes);
        let call = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>";
        let (_, content, calls) = parse(&format!("Let me look.\n{call}\n{call}\n"), true, false, hermes);
        assert_eq!((content.as_str(), calls), ("Let me look.", vec!["f{\"x\":1}".to_owned(); 2]));
        // The end tag may be missing, and arguments may be text.
        let open = "<tool_call>{\"name\": \"g\", \"arguments\": \"{}\"}";
        assert_eq!(parse(open, false, false, hermes).2, ["g{}"]);
        let thought = format!("<think>\nf?\n</think>\n\n{call}");
        assert_eq!(parse(&thought, true, false, hermes), ("f?".into(), String::new(), vec!["f{\"x\":1}".into()]));
        for broken in ["<tool_call>no</tool_call>", "a <tool_call>{\"name\": 3}</tool_call>", "a < b <tool"] {
            assert_eq!(parse(broken, false, false, hermes).2, Vec::<String>::new());
        }
        assert_eq!(parse("<tool_call>no</tool_call>", false, false, hermes).1, "<tool_call>no</tool_call>");
        assert_eq!(parse("a < b <tool", false, false, hermes).1, "a < b <tool");
        assert_eq!(parse(call, false, false, None).1, call);
    }

    #[test]
    fn calls_of_llama_and_mistral() {
        let llama = Some(ToolFormat::Llama);
        let two = "{\"name\": \"f\", \"parameters\": {\"x\": \"a\"}}; {\"name\": \"g\", \"parameters\": {}}";
        assert_eq!(parse(two, false, false, llama).2, ["f{\"x\":\"a\"}", "g{}"]);
        assert_eq!(parse(&format!("<|python_tag|>{two}"), false, false, llama).2.len(), 2);
        assert_eq!(parse("{\"answer\": 3}", false, false, llama), text("", "{\"answer\": 3}"));
        assert_eq!(parse("Hello {", false, false, llama), text("", "Hello {"));
        let mistral = "ok [TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {}}, {\"name\": \"g\", \"arguments\": {}}]";
        let (_, content, calls) = parse(mistral, false, false, Some(ToolFormat::Mistral));
        assert_eq!((content.as_str(), calls), ("ok", vec!["f{}".to_owned(), "g{}".to_owned()]));
        assert_eq!(parse("[TOOL_CALLS] x", false, false, Some(ToolFormat::Mistral)).1, "[TOOL_CALLS] x");
    }

    #[test]
    fn further_calls_are_dropped() {
        let mut parser = AnswerParser::new(false, false, Some(ToolFormat::Hermes), 1);
        let call = "<tool_call>{\"name\": \"f\"}</tool_call>";
        assert_eq!(parser.push(&[call, call].concat()).len(), 1);
        assert_eq!((parser.finish(), parser.calls()), (Vec::new(), 1));
    }
}
