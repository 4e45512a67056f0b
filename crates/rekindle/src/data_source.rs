//! Where rows come from: files, directories, patterns, dataset repositories.

use core::fmt;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rekindle_data::{
    DataFiles, Dataset, EncodeOptions, LoadReport, NotShown, Overlong, RowPart, RowSample, Thinking, Tokenizer,
    TrainOn, Untrained, default_cache_dir, is_file_name,
};

use crate::Error;
use crate::source::Access;

/// The rows of a run: files, and how they are read.
///
/// A file of JSON lines, JSON, CSV, Parquet or Arrow, a directory of such files, a pattern such as `data/*.parquet`, the
/// name of a dataset on the Hugging Face hub, or several of these. A path that exists comes first; a pattern, a name that
/// ends as those of files do, and one that begins with `./`, `../`, `/` or `~` are never looked for on the hub.
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
    paths: Vec<PathBuf>,
    columns: BTreeMap<String, String>,
    overlong: Overlong,
    train_on: TrainOn,
    thinking: Thinking,
    untrained: Untrained,
    not_shown: NotShown,
    chat_template: Option<String>,
    text_end_token: bool,
    sample: RowSample,
    part: RowPart,
    cache_dir: Option<PathBuf>,
    revision: Option<String>,
    subset: Option<String>,
    split: Option<String>,
    /// The splits that are looked for where none is named, in this order.
    default_splits: &'static [&'static str],
    access: Access,
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
            not_shown: NotShown::Error,
            chat_template: None,
            text_end_token: true,
            sample: RowSample::default(),
            part: RowPart::Kept,
            cache_dir: None,
            revision: None,
            subset: None,
            split: None,
            default_splits: &["train"],
            access: Access::default(),
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

    /// What happens to rows of which the chat template leaves something out. Default: an error that names row and part.
    #[must_use]
    pub fn not_shown(mut self, not_shown: NotShown) -> Self {
        self.not_shown = not_shown;
        self
    }

    /// The name of one of several chat templates. Default: `tool_use` for rows with tools, where there is one, else
    /// `default`.
    #[must_use]
    pub fn chat_template(mut self, name: Option<String>) -> Self {
        self.chat_template = name;
        self
    }

    /// Sets whether rows of `text` end with the end token, which counts in the loss. Default true.
    ///
    /// Without it, the loss of a text is that of its own tokens, as other programs report it; a model trained so does not
    /// learn where texts end. A token that the tokenizer itself puts at the end stays.
    #[must_use]
    pub fn text_end_token(mut self, text_end_token: bool) -> Self {
        self.text_end_token = text_end_token;
        self
    }

    /// Draws a part of the rows: at most `max_rows`, without those held out. Default: all.
    #[must_use]
    pub fn sample(mut self, sample: RowSample) -> Self {
        self.sample = sample;
        self
    }

    /// The rows that [`sample`](Self::sample) holds out.
    #[must_use]
    pub fn held_out_rows(mut self) -> Self {
        self.part = RowPart::HeldOut;
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

    /// Of datasets on the hub: a branch, tag or commit. Default `main`.
    #[must_use]
    pub fn revision(mut self, revision: Option<String>) -> Self {
        self.revision = revision;
        self
    }

    /// Of datasets on the hub: the folder of one of several sets of rows.
    #[must_use]
    pub fn subset(mut self, subset: Option<String>) -> Self {
        self.subset = subset;
        self
    }

    /// Of directories and datasets on the hub: `train`, `test` or another word of their files' names. Default `train`.
    #[must_use]
    pub fn split(mut self, split: Option<String>) -> Self {
        self.split = split;
        self
    }

    /// Takes `test` for the split where none is given, or `validation` of a directory without `test`.
    #[must_use]
    pub fn held_out(mut self) -> Self {
        self.default_splits = &["test", "validation"];
        self
    }

    /// How the hub is asked: the token, the place of downloads, and whether the network is left alone. Default: as the
    /// environment says.
    #[must_use]
    pub fn hub(mut self, token: Option<String>, cache_dir: Option<PathBuf>, local_files_only: bool) -> Self {
        self.access = Access { token, cache_dir, local_files_only };
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

    /// Returns true if any of it is looked for on the hub.
    pub fn is_on_hub(&self) -> bool {
        self.paths.iter().any(|path| name_on_hub(path).is_some())
    }

    /// The files and patterns on disk, after what is missing was downloaded, and what the user should be told.
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
        let options = [("revision", &self.revision), ("subset", &self.subset)];
        if let Some((key, value)) = options.iter().find_map(|(key, value)| Some((key, value.as_ref()?))) {
            return Err(Error::Argument(format!(
                "{key} = {value:?} is for datasets on the hub, and {self} is on disk; leave it out"
            )));
        }
        match &self.split {
            Some(split) if !paths.iter().any(|path| path.is_dir()) => Err(Error::Argument(format!(
                "split = {split:?} chooses among the files of a directory or of a dataset on the hub, and {self} is \
                 neither; leave it out"
            ))),
            _ => Ok((paths, notices)),
        }
    }

    /// The files of a dataset repository.
    #[cfg(feature = "network")]
    fn fetch(&self, name: &str) -> Result<(Vec<PathBuf>, Option<String>), Error> {
        use rekindle_hub::{DatasetPart, HubErrorKind, HubOptions, resolve_rows};

        let split = self.split.clone().unwrap_or_else(|| self.default_splits[0].to_owned());
        let options = HubOptions {
            revision: self.revision.clone(),
            token: self.access.token.clone(),
            cache_dir: self.access.cache_dir.clone(),
            local_files_only: self.access.local_files_only,
            endpoint: None,
            on_progress: None,
        };
        let rows = resolve_rows(name, &DatasetPart { subset: self.subset.clone(), split }, options);
        let rows = rows.map_err(|error| match error.hub_kind() {
            // A mistyped path looks like a name.
            Some(HubErrorKind::NotFound | HubErrorKind::Network | HubErrorKind::Offline | HubErrorKind::Denied) => {
                Error::NoSuchRows { path: name.into(), source: Box::new(error.into()) }
            }
            _ => error.into(),
        })?;
        Ok((rows.files, rows.notice))
    }

    /// An error: there is no network.
    #[cfg(not(feature = "network"))]
    fn fetch(&self, name: &str) -> Result<(Vec<PathBuf>, Option<String>), Error> {
        Err(Error::Argument(format!(
            "{name}: there is no such file or directory, and this program was built without names on the hub (the feature network)"
        )))
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
            not_shown: self.not_shown,
            chat_template: self.chat_template.clone(),
            text_end_token: self.text_end_token,
        };
        self.sample.check()?;
        let (paths, notices) = self.find()?;
        let files = DataFiles::find_split(paths, self.split.as_deref(), self.default_splits)?;
        let mut files = files.columns(self.columns.clone())?;
        if let Some(dir) = &self.cache_dir {
            files = files.cache_dir(dir);
        }
        let (dataset, mut report) = files.load(tokenizer, &options)?;
        report.notices.splice(0..0, notices);
        Ok(self.sample.take(&dataset, &report, self.part)?)
    }
}

/// The name of a dataset on the hub: nothing on disk, no pattern, and neither a file's name nor a path.
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
