//! Loading of examples from files.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use super::{Dataset, Examples, InMemory};
use crate::columns::{Columns, Found};
use crate::encode::{encode, encode_prompt};
use crate::error::{Error, Result};
use crate::example::{Encoded, IGNORED};
use crate::files::{self, RawRow};
use crate::hash::hex;
use crate::mask::{NotShown, Untrained};
use crate::options::{EncodeOptions, RowTask};
use crate::overlong::{self, Overlong};
use crate::report::{LoadReport, RowChange, RowPlace};
use crate::row::{
    AnswerContent, Preference, PromptContent, RowContent, RowFormat, RowNumber, read_labelled, read_pair,
    read_prompt_row,
};
use crate::template::STOPPED;
use crate::tokenizer::Tokenizer;

/// Encodes the rows of `files`, with their fingerprint; without one, the fingerprint of their contents is used.
///
/// Rows are parsed and encoded on all cores, in batches, and collected in order. The error is always that of the first
/// wrong row of the first file, whichever core finds it.
pub(crate) fn load(
    files: &[PathBuf],
    columns: &Columns,
    tokenizer: Option<&Tokenizer>,
    options: &EncodeOptions,
    fingerprint: Option<&str>,
) -> Result<(Dataset, LoadReport)> {
    let not_shown_dropped = options.not_shown == NotShown::Drop;
    let report = LoadReport { files: files.to_vec(), not_shown_dropped, ..LoadReport::default() };
    let mut loader = Loader {
        files,
        file: 0,
        columns,
        tokenizer,
        options,
        waiting: Vec::new(),
        waiting_bytes: 0,
        report,
        examples: InMemory::default(),
        found: 0,
        untrained: Vec::new(),
        looked_at: 0,
        wrong: None,
    };
    for (index, path) in files.iter().enumerate() {
        loader.file = index;
        let mut refused = false;
        let read = files::read(path, columns, &mut |row| loader.take(row).inspect_err(|_| refused = true));
        // Rows before the place at which reading failed may be wrong too, and come first.
        if !refused {
            loader.encode_waiting()?;
        }
        read.map_err(|error| match loader.wrong.take() {
            Some(wrong) => wrong.counted(loader.looked_at, false),
            None => error,
        })?;
    }
    if let Some(wrong) = loader.wrong.take() {
        return Err(wrong.counted(loader.looked_at, true));
    }
    loader.finish(fingerprint)
}

struct Loader<'a> {
    files: &'a [PathBuf],
    /// The index of the current file.
    file: usize,
    columns: &'a Columns,
    tokenizer: Option<&'a Tokenizer>,
    options: &'a EncodeOptions,
    /// Rows waiting to be encoded together.
    waiting: Vec<RawRow>,
    waiting_bytes: usize,
    report: LoadReport,
    examples: InMemory,
    /// The mapped columns found so far.
    found: Found,
    /// Rows without a label that counts. The error depends on the other rows.
    untrained: Vec<RowPlace>,
    /// Rows that were encoded, successfully or not.
    looked_at: usize,
    /// The first row that is wrong.
    wrong: Option<WrongRow>,
}

/// The first wrong row. Some more rows are encoded to count those with the same fault.
struct WrongRow {
    error: Error,
    /// Its message without digits, which differ between rows.
    fault: String,
    rows: usize,
    /// The number of rows encoded when it was found.
    found_at: usize,
}

/// The number of rows to encode after a wrong one.
const ROWS_AFTER: usize = 10_000;

impl WrongRow {
    fn fault(message: &str) -> String {
        message.chars().filter(|character| !character.is_ascii_digit()).collect()
    }

    /// Returns the error, with the number of affected rows among the `looked_at` if there are several.
    fn counted(self, looked_at: usize, are_all: bool) -> Error {
        let rows = self.rows;
        match self.error {
            Error::Row { path, row, message } if rows > 1 => {
                let of = if are_all { "" } else { "the first " };
                Error::Row { path, row, message: format!("{message} ({rows} of {of}{looked_at} rows have this fault)") }
            }
            error => error,
        }
    }
}

/// The maximum number and bytes of rows to encode together.
const ROWS_AT_ONCE: usize = 1024;
const BYTES_AT_ONCE: usize = 8 << 20;

/// An encoded row, with its properties.
struct Ready {
    /// One example, or two of a pair of answers.
    examples: Vec<Encoded>,
    number: RowNumber,
    format: RowFormat,
    found: Found,
    /// True if it is text that the checkpoint's chat template does not render.
    is_plain: bool,
    /// The margin of a pair.
    margin: Option<f32>,
}

impl Loader<'_> {
    fn take(&mut self, row: RawRow) -> Result<()> {
        self.waiting_bytes += row.bytes;
        self.waiting.push(row);
        if self.waiting.len() < ROWS_AT_ONCE && self.waiting_bytes < BYTES_AT_ONCE {
            return Ok(());
        }
        self.encode_waiting()
    }

    fn encode_waiting(&mut self) -> Result<()> {
        self.waiting_bytes = 0;
        let waiting = std::mem::take(&mut self.waiting);
        let this = &*self;
        // A template that exceeds its budget is slow for every row, so later rows are not tried.
        let stopped = AtomicUsize::new(usize::MAX);
        let encode = |(index, row)| {
            if index > stopped.load(Ordering::Relaxed) {
                return None;
            }
            let ready = this.encode(row);
            if ready.as_ref().is_err_and(|error| error.to_string().contains(STOPPED)) {
                stopped.fetch_min(index, Ordering::Relaxed);
            }
            Some(ready)
        };
        let ready: Vec<Option<Result<Ready>>> = waiting.into_par_iter().enumerate().map(encode).collect();
        for row in ready.into_iter().flatten() {
            self.looked_at += 1;
            match row.and_then(|row| self.add(row)) {
                Ok(()) => {}
                Err(Error::Row { path, row, message }) if !message.contains(STOPPED) => self.refuse(path, row, message),
                Err(other) => {
                    return Err(self.wrong.take().map_or(other, |wrong| wrong.counted(self.looked_at, false)));
                }
            }
        }
        match self.wrong.take_if(|wrong| self.looked_at - wrong.found_at >= ROWS_AFTER) {
            Some(wrong) => Err(wrong.counted(self.looked_at, false)),
            None => Ok(()),
        }
    }

    fn refuse(&mut self, path: PathBuf, row: RowNumber, message: String) {
        let fault = WrongRow::fault(&message);
        match &mut self.wrong {
            Some(wrong) => wrong.rows += usize::from(wrong.fault == fault),
            None => {
                let error = Error::Row { path, row, message };
                self.wrong = Some(WrongRow { error, fault, rows: 1, found_at: self.looked_at });
            }
        }
    }

    fn path(&self) -> &Path {
        &self.files[self.file]
    }

    fn encode(&self, row: RawRow) -> Result<Ready> {
        let number = row.number;
        let wrong = |message| Error::row(self.path(), number, message);
        let mut fields = row.fields().map_err(wrong)?;
        let found = self.columns.apply(&mut fields).map_err(wrong)?;
        let has_template = self.tokenizer.is_none_or(Tokenizer::has_chat_template);
        if self.options.task == RowTask::Prompts {
            let content = read_prompt_row(fields).map_err(wrong)?;
            let is_plain = has_template && self.tokenizer.is_some() && matches!(content, PromptContent::Text(_));
            let example = encode_prompt(content, number.get(), self.tokenizer, self.options).map_err(wrong)?;
            self.check_vocabulary(&example, number)?;
            return Ok(Ready {
                examples: vec![example],
                number,
                format: RowFormat::Prompt,
                found,
                is_plain,
                margin: None,
            });
        }
        let (format, row) = match self.options.task {
            RowTask::Sft => {
                let (format, content) = RowContent::read(fields, has_template).map_err(wrong)?;
                (format, RowAnswers { contents: vec![(content, None)], implicit_text: false, margin: None })
            }
            RowTask::ScoredPairs => {
                let margin = read_margin(&mut fields).map_err(wrong)?;
                let (format, row) = RowAnswers::of(read_pair(fields).map_err(wrong)?);
                (format, RowAnswers { margin, ..row })
            }
            RowTask::Pairs => RowAnswers::of(read_pair(fields).map_err(wrong)?),
            RowTask::Labelled => RowAnswers::of(read_labelled(fields).map_err(wrong)?),
            RowTask::Prompts => unreachable!("returned above"),
        };
        let RowAnswers { contents, implicit_text, margin } = row;
        let is_plain = matches!(contents[0].0, RowContent::PromptCompletion { .. })
            && self.tokenizer.is_some_and(Tokenizer::has_chat_template);
        let mut examples = Vec::with_capacity(contents.len());
        for (content, preferred) in contents {
            check_tokenizer(&content, self.tokenizer, self.options)?;
            let example = encode(content, number.get(), self.tokenizer, self.options).map_err(wrong)?;
            self.check_vocabulary(&example, number)?;
            examples.push(Encoded { preferred, ..example });
        }
        if implicit_text {
            ignore_shared(&mut examples);
        }
        Ok(Ready { examples, number, format, found, is_plain, margin })
    }

    fn check_vocabulary(&self, example: &Encoded, number: RowNumber) -> Result<()> {
        let Some(vocab_size) = self.options.vocab_size else { return Ok(()) };
        let fits = |id: u32| (id as usize) < vocab_size;
        // Every label but −100 is an id; a negative one was refused when the row was read.
        let labels = example.labels.iter().filter_map(|&label| u32::try_from(label).ok());
        let refuse = |id, what| {
            let way_out = match self.tokenizer.map(Tokenizer::vocab_size).filter(|tokens| *tokens > id as usize) {
                Some(tokens) => {
                    format!("the tokenizer has {tokens}: load the model with resize_model_vocab = {tokens}")
                }
                None => "check that the row was made with this model's tokenizer".to_owned(),
            };
            let message = format!(
                "{what} {id} is outside the model's vocabulary of {vocab_size} (0 to {}); {way_out}",
                vocab_size.saturating_sub(1)
            );
            Err(Error::row(self.path(), number, message))
        };
        match (example.input_ids.iter().copied().find(|&id| !fits(id)), labels.clone().find(|&id| !fits(id))) {
            (Some(id), _) => refuse(id, "token id"),
            (None, Some(id)) => refuse(id, "label"),
            (None, None) => Ok(()),
        }
    }

    fn add(&mut self, row: Ready) -> Result<()> {
        let Ready { examples, number, format, found, is_plain, margin } = row;
        let at = RowPlace { file: self.file, row: number };
        let is_prompt = self.options.task == RowTask::Prompts;
        let len = examples.iter().map(|example| example.input_ids.len()).max().unwrap_or(0);
        self.report.rows += 1;
        self.report.plain_prompts += usize::from(is_plain);
        self.report.formats.insert(format);
        self.found |= found;
        if len > self.report.longest {
            (self.report.longest, self.report.longest_at) = (len, Some(at));
        }
        if examples.iter().any(|example| example.notes.not_shown) {
            self.report.changed(RowChange::NotShown, at);
            if self.options.not_shown == NotShown::Drop {
                return Ok(());
            }
        }
        if are_same(&examples) {
            self.report.changed(RowChange::Identical, at);
            return Ok(());
        }
        if examples.iter().any(|example| example.notes.joined) {
            self.report.changed(RowChange::Joined, at);
        }
        if !is_prompt && examples.iter().any(|example| example.trained_tokens() == 0) {
            self.untrained.push(at);
            return Ok(());
        }
        // A prompt leaves space for a token of its answer.
        if len + usize::from(is_prompt) <= self.options.max_seq_length {
            examples.iter().for_each(|example| self.examples.push(example, self.file, number));
            self.examples.push_margin(margin, examples.len());
            return Ok(());
        }
        self.fit(examples, len, at)
    }

    /// Treats a row that is too long as the options require.
    fn fit(&mut self, examples: Vec<Encoded>, len: usize, at: RowPlace) -> Result<()> {
        let max = self.options.max_seq_length;
        match self.options.overlong {
            Overlong::Error if self.options.task == RowTask::Prompts => {
                let message = format!(
                    "the prompt has {len} tokens, which leaves none of max_seq_length = {max} for an answer; raise it, or set \
                     data.overlong = \"drop\""
                );
                return Err(Error::row(self.path(), at.row, message));
            }
            Overlong::Error => {
                let split = if self.options.task == RowTask::Sft { " | \"split\"" } else { "" };
                let cut = if self.options.task == RowTask::ScoredPairs { "" } else { " | \"truncate\"" };
                let message = format!(
                    "has {len} tokens, more than max_seq_length = {max}; raise it, or set \
                     data.overlong = \"drop\"{cut}{split}"
                );
                return Err(Error::row(self.path(), at.row, message));
            }
            Overlong::Drop => self.report.changed(RowChange::Dropped, at),
            Overlong::Truncate => {
                // Each side of a pair is cut alone.
                let examples: Vec<_> = examples.into_iter().map(|example| overlong::truncate(example, max)).collect();
                let is_left = examples.iter().all(|example| example.trained_tokens() > 0);
                self.report.changed(
                    match (is_left, are_same(&examples)) {
                        (false, _) => RowChange::Dropped,
                        (true, true) => RowChange::Identical,
                        (true, false) => RowChange::Truncated,
                    },
                    at,
                );
                if is_left && !are_same(&examples) {
                    examples.iter().for_each(|example| self.examples.push(example, at.file, at.row));
                }
            }
            Overlong::Split => {
                self.report.changed(RowChange::Split, at);
                let pieces = examples.iter().flat_map(|example| overlong::split(example, max));
                for piece in pieces.filter(|piece| piece.trained_tokens() > 0) {
                    self.examples.push(&piece, at.file, at.row);
                }
            }
        }
        Ok(())
    }

    fn finish(self, fingerprint: Option<&str>) -> Result<(Dataset, LoadReport)> {
        let Loader { files, columns, options, mut report, examples, found, untrained, .. } = self;
        let of_all = |message: String| Error::dataset(Path::new(&name(files)), message);
        if let Some(missing) = columns.missing(found) {
            return Err(of_all(missing));
        }
        if untrained.len() == report.rows && options.task != RowTask::Prompts {
            return Err(of_all("no row has a token to train on: all labels are ignored".to_owned()));
        }
        if let Some(&RowPlace { file, row }) = untrained.first().filter(|_| options.untrained == Untrained::Error) {
            let mut message = "the row has no token to train on (the first token is never trained); remove it, or \
                               set data.untrained = \"drop\""
                .to_owned();
            if untrained.len() > 1 {
                message += &format!(" ({} of {} rows have this fault)", untrained.len(), report.rows);
            }
            return Err(Error::row(&files[file], row, message));
        }
        untrained.iter().for_each(|&at| report.changed(RowChange::Untrained, at));
        if examples.ends.is_empty() && report.not_shown == report.rows {
            return Err(of_all("no row is left: the chat template renders none of them completely".to_owned()));
        }
        if examples.ends.is_empty() && report.identical > 0 && report.dropped == 0 {
            return Err(of_all(
                "no row is left: the chosen and the rejected answer are the same in all of them".to_owned(),
            ));
        }
        if examples.ends.is_empty() {
            return Err(of_all(format!(
                "no row is left: each is longer than max_seq_length = {} (the longest has {} tokens)",
                options.max_seq_length, report.longest
            )));
        }
        report.examples = examples.ends.len();
        report.tokens = examples.input_ids.len();
        let fingerprint = fingerprint.map_or_else(|| of_contents(&examples), str::to_owned);
        let preferred = examples.preferred.iter().filter(|preferred| **preferred != 0).count();
        report.preferred = matches!(options.task, RowTask::Pairs | RowTask::Labelled).then_some(preferred);
        let dataset = Dataset::new(examples, files.to_vec(), fingerprint, options.task);
        report.trained_tokens = dataset.examples().map(|example| example.trained_tokens()).sum();
        Ok((dataset, report))
    }
}

/// The answers of a row, not yet encoded, each with its preference if it has one.
struct RowAnswers {
    contents: Vec<(RowContent, Option<bool>)>,
    /// True if the prompt ends where the tokens of the two texts differ.
    implicit_text: bool,
    /// The margin of a pair.
    margin: Option<f32>,
}

impl RowAnswers {
    fn of((format, preference): (RowFormat, Preference)) -> (RowFormat, Self) {
        let Preference { answers, implicit_text } = preference;
        let contents = answers.into_iter().map(|AnswerContent { content, preferred }| (content, Some(preferred)));
        (format, Self { contents: contents.collect(), implicit_text, margin: None })
    }
}

/// Takes the margin of a pair from its row: a number, or a cell of a CSV file. Null is no margin.
fn read_margin(fields: &mut Map<String, Value>) -> std::result::Result<Option<f32>, String> {
    let margin = match fields.shift_remove("margin") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Number(number)) => number.as_f64(),
        Some(Value::String(text)) if text.trim().is_empty() => return Ok(None),
        Some(Value::String(text)) => text.trim().parse().ok(),
        Some(_) => None,
    };
    let margin = margin.map(|margin| margin as f32).filter(|margin| margin.is_finite());
    margin.map(Some).ok_or_else(|| "\"margin\" is not a finite number".to_owned())
}

/// Returns true for a pair of answers without a difference.
fn are_same(examples: &[Encoded]) -> bool {
    matches!(examples, [chosen, rejected] if chosen.input_ids == rejected.input_ids)
}

/// Ignores the labels of the tokens that two texts begin with: they are the prompt.
fn ignore_shared(examples: &mut [Encoded]) {
    let [chosen, rejected] = examples else { return };
    let both = chosen.input_ids.iter().zip(&rejected.input_ids);
    let shared = both.take_while(|(chosen, rejected)| chosen == rejected).count();
    // An answer has at least its last token.
    let shared = shared.min(chosen.input_ids.len() - 1).min(rejected.input_ids.len() - 1);
    for example in [chosen, rejected] {
        example.labels[..shared].fill(IGNORED);
    }
}

/// Checks that the checkpoint has what the row format needs.
fn check_tokenizer(content: &RowContent, tokenizer: Option<&Tokenizer>, options: &EncodeOptions) -> Result<()> {
    match (content, tokenizer) {
        (RowContent::Messages { tools, .. }, Some(tokenizer)) => {
            tokenizer.chat_template_for(options.chat_template.as_deref(), tools.is_some()).map(|_| ())
        }
        (RowContent::Text(_) | RowContent::PromptCompletion { .. }, Some(_)) | (RowContent::InputIds { .. }, _) => {
            Ok(())
        }
        (_, None) => Err(Error::Tokenizer {
            path: "tokenizer.json".into(),
            message: "the checkpoint has none, and these rows are text; use rows of \"input_ids\" instead".to_owned(),
        }),
    }
}

/// Returns the fingerprint of examples from files that can be read only once.
fn of_contents(examples: &InMemory) -> String {
    let mut hash = Sha256::new();
    hash.update(bytemuck::cast_slice(examples.ends()));
    hash.update(bytemuck::cast_slice(examples.input_ids()));
    hash.update(bytemuck::cast_slice(examples.labels()));
    hash.update(bytemuck::cast_slice(examples.margins()));
    hex(&hash.finalize())
}

/// Returns the names of all files, for an error about all of them.
fn name(files: &[PathBuf]) -> String {
    match files {
        [] => "no file".to_owned(),
        [one] => one.display().to_string(),
        [first, rest @ ..] => format!("{} and {} more", first.display(), rest.len()),
    }
}
