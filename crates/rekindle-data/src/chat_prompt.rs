//! Conversations for a model to answer.

use std::path::Path;

use serde_json::{Map, Value};

use crate::encode::settle;
use crate::error::{Error, Result};
use crate::message::Message;
use crate::numbers;
use crate::row::read_prompt;
use crate::template::RenderOptions;
use crate::tokenizer::Tokenizer;

/// The end of a rendered conversation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum PromptEnd {
    /// The beginning of the assistant's turn.
    #[default]
    AssistantStart,
    /// The end of the last turn.
    Turn,
    /// The text of the last turn, which the model continues.
    Text,
}

/// A conversation up to the assistant's answer, with further inputs of its template.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChatPrompt {
    /// The turns so far.
    pub messages: Vec<Message>,
    /// Descriptions of tools.
    pub tools: Option<Value>,
    /// Further variables of the template, such as `enable_thinking`.
    pub kwargs: Map<String, Value>,
    /// The name of the chat template; `None` chooses as [`Tokenizer::chat_template_for`] does.
    pub chat_template: Option<String>,
    /// The end of the rendering.
    pub end: PromptEnd,
}

impl ChatPrompt {
    /// Returns a user's message, after a system prompt if given.
    pub fn new(system: Option<&str>, user: &str) -> Self {
        let system = system.map(|text| Message::new("system", text));
        let messages = system.into_iter().chain([Message::new("user", user)]).collect();
        Self { messages, ..Self::default() }
    }

    /// Reads JSON: a list of messages, or an object like a row of a dataset, with `messages` (or ShareGPT's
    /// `conversations`) and optionally `tools` and `chat_template_kwargs`. The last turn must not be the assistant's.
    /// `path` names the text in errors.
    ///
    /// # Errors
    /// [`Error::Dataset`] for anything else.
    pub fn from_json(text: &str, path: &Path) -> Result<Self> {
        let value = numbers::parse(text).map_err(|error| Error::dataset(path, format!("invalid JSON: {error}")))?;
        read_prompt(value).map_err(|message| Error::dataset(path, message))
    }

    /// Returns the token ids of the conversation and of the beginning of the assistant's turn, or of another
    /// [`end`](Self::end).
    ///
    /// # Errors
    /// As [`render`](Self::render).
    pub fn encode(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        // The template has written the special tokens already.
        tokenizer.encode(&self.render(tokenizer)?, false)
    }

    /// Returns the text of the conversation, in the tokenizer's chat template.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] without a chat template, [`Error::Template`] if it refuses the messages or does not show the
    /// text of the last one.
    pub fn render(&self, tokenizer: &Tokenizer) -> Result<String> {
        let template = tokenizer.chat_template_for(self.chat_template.as_deref(), self.tools.is_some())?;
        let options = RenderOptions {
            add_generation_prompt: self.end == PromptEnd::AssistantStart,
            tools: self.tools.clone(),
            kwargs: self.kwargs.clone(),
        };
        let mut messages = self.messages.clone();
        settle(template, &mut messages, &options);
        let mut text = template.render(&messages, &options)?;
        if self.end == PromptEnd::Text {
            let last = self.messages.last().map_or("", Message::text).trim();
            let at = text.rfind(last).filter(|_| !last.is_empty()).ok_or_else(|| {
                Error::Template(
                    "the rendering does not show the text of the last turn, so it cannot be continued".into(),
                )
            })?;
            text.truncate(at + last.len());
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{CHATML, DEFAULT_SYSTEM, tokenizer};

    fn read(text: &str) -> Result<ChatPrompt, String> {
        ChatPrompt::from_json(text, Path::new("chat.json")).map_err(|error| error.to_string())
    }

    #[test]
    fn a_list_or_a_row() {
        let turns = r#"[{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]"#;
        let prompt = read(turns).expect("valid");
        assert_eq!(prompt, ChatPrompt::new(Some("S"), "Q"));
        let (_dir, chatml) = tokenizer(CHATML);
        let ids = prompt.encode(&chatml).expect("encodable");
        let text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(chatml.decode(&ids, false).expect("decodable"), text);

        let row = format!(r#"{{"messages": {turns}, "tools": "[]", "chat_template_kwargs": {{"x": 1}}, "id": 7}}"#);
        let row = read(&row).expect("valid");
        assert_eq!((&row.messages, row.kwargs["x"].as_i64()), (&prompt.messages, Some(1)));
        assert_eq!(row.tools, Some(Value::Array(Vec::new())));
        let shared = r#"{"system": "S", "conversations": [{"from": "human", "value": "Q"}]}"#;
        assert_eq!(read(shared).expect("valid"), prompt);
    }

    #[test]
    fn the_last_turn_can_be_continued() {
        let (_dir, chatml) = tokenizer(CHATML);
        let mut prompt = ChatPrompt::new(None, "Q");
        prompt.messages.push(Message::new("assistant", " A, and "));
        let mut render = |end| {
            prompt.end = end;
            prompt.render(&chatml)
        };
        let turns = "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n A, and ";
        assert_eq!(render(PromptEnd::Turn).expect("renders"), format!("{turns}<|im_end|>\n"));
        assert_eq!(render(PromptEnd::Text).expect("renders"), turns.trim_end());
        assert!(render(PromptEnd::AssistantStart).expect("renders").ends_with("<|im_start|>assistant\n"));
        prompt.messages.push(Message::new("assistant", " "));
        assert!(prompt.render(&chatml).is_ok());
        prompt.end = PromptEnd::Text;
        assert!(prompt.render(&chatml).is_err());
    }

    #[test]
    fn tools_reach_the_template() {
        let (_dir, tokenizer) = tokenizer(DEFAULT_SYSTEM);
        let text = |json: &str| {
            let ids = read(json).and_then(|prompt| prompt.encode(&tokenizer).map_err(|error| error.to_string()));
            tokenizer.decode(&ids.expect("encodable"), false).expect("decodable")
        };
        let turns = r#""messages": [{"role": "user", "content": "Q"}]"#;
        let tools = r#""tools": [{"type": "function", "function": {"name": "weather"}}]"#;
        assert!(!text(&format!("{{{turns}}}")).contains("weather"));
        assert!(text(&format!("{{{turns}, {tools}}}")).contains("weather"));
    }

    #[test]
    fn what_cannot_be_answered_is_refused() {
        for (text, part) in [
            ("[", "chat.json: invalid JSON"),
            ("3", "expected a JSON object"),
            ("[]", "empty list"),
            (r#"{"message": []}"#, "has no \"messages\"; its keys: \"message\""),
            (r#"[{"role": "user"}]"#, "messages[0] (user) has no \"content\""),
            (r#"[{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]"#, "nothing to answer"),
        ] {
            let error = read(text).expect_err(text);
            assert!(error.contains(part), "{part:?} is not in: {error}");
        }
    }
}
