use std::path::{Path, PathBuf};

use crate::cache;
use crate::columns::Columns;
use crate::dataset::{Dataset, load};
use crate::error::{Error, Result};
use crate::files;
use crate::options::EncodeOptions;
use crate::report::LoadReport;
use crate::tokenizer::Tokenizer;

/// The row files of a dataset.
///
/// The formats are JSON lines, JSON (a list of rows, or an object with one as `data`), CSV and TSV, each optionally
/// compressed by gzip or zstd, Parquet and Arrow IPC. The format of a file is detected by its first bytes, that of CSV
/// by its name; the [format of a row](crate::RowFormat) by its keys.
///
/// ```
/// use rekindle_data::{DataFiles, EncodeOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = tempfile::tempdir()?;
/// std::fs::write(dir.path().join("a.jsonl"), "{\"ids\": [5, 6, 7]}\n{\"ids\": [8, 9]}\n")?;
/// std::fs::write(dir.path().join("b.json"), "[{\"ids\": [1, 2, 3, 4]}]")?;
///
/// let files = DataFiles::find([dir.path().join("*.json*")])?;
/// let files = files.columns([("input_ids".to_owned(), "ids".to_owned())].into())?;
/// let (dataset, report) = files.load(None, &EncodeOptions::default())?;
/// assert_eq!((report.files.len(), report.rows, dataset.len()), (2, 3, 3));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataFiles {
    files: Vec<PathBuf>,
    columns: Columns,
    cache_dir: Option<PathBuf>,
    notices: Vec<String>,
}

impl DataFiles {
    /// Finds files, and those of directories and patterns (`*`, `?`, `[…]`, `**`), sorted by name. In directories with
    /// several splits, it finds the files of `train`.
    ///
    /// # Errors
    /// Those of [`find_split`](Self::find_split).
    pub fn find<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        Self::find_split(paths, None, &["train"])
    }

    /// Finds files as [`find`](Self::find) does; in directories, those of one split: `split`, or the first existing one
    /// of `defaults`.
    ///
    /// Names determine the split, as in Python's `datasets`: `train`, `training`; `validation`, `valid`, `val`, `dev`;
    /// `test`, `testing`, `eval`, `evaluation` as a word (delimited by non-letters) in the name of a file or of its
    /// folder, and any name before `-00000-of-00001`. A directory without such names is a single split. The
    /// [`LoadReport`] has a notice about omitted files. Folders of `Dataset.save_to_disk` and
    /// `DatasetDict.save_to_disk` are supported too.
    ///
    /// # Errors
    /// [`Error::Dataset`] for a pattern without a match, a directory without row files or without the split, or a file
    /// that occurs twice; [`Error::Options`] if `paths` is empty.
    pub fn find_split<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        split: Option<&str>,
        defaults: &[&str],
    ) -> Result<Self> {
        let paths: Vec<PathBuf> = paths.into_iter().map(|path| path.as_ref().to_owned()).collect();
        if paths.is_empty() {
            return Err(Error::Options("no data file is given; pass at least one".to_owned()));
        }
        let (files, notices) = files::find(&paths, split, defaults)?;
        Ok(DataFiles { files, columns: Columns::default(), cache_dir: None, notices })
    }

    /// Sets the files' columns for the keys of a row, such as `prompt` → `question`.
    ///
    /// # Errors
    /// [`Error::Options`] for a key that no row format has, or a column that is mapped twice.
    pub fn columns(mut self, columns: std::collections::BTreeMap<String, String>) -> Result<Self> {
        self.columns = Columns::new(columns)?;
        Ok(self)
    }

    /// Sets the directory for caching encoded rows, such as [`default_cache_dir`](crate::default_cache_dir). Rows are
    /// mapped from it when the same files are read again with the same tokenizer and options. Default: no cache.
    #[must_use]
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cache_dir = Some(dir.into());
        self
    }

    /// Returns the files, in reading order.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Returns the mapping of columns.
    pub(crate) fn mapped_columns(&self) -> &Columns {
        &self.columns
    }

    /// Reads and encodes all rows. Only rows of `input_ids` need no `tokenizer`.
    ///
    /// # Errors
    /// [`Error::Options`] for a `max_seq_length` under 2; [`Error::Tokenizer`] if rows need a chat template and the
    /// checkpoint has no valid one; [`Error::Read`]; [`Error::Row`] for a row that cannot be read or encoded, lacks a
    /// mapped column, is too long (with [`Overlong::Error`](crate::Overlong)), has a token id beyond the vocabulary or
    /// no label that counts; [`Error::Dataset`] for a file that is damaged or has no rows, if no row has a label that
    /// counts or is short enough, or if a file changes during the read. An unusable cache is ignored.
    pub fn load(&self, tokenizer: Option<&Tokenizer>, options: &EncodeOptions) -> Result<(Dataset, LoadReport)> {
        if options.max_seq_length < 2 {
            let max = options.max_seq_length;
            return Err(Error::Options(format!(
                "max_seq_length = {max} leaves nothing to predict; it must be at least 2"
            )));
        }
        options.check_preferences()?;
        let (dataset, mut report) = self.load_files(tokenizer, options)?;
        report.notices.splice(0..0, self.notices.iter().cloned());
        Ok((dataset, report))
    }

    fn load_files(&self, tokenizer: Option<&Tokenizer>, options: &EncodeOptions) -> Result<(Dataset, LoadReport)> {
        let Self { files, columns, cache_dir, .. } = self;
        let Some(fingerprint) = cache::fingerprint(files, columns, tokenizer, options)? else {
            return load(files, columns, tokenizer, options, None);
        };
        if let Some(found) = cache_dir.as_ref().and_then(|dir| cache::read(dir, &fingerprint.hex, files, options.task))
        {
            return Ok(found);
        }
        let (dataset, mut report) = load(files, columns, tokenizer, options, Some(&fingerprint.hex))?;
        fingerprint.check_unchanged(files)?;
        if let Some(dir) = cache_dir {
            cache::write(dir, &dataset, &mut report);
        }
        Ok((dataset, report))
    }
}

impl Dataset {
    /// Reads and encodes the rows of a file, or of all files of a directory or a pattern. Only rows of `input_ids` need
    /// no `tokenizer`.
    ///
    /// # Errors
    /// As [`DataFiles::find`] and [`DataFiles::load`].
    pub fn load(path: &Path, tokenizer: Option<&Tokenizer>, options: &EncodeOptions) -> Result<(Self, LoadReport)> {
        DataFiles::find([path])?.load(tokenizer, options)
    }
}
