//! The loss mask: the tokens of a row that the loss covers.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::message::Message;
use crate::template::REASONING;

/// The turns of a conversation that the loss covers. In other rows it covers the completion, or all of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TrainOn {
    /// All turns of the assistant.
    #[default]
    Assistant,
    /// The assistant's last turn.
    LastAssistant,
    /// Every token of the rendered conversation, including the prompt. The first token of a row never counts.
    All,
}

/// The treatment of reasoning in assistant turns: `reasoning_content` or its other names, and `<think>…</think>` before
/// an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Thinking {
    /// Render it if the template does, and train it.
    #[default]
    Keep,
    /// Remove it from the messages before rendering.
    Strip,
    /// Render it without training it, from the beginning of the turn to the white space after `</think>`.
    Mask,
}

/// The treatment of a row without a label that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Untrained {
    /// Fail, with the row in the message.
    #[default]
    Error,
    /// Omit the row.
    Drop,
}

/// The treatment of a row of which the chat template omits a part: tool calls, `tools`, a turn, or the reasoning of a
/// trained turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NotShown {
    /// Fail, with the row and the part in the message.
    #[default]
    Error,
    /// Omit the row, and count it.
    Drop,
    /// Train the row as rendered, and count it.
    Allow,
}

/// Returns true for each turn that may be trained: `"train": false` or `"weight": 0` exclude a turn. Removes both keys
/// from the messages.
pub(crate) fn take_weights(messages: &mut [Message]) -> Result<Vec<bool>, String> {
    let weight = |(turn, message): (usize, &mut Message)| {
        let mut trained = true;
        for name in ["train", "weight"] {
            trained &= match message.extra.shift_remove(name) {
                None | Some(Value::Null) => true,
                Some(Value::Bool(trained)) => trained,
                Some(value) if value.as_f64() == Some(0.0) => false,
                Some(value) if value.as_f64() == Some(1.0) => true,
                Some(value) => {
                    return Err(format!(
                        "messages[{turn}].{name} is {value}; a turn is trained (1, true) or not (0, false)"
                    ));
                }
            };
        }
        Ok(trained)
    };
    messages.iter_mut().enumerate().map(weight).collect()
}

/// Returns the assistant turns of `train_on`, from turn `from` on.
pub(crate) fn turns(messages: &[Message], from: usize, train_on: TrainOn) -> Vec<usize> {
    let assistant = |from: usize| (from..messages.len()).filter(|&turn| messages[turn].is_assistant());
    match train_on {
        TrainOn::Assistant => assistant(from).collect(),
        TrainOn::LastAssistant => assistant(from).next_back().into_iter().collect(),
        TrainOn::All => assistant(0).collect(),
    }
}

/// Removes the reasoning from the assistant's turns.
pub(crate) fn strip_reasoning(messages: &mut [Message]) -> Result<(), String> {
    for (turn, message) in messages.iter_mut().enumerate().filter(|(_, message)| message.is_assistant()) {
        for name in REASONING {
            message.extra.shift_remove(name);
        }
        if let Some(content) = &mut message.content
            && let Some(end) = thought_end(content)
        {
            content.drain(..end);
        }
        let calls = message.extra.get("tool_calls").is_some_and(|calls| !calls.is_null());
        if message.text().trim().is_empty() && !calls {
            return Err(format!(
                "messages[{turn}] (assistant) has nothing but reasoning, which thinking = \"strip\" removes; \
                 remove the row, or set thinking = \"keep\" or \"mask\""
            ));
        }
    }
    Ok(())
}

/// Returns the end of the reasoning at the beginning of a text, including the white space after it. Its opening tag may
/// be in the prompt.
pub(crate) fn thought_end(text: &str) -> Option<usize> {
    const CLOSE: &str = "</think>";
    let close = text.find(CLOSE)?;
    let thought = &text[..close];
    if thought.contains("<think>") && !thought.trim_start().starts_with("<think>") {
        return None;
    }
    let rest = &text[close + CLOSE.len()..];
    Some(text.len() - rest.trim_start().len())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn assistant(value: Value) -> Message {
        Message::from_json(value, "messages[0]").expect("valid")
    }

    #[test]
    fn a_thought_stands_first() {
        for (text, answer) in [
            ("<think>\nwhy\n</think>\n\nA", "A"),
            ("\n<think></think>A", "A"),
            ("why\n</think>\n\nA", "A"),
            ("A <think>no</think> B", "A <think>no</think> B"),
            ("<think>never closed", "<think>never closed"),
            ("A", "A"),
        ] {
            assert_eq!(&text[thought_end(text).unwrap_or(0)..], answer, "{text:?}");
        }
    }

    #[test]
    fn reasoning_goes_by_every_name() {
        let turn = |name: &str| assistant(json!({"role": "assistant", "content": "<think>a</think>\nA", name: "why"}));
        let mut messages = REASONING.map(turn);
        strip_reasoning(&mut messages).expect("answers are left");
        assert!(messages.iter().all(|message| *message == Message::new("assistant", "A")), "{messages:?}");
        let error = strip_reasoning(&mut [Message::new("assistant", "<think>a</think>")]).expect_err("nothing is left");
        assert!(error.starts_with("messages[0] (assistant) has nothing but reasoning"), "{error}");
    }

    #[test]
    fn turns_may_opt_out() {
        let turn = |name: &str, value: Value| assistant(json!({"role": "assistant", "content": "A", name: value}));
        let mut messages = [
            turn("train", json!(false)),
            turn("weight", json!(0)),
            turn("weight", json!(1.0)),
            turn("train", json!(true)),
        ];
        assert_eq!(take_weights(&mut messages), Ok(vec![false, false, true, true]));
        assert!(messages.iter().all(|message| message.extra.is_empty()));
        assert_eq!(
            take_weights(&mut [turn("weight", json!(0.5))]),
            Err("messages[0].weight is 0.5; a turn is trained (1, true) or not (0, false)".to_owned())
        );
    }

    #[test]
    fn names_are_those_of_the_run_file() {
        let json = |value: &str| serde_json::from_str::<TrainOn>(value);
        assert_eq!(json("\"last_assistant\"").expect("known"), TrainOn::LastAssistant);
        assert!(json("\"user\"").expect_err("unknown").to_string().contains("`assistant`, `last_assistant`, `all`"));
        assert_eq!(
            serde_json::to_string(&(Thinking::Mask, Untrained::Drop, NotShown::Allow)).expect("serializable"),
            "[\"mask\",\"drop\",\"allow\"]"
        );
    }
}
