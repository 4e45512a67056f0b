//! Rows of token ids.

use serde_json::{Map, Value};

use super::RowContent;
use crate::message::type_name;
use crate::numbers;

/// Reads ids; `labels` and `attention_mask`, if present, must have the same length.
pub(super) fn read(ids: Value, fields: &Map<String, Value>) -> Result<RowContent, String> {
    // Ids and labels share the range of i32, so that −100 fits beside every id.
    let input_ids: Vec<u32> = integers(&ids, "input_ids", 0)?.into_iter().map(i32::unsigned_abs).collect();
    if input_ids.is_empty() {
        return Err("\"input_ids\" is an empty list".to_owned());
    }
    let beside = |name: &str| match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => {
            let values = integers(value, name, crate::IGNORED)?;
            if values.len() != input_ids.len() {
                return Err(format!("\"{name}\" has {} elements, \"input_ids\" {}", values.len(), input_ids.len()));
            }
            Ok(Some(values))
        }
    };
    let labels = beside("labels")?;
    if let Some(bad) = labels.iter().flatten().find(|&&label| label < 0 && label != crate::IGNORED) {
        return Err(format!("\"labels\" holds {bad}; only token ids and -100 (ignored) are allowed"));
    }
    if beside("attention_mask")?.is_some_and(|mask| mask.contains(&0)) {
        return Err("\"attention_mask\" hides tokens; remove the padding from \"input_ids\"".to_owned());
    }
    Ok(RowContent::InputIds { input_ids, labels })
}

/// Reads a prompt as ids.
pub(super) fn read_prompt(ids: &Value, name: &str) -> Result<Vec<u32>, String> {
    let ids = integers(ids, name, 0)?;
    if ids.is_empty() {
        return Err(format!("\"{name}\" is an empty list"));
    }
    Ok(ids.into_iter().map(i32::unsigned_abs).collect())
}

/// Reads a prompt and an answer as ids; the loss covers the answer.
pub(super) fn read_answer(
    prompt: Option<&Value>,
    answer: Option<&Value>,
    prompt_name: &str,
    answer_name: &str,
) -> Result<RowContent, String> {
    let read = |value: Option<&Value>, name: &str| {
        let ids = integers(value.unwrap_or(&Value::Null), name, 0)?;
        if ids.is_empty() { Err(format!("\"{name}\" is an empty list")) } else { Ok(ids) }
    };
    let (prompt, answer) = (read(prompt, prompt_name)?, read(answer, answer_name)?);
    let input_ids = prompt.iter().chain(&answer).map(|id| id.unsigned_abs()).collect();
    let labels = prompt.iter().map(|_| crate::IGNORED).chain(answer).collect();
    Ok(RowContent::InputIds { input_ids, labels: Some(labels) })
}

fn integers(value: &Value, name: &str, min: i32) -> Result<Vec<i32>, String> {
    let Value::Array(values) = value else {
        return Err(format!("\"{name}\" is {}, not a list of integers", type_name(value)));
    };
    let read = |(i, value): (usize, &Value)| {
        let number = value.as_i64().and_then(|number| i32::try_from(number).ok()).filter(|&number| number >= min);
        number.ok_or_else(|| {
            format!("{name}[{i}] is {}; expected an integer from {min} to {}", numbers::shown(value), i32::MAX)
        })
    };
    values.iter().enumerate().map(read).collect()
}
