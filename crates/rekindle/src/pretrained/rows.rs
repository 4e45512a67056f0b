//! Encoding of rows for a model, without its weights.

use core::fmt;

use rekindle_data::{Dataset, LoadReport, Tokenizer};
use rekindle_hub::read_json;
use rekindle_lora::saved_rows;
use rekindle_models::ModelConfig;

use crate::{DataSource, Error, Loader};

/// An encoder of rows: a model's tokenizer, vocabulary size and maximum row length.
#[derive(Debug)]
pub struct RowEncoder {
    tokenizer: Option<Tokenizer>,
    max_seq_length: usize,
    vocab_size: usize,
}

impl Loader<'_> {
    /// Returns the encoder of rows for the model that these arguments describe. No weight is read, but a name on the
    /// hub is downloaded completely.
    ///
    /// # Errors
    /// Those of [`fetch`](Self::fetch); [`Error::Data`] for an invalid tokenizer, [`Error::Model`] for a configuration
    /// that is not supported. Token ids can be encoded without a `tokenizer.json`.
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
    /// The maximum length and vocabulary size that they were encoded for.
    pub(crate) max_seq_length: usize,
    pub(crate) vocab_size: usize,
}

impl EncodedRows {
    /// Returns the examples.
    pub fn dataset(&self) -> &Dataset {
        &self.dataset
    }

    /// Returns the report about the files.
    pub fn report(&self) -> &LoadReport {
        &self.report
    }

    /// Returns the source of the rows.
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
    /// Encodes the rows of `source` for training or evaluation by an [`SftTrainer`](crate::SftTrainer).
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn encode_rows(&self, source: DataSource) -> Result<EncodedRows, Error> {
        let (dataset, report) = self.encode(&source)?;
        let (max_seq_length, vocab_size) = (self.max_seq_length, self.vocab_size);
        Ok(EncodedRows { source, dataset, report, max_seq_length, vocab_size })
    }

    /// Encodes the rows of `data`; also returns a report about the files.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn encode(&self, data: &DataSource) -> Result<(Dataset, LoadReport), Error> {
        data.encode(self.tokenizer.as_ref(), self.max_seq_length, self.vocab_size)
    }

    /// Returns the checkpoint's tokenizer, if it has one.
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// Returns the checkpoint's tokenizer, if it has one.
    pub fn into_tokenizer(self) -> Option<Tokenizer> {
        self.tokenizer
    }

    /// Returns the maximum length of a row in tokens.
    pub fn max_seq_length(&self) -> usize {
        self.max_seq_length
    }

    /// Removes the limit on the length of rows.
    #[must_use]
    pub fn of_any_length(self) -> Self {
        Self { max_seq_length: usize::MAX, ..self }
    }
}
