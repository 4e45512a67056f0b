//! Alpaca's rows of `instruction`, `input` and `output`.

use serde_json::{Map, Value};

use super::RowContent;
use super::conversation::system_prompt;
use crate::message::{Message, type_name};

/// Reads a row: as a conversation if there is a chat template, else as Stanford Alpaca's text.
pub(super) fn read(mut fields: Map<String, Value>, has_template: bool) -> Result<RowContent, String> {
    if fields.get("history").and_then(Value::as_array).is_some_and(|history| !history.is_empty()) {
        return Err("\"history\" beside \"instruction\" is not read; write the turns as \"messages\"".to_owned());
    }
    let mut text = |key: &str| match fields.shift_remove(key) {
        None | Some(Value::Null) => Ok(String::new()),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("{key:?} is {}, not a string", type_name(&other))),
    };
    let (instruction, input, output) = (text("instruction")?, text("input")?, text("output")?);
    if output.trim().is_empty() {
        return Err("\"output\" is empty; remove the row or fill it in".to_owned());
    }
    // Some files leave the instruction empty and ask in the input.
    let (instruction, input) = match (instruction.trim().is_empty(), input.trim().is_empty()) {
        (true, true) => {
            return Err("\"instruction\" and \"input\" are empty; remove the row or fill one of them in".to_owned());
        }
        (true, false) => (input, String::new()),
        (false, _) => (instruction, input),
    };
    let system = system_prompt(&mut fields)?;
    if !has_template {
        if system.is_some() {
            return Err(
                "\"system\" beside \"instruction\" needs a chat template, and the checkpoint has none".to_owned()
            );
        }
        return Ok(RowContent::PromptCompletion { prompt: prompt(&instruction, &input), completion: output });
    }
    let question = if input.is_empty() { instruction } else { format!("{instruction}\n\n{input}") };
    let turns = [Message::new("user", question), Message::new("assistant", output)];
    let messages = system.map(|text| Message::new("system", text)).into_iter().chain(turns).collect();
    Ok(RowContent::Messages { messages, trained_from: 0, tools: None, kwargs: Map::new() })
}

/// Returns the prompt of Stanford Alpaca (`PROMPT_DICT` of its train.py), with the line end after the last heading that
/// torchtune, axolotl and Alpaca-LoRA write.
fn prompt(instruction: &str, input: &str) -> String {
    let (paired, section) = match input {
        "" => ("", String::new()),
        _ => (", paired with an input that provides further context", format!("### Input:\n{input}\n\n")),
    };
    format!(
        "Below is an instruction that describes a task{paired}. Write a response that appropriately completes the \
         request.\n\n### Instruction:\n{instruction}\n\n{section}### Response:\n"
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::row::{RowFormat, object};

    fn read_json(value: Value, has_template: bool) -> Result<RowContent, String> {
        read(object(value)?, has_template)
    }

    #[test]
    fn a_conversation_where_there_is_a_template() {
        let row = json!({"instruction": "Add.", "input": "1, 2", "output": "3", "system": "Be brief."});
        let Ok(RowContent::Messages { messages, trained_from: 0, .. }) = read_json(row, true) else {
            panic!("a conversation")
        };
        let turns: Vec<_> = messages.iter().map(|turn| (turn.role.as_str(), turn.text())).collect();
        assert_eq!(turns, [("system", "Be brief."), ("user", "Add.\n\n1, 2"), ("assistant", "3")]);
    }

    #[test]
    fn the_classic_text_where_there_is_none() {
        let text = |row| match read_json(row, false).expect("valid") {
            RowContent::PromptCompletion { prompt, completion } => (prompt, completion),
            other => panic!("{other:?}"),
        };
        let (prompt, completion) = text(json!({"instruction": "Add.", "input": "1, 2", "output": "3"}));
        assert_eq!(completion, "3");
        assert_eq!(
            prompt,
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a \
             response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### \
             Response:\n"
        );
        let (prompt, _) = text(json!({"instruction": "Greet.", "input": "", "output": "Hi"}));
        assert_eq!(
            prompt,
            "Below is an instruction that describes a task. Write a response that appropriately completes the \
             request.\n\n### Instruction:\nGreet.\n\n### Response:\n"
        );
    }

    #[test]
    fn the_input_asks_where_the_instruction_is_empty() {
        for instruction in [json!(""), json!(" \n"), Value::Null] {
            let row = json!({"instruction": instruction, "input": "How high is Everest?", "output": "8,849 m"});
            let (format, content) = RowContent::read(object(row.clone()).expect("an object"), true).expect("valid");
            let RowContent::Messages { messages, .. } = content else { panic!("a conversation") };
            assert_eq!(format, RowFormat::Alpaca);
            assert_eq!(messages, [Message::new("user", "How high is Everest?"), Message::new("assistant", "8,849 m")]);
            let (_, content) = RowContent::read(object(row).expect("an object"), false).expect("valid");
            let RowContent::PromptCompletion { prompt, .. } = content else { panic!("a text") };
            assert!(prompt.ends_with("### Instruction:\nHow high is Everest?\n\n### Response:\n"), "{prompt}");
        }
        assert_eq!(
            read_json(json!({"instruction": "", "input": " ", "output": "b"}), true).expect_err("no question"),
            "\"instruction\" and \"input\" are empty; remove the row or fill one of them in"
        );
    }

    #[test]
    fn what_would_be_left_out_is_refused() {
        let error = |row, has_template| read_json(row, has_template).expect_err("refused");
        assert_eq!(
            error(json!({"instruction": "a", "output": " "}), true),
            "\"output\" is empty; remove the row or fill it in"
        );
        assert_eq!(error(json!({"instruction": 3, "output": "b"}), true), "\"instruction\" is a number, not a string");
        let history = json!({"instruction": "a", "output": "b", "history": [["c", "d"]]});
        assert!(error(history, true).starts_with("\"history\" beside \"instruction\" is not read"));
        let system = json!({"instruction": "a", "output": "b", "system": "c"});
        assert!(error(system, false).contains("needs a chat template"));
    }
}
