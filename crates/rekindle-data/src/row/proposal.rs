//! Errors for rows of no known format, with a proposal of columns.

use serde_json::{Map, Value};

use crate::message::quoted_keys;

/// Names of questions in other files.
const QUESTIONS: [&str; 11] =
    ["question", "query", "problem", "user", "human", "instruction", "prompt", "input", "source", "context", "q"];
/// Names of answers in other files.
const ANSWERS: [&str; 11] =
    ["answer", "response", "completion", "output", "solution", "assistant", "reply", "target", "chosen", "label", "a"];

/// The error for a row of preferences where answers are not compared.
pub(super) const PREFERENCE: &str = "has \"chosen\" and \"rejected\", which are for training by preferences: set method = \"dpo\", \
     \"kto\", \"orpo\", \"cpo\" or \"simpo\" in [train]; to train the chosen answers alone, map them, as in [data] columns = { \
     completion = \"chosen\" }";

/// Returns the error for a row with keys of no format.
pub(super) fn unknown(fields: &Map<String, Value>, has_template: bool) -> String {
    let found = conversation(fields).or_else(|| pair(fields, has_template));
    let columns = found.unwrap_or_else(|| mapped("question", "answer", has_template));
    format!(
        "unknown kind of row; its keys: {}; known: \"messages\", \"conversations\", \"prompt\" with \"completion\", \
         \"instruction\" with \"output\", \"text\", \"input_ids\" (with or without \"labels\"); other names can be mapped, \
         as in [data] {columns}",
        quoted_keys(fields)
    )
}

/// Returns the error for a row with one of the two keys of a format.
pub(super) fn lacking(fields: &Map<String, Value>, there: &str, lacking: &str, has_template: bool) -> String {
    let message = format!("has {there:?} but no {lacking:?}");
    match pair(fields, has_template) {
        Some(columns) => format!("{message}; its keys: {}; map them, as in [data] {columns}", quoted_keys(fields)),
        None => message,
    }
}

/// Proposes columns for a key with turns.
fn conversation(fields: &Map<String, Value>) -> Option<String> {
    let (column, first) = fields.iter().find_map(|(column, value)| {
        let first = value.as_array()?.first()?.as_object()?;
        (first.contains_key("role") || first.contains_key("from")).then_some((column, first))
    })?;
    let key = if first.contains_key("role") { "messages" } else { "conversations" };
    Some(format!("columns = {{ {key} = {column:?} }}"))
}

/// Proposes columns for keys with a question and an answer.
fn pair(fields: &Map<String, Value>, has_template: bool) -> Option<String> {
    let find = |names: &[&str]| {
        names.iter().find_map(|name| {
            let is = |(key, value): &(&String, &Value)| key.eq_ignore_ascii_case(name) && value.is_string();
            fields.iter().find(is).map(|(key, _)| key)
        })
    };
    Some(mapped(find(&QUESTIONS)?, find(&ANSWERS)?, has_template))
}

/// Proposes keys for a question and an answer: with a chat template `instruction` and `output`, which are rendered as
/// turns; else `prompt` and `completion`.
fn mapped(question: &str, answer: &str, has_template: bool) -> String {
    let [asked, answered] = if has_template { ["instruction", "output"] } else { ["prompt", "completion"] };
    let column = |key: &str, column: &str| (key != column).then(|| format!("{key} = {column:?}"));
    let columns: Vec<_> = [column(asked, question), column(answered, answer)].into_iter().flatten().collect();
    format!("columns = {{ {} }}", columns.join(", "))
}
