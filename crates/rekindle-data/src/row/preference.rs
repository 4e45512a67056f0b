//! Rows of preferences: pairs of a chosen and a rejected answer, and answers with a label.

use serde_json::{Map, Value};

use super::{RowContent, RowFormat, conversation, pretokenized, prompt_completion};
use crate::message::{Message, quoted_keys, type_name};

/// An answer to encode, with its prompt.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AnswerContent {
    pub(crate) content: RowContent,
    /// True for a chosen or desirable answer.
    pub(crate) preferred: bool,
}

/// The content of a row of preferences.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Preference {
    /// The chosen and the rejected answer, or one answer with a label.
    pub(crate) answers: Vec<AnswerContent>,
    /// True if both answers contain the prompt as text: it ends where their tokens differ.
    pub(crate) implicit_text: bool,
}

/// Reads a row with a chosen and a rejected answer.
pub(crate) fn read_pair(fields: Map<String, Value>) -> Result<(RowFormat, Preference), String> {
    let has = |key: &str| fields.get(key).is_some_and(|value| !value.is_null());
    let keys = if has("chosen_ids") || has("rejected_ids") {
        ["prompt_ids", "chosen_ids", "rejected_ids"]
    } else {
        ["prompt", "chosen", "rejected"]
    };
    let [prompt_key, chosen_key, rejected_key] = keys;
    if let Some(lacking) = [chosen_key, rejected_key].into_iter().find(|key| !has(key)) {
        return Err(format!(
            "has no {lacking:?}, and this method compares a chosen with a rejected answer; its keys: {}; other names can \
             be mapped, as in [data] columns = {{ chosen = \"better\", rejected = \"worse\" }}",
            quoted_keys(&fields)
        ));
    }
    let mut rest = fields;
    let [prompt, chosen, rejected] = [prompt_key, chosen_key, rejected_key].map(|key| take(&mut rest, key));
    let preference = |chosen, rejected, implicit_text| Preference {
        answers: vec![
            AnswerContent { content: chosen, preferred: true },
            AnswerContent { content: rejected, preferred: false },
        ],
        implicit_text,
    };
    if chosen_key == "chosen_ids" {
        let [chosen, rejected] = [(chosen, chosen_key), (rejected, rejected_key)]
            .map(|(answer, key)| pretokenized::read_answer(prompt.as_ref(), answer.as_ref(), prompt_key, key));
        return Ok((RowFormat::Preference, preference(chosen?, rejected?, false)));
    }
    let (chosen, rejected) = (chosen.unwrap_or_default(), rejected.unwrap_or_default());
    let content = match (prompt, chosen, rejected) {
        (prompt @ (None | Some(Value::String(_))), chosen @ Value::Array(_), rejected @ Value::Array(_)) => {
            let [chosen, rejected] = conversations(prompt, chosen, rejected, &rest)?;
            preference(chosen, rejected, false)
        }
        (None, Value::String(chosen), Value::String(rejected)) => {
            // The end token follows the text, as it follows a completion.
            let whole = |completion: String, key: &str| match completion.is_empty() {
                true => Err(format!("{key:?} is empty")),
                false => Ok(RowContent::PromptCompletion { prompt: String::new(), completion }),
            };
            preference(whole(chosen, "chosen")?, whole(rejected, "rejected")?, true)
        }
        (Some(prompt), chosen, rejected) => {
            let side = |answer: Value, key: &str| completion(prompt.clone(), answer, key, rest.clone());
            preference(side(chosen, "chosen")?, side(rejected, "rejected")?, false)
        }
        (None, chosen, rejected) => {
            return Err(format!(
                "\"chosen\" is {} and \"rejected\" is {}; both must be strings, or both lists of messages",
                type_name(&chosen),
                type_name(&rejected)
            ));
        }
    };
    Ok((RowFormat::Preference, content))
}

/// Reads a row with an answer and its label, or a pair, which is one desirable and one undesirable answer.
pub(crate) fn read_labelled(fields: Map<String, Value>) -> Result<(RowFormat, Preference), String> {
    let has = |key: &str| fields.get(key).is_some_and(|value| !value.is_null());
    if !has("label") && (has("chosen") || has("chosen_ids")) {
        return read_pair(fields);
    }
    let keys = if has("completion_ids") { ["prompt_ids", "completion_ids"] } else { ["prompt", "completion"] };
    if let Some(lacking) = [keys[0], keys[1], "label"].into_iter().find(|key| !has(key)) {
        return Err(format!(
            "has no {lacking:?}, and this method needs \"prompt\", \"completion\" and \"label\" (true or false), or pairs of \
             \"chosen\" and \"rejected\"; its keys: {}",
            quoted_keys(&fields)
        ));
    }
    let mut rest = fields;
    let preferred = match take(&mut rest, "label").unwrap_or_default() {
        Value::Bool(label) => label,
        number if number.as_i64() == Some(1) => true,
        number if number.as_i64() == Some(0) => false,
        // A cell of a CSV file is text.
        Value::String(text) if ["true", "1"].contains(&text.to_lowercase().as_str()) => true,
        Value::String(text) if ["false", "0"].contains(&text.to_lowercase().as_str()) => false,
        other => {
            return Err(format!(
                "\"label\" is {}; it must be true for a desirable answer or false for an undesirable one",
                if other.is_number() { other.to_string() } else { type_name(&other).to_owned() }
            ));
        }
    };
    let [prompt, answer] = keys.map(|key| take(&mut rest, key));
    let content = match keys[1] {
        "completion_ids" => pretokenized::read_answer(prompt.as_ref(), answer.as_ref(), keys[0], keys[1])?,
        key => completion(prompt.unwrap_or_default(), answer.unwrap_or_default(), key, rest)?,
    };
    let answers = vec![AnswerContent { content, preferred }];
    Ok((RowFormat::LabelledCompletion, Preference { answers, implicit_text: false }))
}

/// Returns the value of a key, unless it is null.
fn take(fields: &mut Map<String, Value>, key: &str) -> Option<Value> {
    fields.shift_remove(key).filter(|value| !value.is_null())
}

/// Reads a prompt with one answer, called `name`. A text is an answer to messages too.
fn completion(prompt: Value, answer: Value, name: &str, fields: Map<String, Value>) -> Result<RowContent, String> {
    match (prompt, answer) {
        (prompt @ Value::Array(_), Value::String(text)) => {
            let turn = serde_json::json!([{"role": "assistant", "content": text}]);
            prompt_completion(prompt, turn, name, fields)
        }
        (prompt, answer) => prompt_completion(prompt, answer, name, fields),
    }
}

/// Reads two conversations that begin with the same prompt. A `prompt` that they do not contain is the first user turn.
fn conversations(
    prompt: Option<Value>,
    chosen: Value,
    rejected: Value,
    fields: &Map<String, Value>,
) -> Result<[RowContent; 2], String> {
    let mut sides = [conversation::turns(chosen, "chosen")?, conversation::turns(rejected, "rejected")?];
    let begins_with_answer = sides.iter().all(|turns| turns[0].is_assistant());
    if let (Some(Value::String(prompt)), true) = (prompt, begins_with_answer) {
        sides.iter_mut().for_each(|turns| turns.insert(0, Message::new("user", prompt.clone())));
    }
    let [chosen, rejected] = &sides;
    let shared = chosen.iter().zip(rejected).take_while(|(chosen, rejected)| chosen == rejected).count();
    // Sides that are equal are dropped later; their last turn is the answer.
    let shared = shared.min(chosen.len() - 1).min(rejected.len() - 1);
    if shared == 0 {
        return Err(
            "\"chosen\" and \"rejected\" share no turn; they must begin with the same prompt, or the row needs \
                    \"prompt\""
                .to_owned(),
        );
    }
    let [chosen, rejected] = sides;
    Ok([
        conversation::finish(chosen, shared, "chosen", fields.clone())?,
        conversation::finish(rejected, shared, "rejected", fields.clone())?,
    ])
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::row::object;

    fn pair(row: Value) -> Result<Preference, String> {
        read_pair(object(row).expect("an object")).map(|(_, preference)| preference)
    }

    fn labelled(row: Value) -> Result<Preference, String> {
        read_labelled(object(row).expect("an object")).map(|(_, preference)| preference)
    }

    /// The texts of the turns of both sides, and the number of turns of the prompt.
    fn turns(preference: &Preference) -> Vec<(Vec<String>, usize)> {
        let of = |answer: &AnswerContent| match &answer.content {
            RowContent::Messages { messages, trained_from, .. } => {
                (messages.iter().map(|turn| turn.text().to_string()).collect(), *trained_from)
            }
            other => panic!("{other:?}"),
        };
        preference.answers.iter().map(of).collect()
    }

    #[test]
    fn prompts_are_explicit_or_shared() {
        let (user, good, bad) = (
            json!({"role": "user", "content": "q"}),
            json!({"role": "assistant", "content": "good"}),
            json!({"role": "assistant", "content": "bad"}),
        );
        let expected = [(vec!["q".to_owned(), "good".to_owned()], 1), (vec!["q".to_owned(), "bad".to_owned()], 1)];
        for row in [
            json!({"prompt": [user], "chosen": [good], "rejected": [bad]}),
            json!({"prompt": [user], "chosen": "good", "rejected": "bad"}),
            json!({"chosen": [user, good], "rejected": [user, bad]}),
            json!({"prompt": "q", "chosen": [user, good], "rejected": [user, bad]}),
            json!({"prompt": "q", "chosen": [good], "rejected": [bad]}),
        ] {
            assert_eq!(turns(&pair(row.clone()).expect("valid")), expected, "{row}");
        }
        let text = pair(json!({"chosen": "a b", "rejected": "a c"})).expect("valid");
        assert!(text.implicit_text);
        let text = pair(json!({"prompt": "a", "chosen": "b", "rejected": "c"})).expect("valid");
        assert!(!text.implicit_text && text.answers[0].preferred && !text.answers[1].preferred);
        assert_eq!(
            text.answers[1].content,
            RowContent::PromptCompletion { prompt: "a".to_owned(), completion: "c".to_owned() }
        );
    }

    #[test]
    fn ids_have_a_prompt_that_is_not_trained() {
        let ids = pair(json!({"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [4, 5]})).expect("valid");
        let rejected = RowContent::InputIds { input_ids: vec![1, 2, 4, 5], labels: Some(vec![-100, -100, 4, 5]) };
        assert_eq!(ids.answers[1].content, rejected);
        let one = labelled(json!({"prompt_ids": [1], "completion_ids": [3], "label": 0})).expect("valid");
        assert!(!one.answers[0].preferred);
        let error = labelled(json!({"prompt_ids": [], "completion_ids": [3], "label": true})).expect_err("no prompt");
        assert_eq!(error, "\"prompt_ids\" is an empty list");
    }

    #[test]
    fn labels_are_true_or_false() {
        let row = |label: Value| json!({"prompt": "q", "completion": "a", "label": label});
        assert!(labelled(row(json!(true))).expect("valid").answers[0].preferred);
        assert!(!labelled(row(json!("False"))).expect("a cell").answers[0].preferred);
        assert!(labelled(row(json!("yes"))).expect_err("a text").starts_with("\"label\" is a string; it must be true"));
        assert!(labelled(row(json!(2))).expect_err("a number").starts_with("\"label\" is 2; it must be true"));
        let both = labelled(json!({"prompt": "q", "chosen": "a", "rejected": "b"})).expect("a pair");
        assert_eq!(both.answers.len(), 2);
        let error = labelled(json!({"prompt": "q", "completion": "a"})).expect_err("no label");
        assert!(error.starts_with("has no \"label\", and this method needs"), "{error}");
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let error = |row: Value| pair(row).expect_err("refused");
        assert!(
            error(json!({"prompt": "q", "completion": "a"})).starts_with("has no \"chosen\", and this method compares")
        );
        assert!(error(json!({"prompt": "q", "chosen": "a", "rejected": null})).starts_with("has no \"rejected\""));
        let turn = |text: &str| json!([{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]);
        assert!(error(json!({"chosen": turn("p"), "rejected": turn("q")})).contains("share no turn"));
        assert_eq!(
            error(json!({"chosen": "a", "rejected": turn("q")})),
            "\"chosen\" is a string and \"rejected\" is a list; both must be strings, or both lists of messages"
        );
        assert_eq!(error(json!({"prompt": "q", "chosen": "", "rejected": "b"})), "\"chosen\" is empty");
    }
}
