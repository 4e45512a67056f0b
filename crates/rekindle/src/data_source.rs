//! Rows of files, directories, patterns and datasets on the hub.

use core::fmt;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rekindle_data::{
    DataFiles, Dataset, EncodeOptions, LoadReport, NotShown, Overlong, RawRow, RowPart, RowSample, RowTask, Thinking,
    Tokenizer, TrainOn, Untrained, default_cache_dir, is_file_name,
};

use crate::run::DataArguments;
use crate::{Error, HubAccess};

/// Rows to train on or to evaluate: files, and how they are encoded.
///
/// A file of JSON lines, JSON, CSV, Parquet or Arrow, a directory of such files, a pattern such as `data/*.parquet`,
/// the name of a dataset on the Hugging Face hub, or several of these. An existing path takes precedence over a name;
/// patterns, names with the ending of a row file, and paths that begin with `./`, `../`, `/` or `~` are never names on
/// the hub.
///
/// The setters of arguments set the fields of a [`DataArguments`], whose `train_source` and `eval_source` make the rows
/// of a run file.
///
/// ```
/// use rekindle::{DataSource, Overlong};
///
/// let data = DataSource::new("train.jsonl").overlong(Overlong::Drop);
/// let data = DataSource::of(["a.parquet", "more/*.jsonl"]).columns([("prompt", "question"), ("completion", "answer")]);
/// assert_eq!(data.to_string(), "a.parquet, more/*.jsonl");
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct DataSource {
    pub(crate) paths: Vec<PathBuf>,
    pub(crate) split: Option<String>,
    /// The splits to look for if `split` is `None`, in this order.
    pub(crate) default_splits: &'static [&'static str],
    pub(crate) part: RowPart,
    pub(crate) task: RowTask,
    /// The encoding of the rows; its paths and splits are not used.
    pub(crate) args: DataArguments,
    pub(crate) access: HubAccess,
}

/// The splits of rows to train on.
const TRAIN_SPLITS: &[&str] = &["train"];
/// The splits of rows to evaluate.
const EVAL_SPLITS: &[&str] = &["test", "validation"];

impl DataSource {
    /// Returns the rows of a file, a directory, a pattern or a dataset. A row longer than the model's `max_seq_length`
    /// is an error.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::of([path])
    }

    /// Returns the rows of several paths, in this order.
    pub fn of<P: Into<PathBuf>>(paths: impl IntoIterator<Item = P>) -> Self {
        let args = DataArguments { cache: false, ..DataArguments::default() };
        Self::with_arguments(paths.into_iter().map(Into::into).collect(), args)
    }

    /// Returns the rows of several paths, encoded as `args` describes.
    pub(crate) fn with_arguments(paths: Vec<PathBuf>, args: DataArguments) -> Self {
        let (split, part, access) = (None, RowPart::Kept, HubAccess::default());
        Self { paths, split, default_splits: TRAIN_SPLITS, part, task: RowTask::Sft, args, access }
    }

    /// Sets the treatment of rows longer than `max_seq_length`. Default: an error that names the row.
    #[must_use]
    pub fn overlong(mut self, overlong: Overlong) -> Self {
        self.args.overlong = overlong;
        self
    }

    /// Sets the turns of a conversation that the loss covers. Default: all of the assistant's.
    #[must_use]
    pub fn train_on(mut self, train_on: TrainOn) -> Self {
        self.args.train_on = train_on;
        self
    }

    /// Sets the treatment of reasoning in conversations. Default: it is trained as the template renders it.
    #[must_use]
    pub fn thinking(mut self, thinking: Thinking) -> Self {
        self.args.thinking = thinking;
        self
    }

    /// Sets the treatment of rows without a token to train. Default: an error that names the row.
    #[must_use]
    pub fn untrained(mut self, untrained: Untrained) -> Self {
        self.args.untrained = untrained;
        self
    }

    /// Sets the treatment of rows of which the chat template omits a part. Default: an error that names row and part.
    #[must_use]
    pub fn not_shown(mut self, not_shown: NotShown) -> Self {
        self.args.not_shown = not_shown;
        self
    }

    /// Sets the name of one of the tokenizer's chat templates. Default: `tool_use` for rows with tools if it exists,
    /// else `default`.
    #[must_use]
    pub fn chat_template(mut self, name: Option<String>) -> Self {
        self.args.chat_template = name;
        self
    }

    /// If true, plain text ends with the end token, which the loss covers. Default true.
    ///
    /// Without it, the loss of a text covers only its own tokens, as other programs report it, and a model trained on
    /// such rows does not learn where texts end. An end token that the tokenizer itself adds is kept.
    #[must_use]
    pub fn text_end_token(mut self, text_end_token: bool) -> Self {
        self.args.text_end_token = text_end_token;
        self
    }

    /// Selects a sample of the rows: at most `max_rows`, without held-out rows. Default: all.
    #[must_use]
    pub fn sample(mut self, sample: RowSample) -> Self {
        let RowSample { max_rows, held_out, seed } = sample;
        (self.args.max_rows, self.args.eval_fraction, self.args.sample_seed) = (max_rows, held_out, seed);
        self
    }

    /// Sets the kind of rows that a training method reads. Default: rows to imitate.
    #[must_use]
    pub fn task(mut self, task: RowTask) -> Self {
        self.task = task;
        self
    }

    /// Selects the rows that [`sample`](Self::sample) holds out.
    #[must_use]
    pub fn held_out_rows(mut self) -> Self {
        self.part = RowPart::HeldOut;
        self
    }

    /// Sets the file's column for keys of a row, such as `("prompt", "question")`.
    #[must_use]
    pub fn columns<K: Into<String>, V: Into<String>>(mut self, columns: impl IntoIterator<Item = (K, V)>) -> Self {
        let columns = columns.into_iter().map(|(key, column)| (key.into(), column.into()));
        self.args.columns = columns.collect::<BTreeMap<_, _>>();
        self
    }

    /// If true, encoded rows are cached in `REKINDLE_CACHE` or the user's cache directory, and memory-mapped when the
    /// same files are encoded again with the same tokenizer and options. Default false.
    #[must_use]
    pub fn cache(mut self, cache: bool) -> Self {
        self.args.cache = cache;
        self
    }

    /// Sets the branch, tag or commit of datasets on the hub. Default `main`.
    #[must_use]
    pub fn revision(mut self, revision: Option<String>) -> Self {
        self.args.revision = revision;
        self
    }

    /// Sets the configuration of datasets on the hub: the folder of one of several sets of rows.
    #[must_use]
    pub fn subset(mut self, subset: Option<String>) -> Self {
        self.args.subset = subset;
        self
    }

    /// Sets the split of directories and datasets on the hub: `train`, `test` or another word of the files' names.
    /// Default `train`.
    #[must_use]
    pub fn split(mut self, split: Option<String>) -> Self {
        self.split = split;
        self
    }

    /// Changes the default split to `test`, or `validation` for a directory without `test`.
    #[must_use]
    pub fn held_out(mut self) -> Self {
        self.default_splits = EVAL_SPLITS;
        self
    }

    /// Sets the token, the cache and the use of the network. Default: as in the environment.
    #[must_use]
    pub fn hub(mut self, access: HubAccess) -> Self {
        self.access = access;
        self
    }

    /// Returns the names of its files and datasets, without the directories that they are in.
    pub(crate) fn names(&self) -> Vec<String> {
        let name = |path: &PathBuf| match name_on_hub(path) {
            Some(name) => name.to_owned(),
            None => path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned(),
        };
        self.paths.iter().map(name).collect()
    }

    /// Returns the names of datasets on the hub in it.
    pub(crate) fn names_on_hub(&self) -> Vec<String> {
        self.paths.iter().filter_map(|path| name_on_hub(path)).map(str::to_owned).collect()
    }

    /// Returns true if any of the rows are on the hub.
    pub fn is_on_hub(&self) -> bool {
        self.paths.iter().any(|path| name_on_hub(path).is_some())
    }

    /// Returns the files and patterns on disk, after downloading missing files, and notices for the user.
    fn find(&self) -> Result<(Vec<PathBuf>, Vec<String>), Error> {
        let (mut paths, mut notices) = (Vec::new(), Vec::new());
        for path in &self.paths {
            match name_on_hub(path) {
                Some(name) => {
                    let (files, notice) = self.fetch(name)?;
                    paths.extend(files);
                    notices.extend(notice);
                }
                None => paths.push(path.clone()),
            }
        }
        if self.is_on_hub() {
            return Ok((paths, notices));
        }
        let options = [("revision", &self.args.revision), ("subset", &self.args.subset)];
        if let Some((key, value)) = options.iter().find_map(|(key, value)| Some((key, value.as_ref()?))) {
            return Err(Error::Argument(format!(
                "{key} = {value:?} applies to datasets on the hub, but {self} is on disk; remove it"
            )));
        }
        match &self.split {
            Some(split) if !paths.iter().any(|path| path.is_dir()) => Err(Error::Argument(format!(
                "split = {split:?} selects files of a directory or of a dataset on the hub, but {self} is neither; \
                 remove it"
            ))),
            _ => Ok((paths, notices)),
        }
    }

    /// Downloads the files of a dataset on the hub; also returns a notice for the user.
    #[cfg(feature = "network")]
    fn fetch(&self, name: &str) -> Result<(Vec<PathBuf>, Option<String>), Error> {
        use rekindle_hub::{DatasetPart, HubErrorKind, resolve_rows};

        let split = self.split.clone().unwrap_or_else(|| self.default_splits[0].to_owned());
        let options = self.access.options(self.args.revision.as_deref());
        let rows = resolve_rows(name, &DatasetPart { subset: self.args.subset.clone(), split }, options);
        let rows = rows.map_err(|error| match error.hub_kind() {
            // A mistyped path looks like a name.
            Some(HubErrorKind::NotFound | HubErrorKind::Network | HubErrorKind::Offline | HubErrorKind::Denied) => {
                Error::NoSuchRows { path: name.into(), source: Box::new(error.into()) }
            }
            _ => error.into(),
        })?;
        Ok((rows.files, rows.notice))
    }

    /// Fails: names on the hub are not supported.
    #[cfg(not(feature = "network"))]
    fn fetch(&self, name: &str) -> Result<(Vec<PathBuf>, Option<String>), Error> {
        Err(Error::Argument(format!(
            "{name}: no such file or directory, and this build cannot download from the hub; build it with the \
             feature \"network\""
        )))
    }

    /// Reads the first `limit` rows, or all of them, without encoding them. Their columns are all kept; those of
    /// [`columns`](Self::columns) are renamed. A sample is not taken.
    ///
    /// # Errors
    /// Those of [`DataFiles::find_split`] and [`DataFiles::raw_rows`], and a dataset that cannot be downloaded.
    pub fn raw_rows(&self, limit: Option<usize>) -> Result<Vec<RawRow>, Error> {
        let (paths, _) = self.find()?;
        let files = DataFiles::find_split(paths, self.split.as_deref(), self.default_splits)?;
        Ok(files.columns(self.args.columns.clone())?.raw_rows(limit)?)
    }

    /// Reads and encodes the rows.
    pub(crate) fn encode(
        &self,
        tokenizer: Option<&Tokenizer>,
        max_seq_length: usize,
        vocab_size: usize,
    ) -> Result<(Dataset, LoadReport), Error> {
        let Self { args, .. } = self;
        let options = EncodeOptions {
            max_seq_length,
            overlong: args.overlong,
            vocab_size: Some(vocab_size),
            train_on: args.train_on,
            thinking: args.thinking,
            untrained: args.untrained,
            not_shown: args.not_shown,
            chat_template: args.chat_template.clone(),
            text_end_token: args.text_end_token,
            task: self.task,
        };
        let sample = args.sample();
        sample.check()?;
        let (paths, notices) = self.find()?;
        let files = DataFiles::find_split(paths, self.split.as_deref(), self.default_splits)?;
        let mut files = files.columns(args.columns.clone())?;
        if let Some(dir) = default_cache_dir().filter(|_| args.cache) {
            files = files.cache_dir(dir);
        }
        let (dataset, mut report) = files.load(tokenizer, &options)?;
        report.notices.splice(0..0, notices);
        Ok(sample.take(&dataset, &report, self.part)?)
    }
}

/// Returns the name of a dataset on the hub; `None` for an existing path, a pattern, a file name or a path.
fn name_on_hub(path: &Path) -> Option<&str> {
    let name = path.to_str().filter(|_| !path.exists())?;
    let is_path = path.is_absolute() || name.starts_with(['.', '~']) || name.ends_with('/');
    let is_name = !is_path && name.matches('/').count() == 1 && !name.contains(['*', '?', '[', '\\']);
    (is_name && !is_file_name(name)).then_some(name)
}

impl fmt::Display for DataSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let paths: Vec<_> = self.paths.iter().map(|path| path.display().to_string()).collect();
        f.write_str(&paths.join(", "))
    }
}
