//! `rekindle rewards`: the rewards of a run file on rows, before training.

use std::path::Path;

use rekindle::rewards::{PYTHON_TEMPLATE, RewardColumn, Sample, Scores};
use rekindle::run::RunConfig;
use rekindle::{ChatPrompt, RawRow, Tokenizer, counted};
use serde_json::{Map, Value, json};

use crate::args::{RewardsCommand, RewardsTestArgs, TemplateLanguage};
use crate::failure::Failure;
use crate::train::TerminalObserver;
use crate::{fetch, output};

/// Keys of a row's own answer, in the order in which they are looked for.
const ANSWERS: [&str; 5] = ["completion", "chosen", "output", "answer", "solution"];

/// The number of characters of a completion that the table shows.
const SHOWN: usize = 60;

pub(crate) fn run(command: &RewardsCommand) -> Result<(), Failure> {
    match command {
        RewardsCommand::Test(args) => test(args),
        RewardsCommand::Template { language: TemplateLanguage::Python } => output::piece(PYTHON_TEMPLATE).map(|_| ()),
    }
}

/// A completion of a row.
#[derive(Debug)]
struct Completion {
    /// The row's number, from 1.
    row: usize,
    prompt: String,
    prompt_ids: Vec<u32>,
    messages: Option<Value>,
    text: String,
    ids: Vec<u32>,
    truncated: bool,
    columns: Map<String, Value>,
}

fn test(args: &RewardsTestArgs) -> Result<(), Failure> {
    let config = RunConfig::load(&args.run.run_file, &args.run.overrides)?;
    if config.rewards.is_empty() {
        return Err(Failure::Configuration(format!(
            "{} has no rewards; add a section [[rewards]] with a type, such as type = \"exact\"",
            args.run.run_file.display()
        )));
    }
    let observer = TerminalObserver::default();
    let (mut loader, _) = config.loader(&observer)?;
    fetch::say(&loader.fetch()?.notices);
    let encoder = loader.row_encoder()?;
    let source = config.train_source();
    let completions = match &args.completions {
        Some(file) => given(file, source.raw_rows(None)?, args.rows, encoder.tokenizer())?,
        None => {
            let rows = source.raw_rows(Some(args.rows))?;
            own_answers(rows, encoder.tokenizer())?
        }
    };
    let mut rewards = config.reward_set(encoder.tokenizer(), &observer)?;
    let samples: Vec<Sample> = completions.iter().map(Completion::sample).collect();
    let scores = rewards.score(&samples).map_err(rekindle::Error::from)?;
    if args.json {
        for (index, completion) in completions.iter().enumerate() {
            output::line(&json_line(completion, &scores, index).to_string())?;
        }
        return Ok(());
    }
    let answers = if args.completions.is_some() { "completion" } else { "own answer" };
    eprintln!("{source}: {}", counted(completions.len(), answers));
    output::piece(&table(&completions, &scores)).map(|_| ())
}

impl Completion {
    /// Returns a completion of a row; `ids` are those of the text unless they are given.
    fn new(
        number: usize,
        row: RawRow,
        text: String,
        ids: Option<Vec<u32>>,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self, Failure> {
        let at = |problem: String| Failure::Row(format!("{}, {}: {problem}", row.path.display(), row.row));
        let encode = |tokenizer: &Tokenizer| tokenizer.encode(&text, false).map_err(|error| at(error.to_string()));
        let ids = match ids {
            Some(ids) => ids,
            None => tokenizer.map(encode).transpose()?.unwrap_or_default(),
        };
        let mut columns = row.fields.clone();
        let (prompt, messages) = match columns.shift_remove("prompt").or_else(|| columns.shift_remove("instruction")) {
            Some(Value::String(text)) => (text, None),
            Some(messages @ Value::Array(_)) => (rendered(&messages, &row, tokenizer).map_err(at)?, Some(messages)),
            Some(_) => return Err(at("prompt is neither text nor a list of messages".to_owned())),
            None => match prompt_of_messages(&columns) {
                Some(messages) => (rendered(&messages, &row, tokenizer).map_err(at)?, Some(messages)),
                None => (String::new(), None),
            },
        };
        columns.shift_remove("completion");
        // The template has written the special tokens of a conversation already.
        let encode = |tokenizer: &Tokenizer| {
            tokenizer.encode(&prompt, messages.is_none()).map_err(|error| at(error.to_string()))
        };
        let prompt_ids = tokenizer.map(encode).transpose()?.unwrap_or_default();
        Ok(Self { row: number, prompt, prompt_ids, messages, text, ids, truncated: false, columns })
    }

    fn sample(&self) -> Sample<'_> {
        Sample {
            prompt: &self.prompt,
            prompt_ids: &self.prompt_ids,
            completion: &self.text,
            completion_ids: &self.ids,
            truncated: self.truncated,
            row: &self.columns,
            messages: self.messages.as_ref(),
        }
    }
}

/// Returns the text of messages: in the chat template, or the last message without a tokenizer.
fn rendered(messages: &Value, row: &RawRow, tokenizer: Option<&Tokenizer>) -> Result<String, String> {
    let Some(tokenizer) = tokenizer else {
        let last = messages.as_array().and_then(|list| list.last());
        return Ok(last.and_then(|message| message["content"].as_str()).unwrap_or_default().to_owned());
    };
    let prompt = ChatPrompt::from_json(&messages.to_string(), &row.path).map_err(|error| error.to_string())?;
    prompt.render(tokenizer).map_err(|error| error.to_string())
}

/// Returns the messages before the last one, which is the row's own answer.
fn prompt_of_messages(columns: &Map<String, Value>) -> Option<Value> {
    let (_, before) = columns.get("messages")?.as_array()?.split_last()?;
    Some(Value::Array(before.to_vec()))
}

/// Returns the rows with their own answers.
fn own_answers(rows: Vec<RawRow>, tokenizer: Option<&Tokenizer>) -> Result<Vec<Completion>, Failure> {
    let answered = rows.into_iter().enumerate().map(|(index, row)| {
        let Some(text) = own_answer(&row.fields) else {
            let keys: Vec<&str> = row.fields.keys().map(String::as_str).collect();
            return Err(Failure::Row(format!(
                "{}, {}: the row has no answer of its own: none of {} and messages, only {}; give --completions",
                row.path.display(),
                row.row,
                ANSWERS.join(", "),
                keys.join(", ")
            )));
        };
        Completion::new(index + 1, row, text, None, tokenizer)
    });
    answered.collect()
}

/// Returns the text of a row's own answer.
fn own_answer(fields: &Map<String, Value>) -> Option<String> {
    let last = |value: &Value| Some(value.as_array()?.last()?["content"].as_str()?.to_owned());
    let of = |value: &Value| match value {
        Value::String(text) => Some(text.clone()),
        Value::Number(number) => Some(number.to_string()),
        other => last(other),
    };
    let named = ANSWERS.iter().find_map(|key| fields.get(*key).and_then(of));
    named.or_else(|| fields.get("messages").and_then(last))
}

/// Reads completions of rows.
fn given(
    file: &Path,
    rows: Vec<RawRow>,
    limit: usize,
    tokenizer: Option<&Tokenizer>,
) -> Result<Vec<Completion>, Failure> {
    let text = std::fs::read_to_string(file).map_err(|source| Failure::File { path: file.to_owned(), source })?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).take(limit);
    let completions = lines.map(|(index, line)| {
        let at = |problem: String| Failure::Row(format!("{}:{}: {problem}", file.display(), index + 1));
        let value: Value = serde_json::from_str(line).map_err(|error| at(format!("invalid JSON: {error}")))?;
        let text = value["text"].as_str().or(value["completion"].as_str());
        let text = text.ok_or_else(|| at("the line has neither text nor completion".to_owned()))?.to_owned();
        let number = value["row"].as_u64().map_or(index + 1, |row| row as usize);
        let row = number.checked_sub(1).and_then(|index| rows.get(index)).cloned();
        let row = row.ok_or_else(|| at(format!("row {number} is not among the {}", counted(rows.len(), "row"))))?;
        let ids = value.get("ids").cloned().map(serde_json::from_value::<Vec<u32>>).transpose();
        let ids = ids.map_err(|_| at("ids is not a list of token ids".to_owned()))?;
        let mut completion = Completion::new(number, row, text, ids, tokenizer)?;
        completion.truncated = value["stop_reason"] == "length" || value["truncated"] == true;
        Ok(completion)
    });
    let completions: Vec<Completion> = completions.collect::<Result<_, Failure>>()?;
    if completions.is_empty() {
        return Err(Failure::Row(format!("{} has no completions; give one JSON object a line", file.display())));
    }
    Ok(completions)
}

fn json_line(completion: &Completion, scores: &Scores, index: usize) -> Value {
    let by_name = scores.columns.iter().map(|column| (column.name.clone(), json!(column.values[index])));
    json!({
        "row": completion.row,
        "completion": completion.text,
        "rewards": by_name.collect::<Map<_, _>>(),
        "total": scores.totals[index],
    })
}

/// Returns a line for each reward and the total, then the completions with the highest and the lowest total.
fn table(completions: &[Completion], scores: &Scores) -> String {
    let width = scores.columns.iter().map(|column| column.name.chars().count()).max().unwrap_or(0).max("reward".len());
    let mut text = format!(
        "{:width$}  {:>8}  {:>8}  {:>8}  {:>8}  {:>8}  {:>6}\n",
        "reward", "weight", "mean", "std", "min", "max", "nulls"
    );
    for RewardColumn { name, weight, values } in &scores.columns {
        text += &format!("{name:width$}  {weight:>8}  {}\n", summary(values));
    }
    text += &format!("{:width$}  {:>8}  {}\n", "total", "", summary(&scores.totals));
    let mut ranked: Vec<usize> = (0..completions.len()).filter(|&index| scores.totals[index].is_some()).collect();
    ranked.sort_by(|&a, &b| scores.totals[b].unwrap_or(0.0).total_cmp(&scores.totals[a].unwrap_or(0.0)));
    let ends = [("highest", ranked.first()), ("lowest", ranked.last().filter(|_| ranked.len() > 1))];
    for (label, &index) in ends.iter().filter_map(|(label, index)| Some((label, (*index)?))) {
        let Completion { row, text: completion, .. } = &completions[index];
        text += &format!("{label}: row {row}, total {}: {}\n", number(scores.totals[index]), shown(completion));
    }
    text
}

/// Returns mean, standard deviation, minimum, maximum and the number of nulls.
fn summary(values: &[Option<f64>]) -> String {
    let scored: Vec<f64> = values.iter().copied().flatten().collect();
    let nulls = values.len() - scored.len();
    if scored.is_empty() {
        return format!("{:>8}  {:>8}  {:>8}  {:>8}  {nulls:>6}", "-", "-", "-", "-");
    }
    let mean = scored.iter().sum::<f64>() / scored.len() as f64;
    let variance = scored.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / scored.len() as f64;
    let min = scored.iter().copied().fold(f64::INFINITY, f64::min);
    let max = scored.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{mean:>8.3}  {:>8.3}  {min:>8.3}  {max:>8.3}  {nulls:>6}", variance.sqrt())
}

fn number(value: Option<f64>) -> String {
    value.map_or_else(|| "null".to_owned(), |value| format!("{value:.3}"))
}

/// Returns the beginning of a text on one line.
fn shown(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
