//! Where rows come from: files, directories, patterns.

use core::fmt;
use std::collections::BTreeMap;
use std::path::PathBuf;

use rekindle_data::{
    DataFiles, Dataset, EncodeOptions, LoadReport, Overlong, Thinking, Tokenizer, TrainOn, Untrained, default_cache_dir,
};

use crate::Error;

/// The rows of a run: files, and how they are read.
///
/// A file of JSON lines, JSON or Parquet, a directory of such files, a pattern such as `data/*.parquet`, or several of
/// these.
///
/// ```
/// use rekindle::{DataSource, Overlong};
///
/// let data = DataSource::new("train.jsonl").overlong(Overlong::Drop);
/// let data = DataSource::of(["a.parquet", "more/*.jsonl"]).columns([("prompt", "question"), ("completion", "answer")]);
/// assert_eq!(data.to_string(), "a.parquet, more/*.jsonl");
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataSource {
    paths: Vec<PathBuf>,
    columns: BTreeMap<String, String>,
    overlong: Overlong,
    train_on: TrainOn,
    thinking: Thinking,
    untrained: Untrained,
    cache_dir: Option<PathBuf>,
}

impl DataSource {
    /// A file, a directory or a pattern. No row may be longer than the model's `max_seq_length`.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::of([path])
    }

    /// Several of them, in this order.
    pub fn of<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Self {
        let paths = paths.into_iter().map(Into::into).collect();
        Self {
            paths,
            columns: BTreeMap::new(),
            overlong: Overlong::Error,
            train_on: TrainOn::Assistant,
            thinking: Thinking::Keep,
            untrained: Untrained::Error,
            cache_dir: None,
        }
    }

    /// What happens to longer rows. Default: an error that names the row.
    #[must_use]
    pub fn overlong(mut self, overlong: Overlong) -> Self {
        self.overlong = overlong;
        self
    }

    /// Which turns of a conversation are trained. Default: all of the assistant's.
    #[must_use]
    pub fn train_on(mut self, train_on: TrainOn) -> Self {
        self.train_on = train_on;
        self
    }

    /// What happens to the reasoning of a conversation. Default: it is trained as the template shows it.
    #[must_use]
    pub fn thinking(mut self, thinking: Thinking) -> Self {
        self.thinking = thinking;
        self
    }

    /// What happens to rows with nothing to train. Default: an error that names the row.
    #[must_use]
    pub fn untrained(mut self, untrained: Untrained) -> Self {
        self.untrained = untrained;
        self
    }

    /// Which column of the files stands for which key of a row, as `("prompt", "question")`.
    #[must_use]
    pub fn columns<K: Into<String>, V: Into<String>>(mut self, columns: impl IntoIterator<Item = (K, V)>) -> Self {
        self.columns = columns.into_iter().map(|(key, column)| (key.into(), column.into())).collect();
        self
    }

    /// Whether the encoded rows are kept, in `REKINDLE_CACHE` or the user's directory of caches, and memory-mapped from
    /// there when the same bytes come again with the same tokenizer and options. Default: not.
    #[must_use]
    pub fn cache(mut self, cache: bool) -> Self {
        self.cache_dir = if cache { default_cache_dir() } else { None };
        self
    }

    /// Reads and encodes the rows.
    pub(crate) fn encode(
        &self,
        tokenizer: Option<&Tokenizer>,
        max_seq_length: usize,
        vocab_size: usize,
    ) -> Result<(Dataset, LoadReport), Error> {
        let options = EncodeOptions {
            max_seq_length,
            overlong: self.overlong,
            vocab_size: Some(vocab_size),
            train_on: self.train_on,
            thinking: self.thinking,
            untrained: self.untrained,
        };
        let mut files = DataFiles::find(&self.paths)?.columns(self.columns.clone())?;
        if let Some(dir) = &self.cache_dir {
            files = files.cache_dir(dir);
        }
        Ok(files.load(tokenizer, &options)?)
    }
}

impl fmt::Display for DataSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
        f.write_str(&paths.join(", "))
    }
}
