use std::path::{Path, PathBuf};

use crate::cache;
use crate::columns::Columns;
use crate::dataset::{Dataset, load};
use crate::error::{Error, Result};
use crate::files;
use crate::options::EncodeOptions;
use crate::report::LoadReport;
use crate::tokenizer::Tokenizer;

/// The files that a dataset is made of, and how they are read.
///
/// JSON lines, JSON (a list of rows, or an object with one as `data`), CSV and TSV, each perhaps compressed by gzip or zstd,
/// Parquet and Arrow IPC. A file's first bytes tell its kind, except for CSV, which its name tells; the keys of each row
/// tell its [shape](crate::RowFormat).
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
    /// Finds files, and those of directories and patterns (`*`, `?`, `[…]`, `**`), sorted by name. Of directories with
    /// several splits, the files of `train` are found.
    ///
    /// # Errors
    /// Those of [`find_split`](Self::find_split).
    pub fn find<P: AsRef<Path>>(paths: impl IntoIterator<Item = P>) -> Result<Self> {
        Self::find_split(paths, None, &["train"])
    }

    /// Finds files as [`find`](Self::find) does, of directories those of one split: `split`, or the first of `defaults`
    /// that is there.
    ///
    /// Names tell the split, as for Python's `datasets`: `train`, `training`; `validation`, `valid`, `val`, `dev`; `test`,
    /// `testing`, `eval`, `evaluation` between other characters than letters, in the name of a file or of its folder, and
    /// any name before `-00000-of-00001`. A directory whose files say no split is one split. What is left out is a notice
    /// of the [`LoadReport`]. Folders of `Dataset.save_to_disk` and `DatasetDict.save_to_disk` are read too.
    ///
    /// # Errors
    /// [`Error::Dataset`] for a pattern that matches nothing, a directory without files of rows or of the split, a file
    /// that comes twice; [`Error::Options`] when `paths` is empty.
    pub fn find_split<P: AsRef<Path>>(
        paths: impl IntoIterator<Item = P>,
        split: Option<&str>,
        defaults: &[&str],
    ) -> Result<Self> {
        let paths: Vec<PathBuf> = paths.into_iter().map(|path| path.as_ref().to_owned()).collect();
        if paths.is_empty() {
            return Err(Error::Options("no file of rows is named".to_owned()));
        }
        let (files, notices) = files::find(&paths, split, defaults)?;
        Ok(DataFiles { files, columns: Columns::default(), cache_dir: None, notices })
    }

    /// Which column of the files stands for which key of a row, as `prompt` → `question`.
    ///
    /// # Errors
    /// [`Error::Options`] for a key that no shape of rows has, or a column that stands for two.
    pub fn columns(mut self, columns: std::collections::BTreeMap<String, String>) -> Result<Self> {
        self.columns = Columns::new(columns)?;
        Ok(self)
    }

    /// Keeps the encoded rows in this directory ([`default_cache_dir`](crate::default_cache_dir), say) and maps them from
    /// there when the same files are read again with the same tokenizer and options. Default: not.
    #[must_use]
    pub fn cache_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.cache_dir = Some(dir.into());
        self
    }

    /// The files, in the order in which they are read.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Reads and encodes all rows. Only rows of `input_ids` do without a `tokenizer`.
    ///
    /// # Errors
    /// [`Error::Options`] for a `max_seq_length` under 2; [`Error::Tokenizer`] when rows need a chat template and the
    /// checkpoint has none that parses; [`Error::Read`]; [`Error::Row`] for a row that cannot be read or encoded, lacks a
    /// mapped column, is too long (with [`Overlong::Error`](crate::Overlong)), has a token id beyond the vocabulary or no
    /// label that counts; [`Error::Dataset`] for a file that is damaged or has no row, and when no row has a label that
    /// counts or none is short enough, or a file was changed meanwhile. A cache that cannot be used is none.
    pub fn load(&self, tokenizer: Option<&Tokenizer>, options: &EncodeOptions) -> Result<(Dataset, LoadReport)> {
        if options.max_seq_length < 2 {
            let max = options.max_seq_length;
            return Err(Error::Options(format!(
                "max_seq_length = {max} leaves nothing to predict; it must be at least 2"
            )));
        }
        let (dataset, mut report) = self.load_files(tokenizer, options)?;
        report.notices.splice(0..0, self.notices.iter().cloned());
        Ok((dataset, report))
    }

    fn load_files(&self, tokenizer: Option<&Tokenizer>, options: &EncodeOptions) -> Result<(Dataset, LoadReport)> {
        let Self { files, columns, cache_dir, .. } = self;
        let Some(fingerprint) = cache::fingerprint(files, columns, tokenizer, options)? else {
            return load(files, columns, tokenizer, options, None);
        };
        if let Some(found) = cache_dir.as_ref().and_then(|dir| cache::read(dir, &fingerprint.hex, files)) {
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
    /// Reads and encodes the rows of a file, or of all files of a directory or a pattern. Only rows of `input_ids` do
    /// without a `tokenizer`.
    ///
    /// # Errors
    /// As [`DataFiles::find`] and [`DataFiles::load`].
    pub fn load(path: &Path, tokenizer: Option<&Tokenizer>, options: &EncodeOptions) -> Result<(Self, LoadReport)> {
        DataFiles::find([path])?.load(tokenizer, options)
    }
}
