use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::encode::{Encoded, Example, encode};
use crate::error::{Error, Result};
use crate::jsonl::{RowReader, no_rows};
use crate::mask::{Thinking, TrainOn, Untrained};
use crate::overlong::{self, Overlong};
use crate::row::{RowContent, RowFormat};
use crate::tokenizer::Tokenizer;

/// Encoded rows, in the order of their file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Dataset {
    examples: Vec<Encoded>,
    path: PathBuf,
}

/// What a row must fit into.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EncodeOptions {
    /// The most tokens of an example, at least 2.
    pub max_seq_length: usize,
    /// What happens to longer rows.
    pub overlong: Overlong,
    /// The vocabulary of the model; an id that is not below it is an error.
    pub vocab_size: Option<usize>,
    /// Which turns of a conversation are trained.
    pub train_on: TrainOn,
    /// What happens to reasoning.
    pub thinking: Thinking,
    /// What happens to rows without a label that counts.
    pub untrained: Untrained,
}

impl Default for EncodeOptions {
    fn default() -> Self {
        EncodeOptions {
            max_seq_length: 2048,
            overlong: Overlong::Error,
            vocab_size: None,
            train_on: TrainOn::Assistant,
            thinking: Thinking::Keep,
            untrained: Untrained::Error,
        }
    }
}

/// What loading a dataset found and did; `Display` gives it in one line.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct LoadReport {
    /// The shapes of rows that occur.
    pub formats: BTreeSet<RowFormat>,
    /// Rows in the file.
    pub rows: usize,
    /// Examples made of them.
    pub examples: usize,
    /// Tokens of all examples.
    pub tokens: usize,
    /// Labels that count, of all examples.
    pub trained_tokens: usize,
    /// Tokens of the longest row in the file, before anything was cut.
    pub longest: usize,
    /// The line of that row.
    pub longest_line: usize,
    /// Rows left out because they were too long, or because truncation left nothing to learn of them.
    pub dropped: usize,
    /// Rows cut at `max_seq_length`.
    pub truncated: usize,
    /// Rows made into several examples.
    pub split: usize,
    /// Rows left out because no label of them counts.
    pub untrained: usize,
}

impl Dataset {
    /// How many examples there are.
    #[allow(clippy::len_without_is_empty, reason = "loading refuses a dataset without examples")]
    pub fn len(&self) -> usize {
        self.examples.len()
    }

    /// An example.
    ///
    /// # Panics
    /// When there are not that many.
    pub fn example(&self, index: usize) -> Example<'_> {
        let Encoded { input_ids, labels, line } = &self.examples[index];
        Example { input_ids, labels, line: *line, path: &self.path }
    }

    /// All examples, in order.
    pub fn examples(&self) -> impl ExactSizeIterator<Item = Example<'_>> + Clone {
        (0..self.len()).map(|index| self.example(index))
    }

    /// Reads and encodes a JSONL file. Only rows of `input_ids` do without a `tokenizer`.
    ///
    /// # Errors
    /// [`Error::Options`] for a `max_seq_length` under 2; [`Error::Tokenizer`] when rows need a chat template and the
    /// checkpoint has none that parses; [`Error::Read`]; [`Error::Row`] for a line that cannot be read
    /// or encoded, is too long (with [`Overlong::Error`]), has a token id beyond the vocabulary or no label that counts;
    /// [`Error::Dataset`] when there is no row, no row has a label that counts, or none is short enough.
    pub fn load(path: &Path, tokenizer: Option<&Tokenizer>, options: &EncodeOptions) -> Result<(Self, LoadReport)> {
        if options.max_seq_length < 2 {
            let max = options.max_seq_length;
            return Err(Error::Options(format!(
                "max_seq_length = {max} leaves nothing to predict; it must be at least 2"
            )));
        }
        let mut loader =
            Loader { path, options, report: LoadReport::default(), examples: Vec::new(), untrained: Vec::new() };
        for row in RowReader::open(path)? {
            let row = row?;
            loader.check_tokenizer(&row.content, tokenizer)?;
            loader.report.formats.insert(row.content.format());
            let example = encode(row.content, row.line, tokenizer, options)
                .map_err(|message| Error::row(path, row.line, message))?;
            loader.add(example)?;
        }
        loader.finish()
    }
}

struct Loader<'a> {
    path: &'a Path,
    options: &'a EncodeOptions,
    report: LoadReport,
    examples: Vec<Encoded>,
    /// Lines without a label that counts; an error, but which depends on the rest of the file.
    untrained: Vec<usize>,
}

impl Loader<'_> {
    /// What a kind of row needs of the checkpoint is missed there, not in the row.
    fn check_tokenizer(&mut self, content: &RowContent, tokenizer: Option<&Tokenizer>) -> Result<()> {
        match (content, tokenizer) {
            (RowContent::Messages { .. }, Some(tokenizer)) => tokenizer.chat_template().map(|_| ()),
            (RowContent::Text(_) | RowContent::PromptCompletion { .. }, Some(_)) | (RowContent::InputIds { .. }, _) => {
                Ok(())
            }
            (_, None) => Err(Error::Tokenizer {
                path: "tokenizer.json".into(),
                message: "the checkpoint has none, but these rows are text; only rows of \"input_ids\" do without"
                    .to_owned(),
            }),
        }
    }

    fn add(&mut self, example: Encoded) -> Result<()> {
        let len = example.input_ids.len();
        self.report.rows += 1;
        if len > self.report.longest {
            (self.report.longest, self.report.longest_line) = (len, example.line);
        }
        self.check_vocabulary(&example)?;
        if example.trained_tokens() == 0 {
            self.untrained.push(example.line);
            return Ok(());
        }
        if len <= self.options.max_seq_length {
            self.examples.push(example);
            return Ok(());
        }
        self.fit(example)
    }

    /// Does with a row that is too long what the options say.
    fn fit(&mut self, example: Encoded) -> Result<()> {
        let max = self.options.max_seq_length;
        match self.options.overlong {
            Overlong::Error => {
                let message = format!(
                    "has {} tokens, more than max_seq_length = {max}; raise it, or set \
                     data.overlong = \"drop\" | \"truncate\" | \"split\"",
                    example.input_ids.len()
                );
                return Err(Error::row(self.path, example.line, message));
            }
            Overlong::Drop => self.report.dropped += 1,
            Overlong::Truncate => {
                let example = overlong::truncate(example, max);
                if example.trained_tokens() > 0 {
                    self.report.truncated += 1;
                    self.examples.push(example);
                } else {
                    self.report.dropped += 1;
                }
            }
            Overlong::Split => {
                self.report.split += 1;
                let pieces = overlong::split(&example, max);
                self.examples.extend(pieces.into_iter().filter(|piece| piece.trained_tokens() > 0));
            }
        }
        Ok(())
    }

    fn check_vocabulary(&self, example: &Encoded) -> Result<()> {
        let Some(vocab_size) = self.options.vocab_size else { return Ok(()) };
        let fits = |id: u32| (id as usize) < vocab_size;
        // Every label but −100 is an id; a negative one was refused when the row was read.
        let labels = example.labels.iter().filter_map(|&label| u32::try_from(label).ok());
        let refuse = |id, what| {
            let message = format!(
                "{what} {id} is beyond the model's vocabulary of {vocab_size} (0 to {}); was the row made with another \
                 tokenizer?",
                vocab_size.saturating_sub(1)
            );
            Err(Error::row(self.path, example.line, message))
        };
        match (example.input_ids.iter().copied().find(|&id| !fits(id)), labels.clone().find(|&id| !fits(id))) {
            (Some(id), _) => refuse(id, "token id"),
            (None, Some(id)) => refuse(id, "label"),
            (None, None) => Ok(()),
        }
    }

    fn finish(self) -> Result<(Dataset, LoadReport)> {
        let Loader { path, options, mut report, examples, untrained } = self;
        if report.rows == 0 {
            return Err(no_rows(path));
        }
        if untrained.len() == report.rows {
            return Err(Error::dataset(path, "all labels are ignored: no row has a token to learn"));
        }
        report.untrained = untrained.len();
        if let Some(&line) = untrained.first().filter(|_| options.untrained == Untrained::Error) {
            return Err(Error::row(
                path,
                line,
                "no label counts: the row has nothing to learn (the first token never does); remove it, or set \
                 data.untrained = \"drop\"",
            ));
        }
        if examples.is_empty() {
            let message = format!(
                "no row is left: each is longer than max_seq_length = {} (the longest has {} tokens)",
                options.max_seq_length, report.longest
            );
            return Err(Error::dataset(path, message));
        }
        report.examples = examples.len();
        report.tokens = examples.iter().map(|example| example.input_ids.len()).sum();
        report.trained_tokens = examples.iter().map(Encoded::trained_tokens).sum();
        Ok((Dataset { examples, path: path.to_owned() }, report))
    }
}

impl fmt::Display for LoadReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let formats = self.formats.iter().map(RowFormat::to_string).collect::<Vec<_>>().join("; ");
        write!(
            f,
            "{} rows ({formats}), {} tokens, {} trained; longest row {} (line {})",
            self.rows, self.tokens, self.trained_tokens, self.longest, self.longest_line
        )?;
        for (count, what) in [
            (self.dropped, "dropped"),
            (self.truncated, "truncated"),
            (self.split, "split"),
            (self.untrained, "dropped with nothing to train"),
        ] {
            if count > 0 {
                write!(f, "; {count} {what}")?;
            }
        }
        if self.split > 0 {
            write!(f, " ({} examples)", self.examples)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
