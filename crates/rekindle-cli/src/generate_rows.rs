//! `rekindle generate --data`: the answers to all prompts of a file.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use rekindle::engine::EngineConfig;
use rekindle::{ChatPrompt, GeneratedText, GenerationConfig, Model, Tokenizer, counted};
use serde_json::{Map, Value, json};

use crate::args::GenerateArgs;
use crate::failure::Failure;
use crate::{output, progress};

/// A prompt of the file.
struct Prompt {
    /// The line, from 1.
    row: usize,
    input: Value,
    ids: Vec<u32>,
}

/// Answers the rows of `data` that have no answer in `out` yet.
pub(crate) fn run(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    config: &GenerationConfig,
    args: &GenerateArgs,
    [data, out]: [&Path; 2],
) -> Result<(), Failure> {
    let prompts = read_prompts(model, tokenizer, args.chat_template.as_deref(), data)?;
    let answered = read_answers(out)?;
    for prompt in &prompts {
        if answered.get(&prompt.row).is_some_and(|input| *input != prompt.input) {
            return Err(Failure::Configuration(format!(
                "{} answers another row {} than that of {}; give another --out, or remove the file",
                out.display(),
                prompt.row,
                data.display()
            )));
        }
    }
    let (total, before) = (prompts.len(), answered.len());
    let left: Vec<Prompt> = prompts.into_iter().filter(|prompt| !answered.contains_key(&prompt.row)).collect();
    let failed = |source| Failure::File { path: out.to_owned(), source };
    let mut file = OpenOptions::new().create(true).append(true).open(out).map_err(failed)?;
    let inputs: BTreeMap<usize, Value> = left.iter().map(|prompt| (prompt.row, prompt.input.clone())).collect();
    let limits = EngineConfig::for_device(model.causal_lm().device());
    let max_batch_tokens = limits.max_batch_tokens.max(args.batch_size);
    let limits = EngineConfig { max_sequences: args.batch_size, max_batch_tokens, ..limits };
    let (start, mut tokens, mut done, mut show) = (Instant::now(), 0, total - left.len(), progress::answers(total));
    let mut written = Ok(());
    model.generate_batch(
        tokenizer,
        left.into_iter().map(|prompt| (prompt.row, prompt.ids)),
        config,
        &args.stop,
        limits,
        |row, answer| {
            written = write_answer(&mut file, row, &inputs[&row], tokenizer.is_some(), &answer).map_err(failed);
            tokens += answer.generated.ids.len();
            done += 1;
            show(done, tokens as f64 / start.elapsed().as_secs_f64());
            Ok(written.is_ok())
        },
    )?;
    written?;
    let speed = tokens as f64 / start.elapsed().as_secs_f64().max(1e-9);
    eprintln!(
        "{}, {before} of them answered before, {}, {speed:.1} tokens/s",
        counted(total, "row"),
        counted(tokens, "new token")
    );
    output::line(&out.display().to_string())
}

/// Reads and encodes all prompts, so that a row that cannot be answered is found before the first answer.
fn read_prompts(
    model: &Model,
    tokenizer: Option<&Tokenizer>,
    template: Option<&str>,
    data: &Path,
) -> Result<Vec<Prompt>, Failure> {
    let text = std::fs::read_to_string(data).map_err(|source| Failure::File { path: data.to_owned(), source })?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let prompts = lines.map(|(index, line)| {
        let row = index + 1;
        let at = |problem: String| Failure::Row(format!("{}:{row}: {problem}", data.display()));
        let input: Value = serde_json::from_str(line).map_err(|error| at(format!("invalid JSON: {error}")))?;
        let ids = encode(&input, tokenizer, template, data).map_err(at)?;
        model.causal_lm().check_prompt(&ids).map_err(|error| at(error.to_string()))?;
        Ok(Prompt { row, input, ids })
    });
    let prompts: Vec<Prompt> = prompts.collect::<Result<_, Failure>>()?;
    if prompts.is_empty() {
        return Err(Failure::Row(format!("{} has no rows; give one JSON object a line", data.display())));
    }
    Ok(prompts)
}

/// Returns the tokens of a row: `prompt_ids`, a text or a conversation as `prompt`, or `messages`.
fn encode(
    input: &Value,
    tokenizer: Option<&Tokenizer>,
    template: Option<&str>,
    data: &Path,
) -> Result<Vec<u32>, String> {
    let Value::Object(row) = input else { return Err("the row is not an object".to_owned()) };
    if let Some(ids) = row.get("prompt_ids") {
        return serde_json::from_value(ids.clone()).map_err(|_| "prompt_ids is not a list of token ids".to_owned());
    }
    let Some(tokenizer) = tokenizer else {
        return Err("text needs a tokenizer, and this checkpoint has no tokenizer.json; give prompt_ids".to_owned());
    };
    let conversation = match row.get("prompt") {
        Some(Value::String(text)) => return tokenizer.encode(text, true).map_err(|error| error.to_string()),
        // A conversation in TRL's format of prompts.
        Some(messages @ Value::Array(_)) => {
            let mut row: Map<String, Value> = row.clone();
            row.insert("messages".to_owned(), messages.clone());
            row.remove("prompt");
            Value::Object(row)
        }
        Some(_) => return Err("prompt is neither a text nor a list of messages".to_owned()),
        None if row.contains_key("messages") || row.contains_key("conversations") => input.clone(),
        None => return Err("the row has none of prompt, messages and prompt_ids".to_owned()),
    };
    let mut prompt = ChatPrompt::from_json(&conversation.to_string(), data).map_err(|error| error.to_string())?;
    prompt.chat_template = template.map(str::to_owned);
    prompt.encode(tokenizer).map_err(|error| error.to_string())
}

/// Reads the rows that are answered already, with their inputs. A last line that was not written to its end is removed.
fn read_answers(out: &Path) -> Result<BTreeMap<usize, Value>, Failure> {
    let failed = |source| Failure::File { path: out.to_owned(), source };
    let mut text = match std::fs::read_to_string(out) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
        Err(error) => return Err(failed(error)),
    };
    let whole = text.rfind('\n').map_or(0, |end| end + 1);
    let is_answer = |line: &str| serde_json::from_str::<Value>(line).ok().filter(|answer| answer["row"].is_u64());
    let mut answers = BTreeMap::new();
    for (index, line) in text[..whole].lines().enumerate() {
        let Some(mut answer) = is_answer(line) else {
            return Err(Failure::Configuration(format!(
                "{}:{} is no answer of this command; give another --out",
                out.display(),
                index + 1
            )));
        };
        let row = answer["row"].as_u64().expect("checked above") as usize;
        answers.insert(row, answer["input"].take());
    }
    if whole < text.len() {
        // A file that never had an answer is somebody else's.
        if answers.is_empty() && !text.starts_with("{\"row\":") {
            return Err(Failure::Configuration(format!("{} is no file of answers; give another --out", out.display())));
        }
        text.truncate(whole);
        OpenOptions::new().write(true).open(out).and_then(|file| file.set_len(whole as u64)).map_err(failed)?;
    }
    Ok(answers)
}

/// Writes one line, so that an interrupted command loses at most the line that it is writing.
fn write_answer(
    file: &mut File,
    row: usize,
    input: &Value,
    has_text: bool,
    answer: &GeneratedText,
) -> std::io::Result<()> {
    let mut line = json!({
        "row": row,
        "input": input,
        "text": has_text.then_some(&answer.text),
        "ids": answer.generated.ids,
        "stop_reason": answer.stop_reason(),
        "prompt_tokens": answer.generated.prompt_tokens,
        "new_tokens": answer.generated.ids.len(),
    });
    if let Some(stop) = &answer.stop_string {
        line["stop"] = json!(stop);
    }
    file.write_all(format!("{line}\n").as_bytes())
}
