//! Rows as a model takes them, without its weights.

use core::fmt;

use rekindle_data::{Dataset, LoadReport, Tokenizer};
use rekindle_hub::read_json;
use rekindle_lora::saved_rows;
use rekindle_models::ModelConfig;

use crate::{DataSource, Error, Loader};

/// What encoding rows needs to know of a model: its tokenizer, its vocabulary and how long a row may be.
#[derive(Debug)]
pub struct RowEncoder {
    tokenizer: Option<Tokenizer>,
    max_seq_length: usize,
    vocab_size: usize,
}

impl Loader<'_> {
    /// What encodes rows for the model as these arguments describe it. No weight is read, but a name on the hub is
    /// downloaded whole.
    ///
    /// # Errors
    /// Those of [`fetch`](Self::fetch); [`Error::Data`] for a broken tokenizer, [`Error::Model`] for a configuration that
    /// is not supported. A checkpoint without `tokenizer.json` will do for token ids.
    pub fn row_encoder(&mut self) -> Result<RowEncoder, Error> {
        let files = self.fetch()?.clone();
        let path = files.model.join("config.json");
        let config = ModelConfig::from_json(&read_json(&path)?)
            .map_err(|problems| rekindle_models::Error::Config { path, problems })?;
        let adapter = files.adapter.as_deref().or(self.adapter.as_deref());
        let (_, max_seq_length) = self.positions(adapter, &config)?;
        let saved = adapter.map(saved_rows).transpose().map_err(rekindle_models::Error::from)?.flatten();
        let vocab_size = self.args.resize_model_vocab.or(saved).unwrap_or(config.vocab_size());
        Ok(RowEncoder { tokenizer: files.load_tokenizer()?, max_seq_length, vocab_size })
    }
}

/// Rows that were encoded before their model was loaded.
#[derive(Clone, Debug)]
pub struct EncodedRows {
    pub(crate) source: DataSource,
    pub(crate) dataset: Dataset,
    pub(crate) report: LoadReport,
    /// What they were encoded for.
    pub(crate) max_seq_length: usize,
    pub(crate) vocab_size: usize,
}

impl EncodedRows {
    /// Returns the examples.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// Returns what was found in the files.
    pub fn report(&self) -> &LoadReport {
        &self.report
    }

    /// Returns where the rows come from.
    pub fn source(&self) -> &DataSource {
        &self.source
    }
}

impl fmt::Display for EncodedRows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.report)
    }
}

impl RowEncoder {
    /// Encodes the rows of `source`, to be trained on or evaluated by an [`SftTrainer`](crate::SftTrainer).
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn encode_rows(&self, source: DataSource) -> Result<EncodedRows, Error> {
        let (dataset, report) = self.encode(&source)?;
        let (max_seq_length, vocab_size) = (self.max_seq_length, self.vocab_size);
        Ok(EncodedRows { source, dataset, report, max_seq_length, vocab_size })
    }

    /// The rows of `data`, and what was found in its files.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn encode(&self, data: &DataSource) -> Result<(Dataset, LoadReport), Error> {
        data.encode(self.tokenizer.as_ref(), self.max_seq_length, self.vocab_size)
    }

    /// The checkpoint's tokenizer, if it has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Returns the checkpoint's tokenizer, if it has one.
    pub fn into_tokenizer(self) -> Option<Tokenizer> {
        self.tokenizer
    }

    /// The most tokens of a row.
    pub fn max_seq_length(&self) -> usize {
        self.max_seq_length
    }

    /// The same for rows of any length.
    #[must_use]
    pub fn of_any_length(self) -> Self {
        Self { max_seq_length: usize::MAX, ..self }
    }
}
