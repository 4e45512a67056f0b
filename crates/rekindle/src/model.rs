//! A loaded model and what can be done with it.

use std::path::{Path, PathBuf};

use burn::tensor::DType;

use rekindle_data::{Dataset, LoadReport, Tokenizer};
use rekindle_kernels::DeviceKind;
use rekindle_lora::LoraConfig;
use rekindle_models::{CausalLm, LoadOptions, MemoryReport};
use rekindle_train::{Companion, Evaluation, evaluate, evaluate_tokens, save_adapters, save_result};
use serde_json::Value;

use crate::end_tokens::{companions, end_tokens, notice};
use crate::model_source::find;
use crate::{DataSource, Error, HubAccess, ModelFiles};

/// Rows of a pass in evaluation.
const EVAL_BATCH_SIZE: usize = 8;

/// A model with its place on disk.
#[derive(Debug)]
pub struct Model {
    inner: CausalLm,
    files: ModelFiles,
    device: DeviceKind,
    access: HubAccess,
    /// The checkpoint's `config.json`, and the options that it was loaded with.
    loaded_as: (Value, LoadOptions),
    pub(crate) notices: Vec<String>,
}

impl Model {
    pub(crate) fn new(
        inner: CausalLm,
        files: ModelFiles,
        device: DeviceKind,
        access: HubAccess,
        loaded_as: (Value, LoadOptions),
    ) -> Self {
        Self { inner, files, device, access, loaded_as, notices: Vec::new() }
    }

    /// Returns the checkpoint's `config.json`, and the options that it was loaded with.
    pub(crate) fn loaded_as(&self) -> &(Value, LoadOptions) {
        &self.loaded_as
    }

    /// Returns the bytes that the model has allocated on its device.
    pub(crate) fn allocated_bytes(&self) -> usize {
        match (self.device, self.inner.device().memory()) {
            (DeviceKind::Cuda(_), Some(memory)) => memory.in_use as usize,
            _ => self.memory_report().bytes() as usize,
        }
    }

    /// Where it computes, never [`DeviceKind::Auto`].
    pub fn device(&self) -> DeviceKind {
        self.device
    }

    /// What it computes in, never [`Dtype::Auto`](crate::Dtype::Auto).
    pub fn dtype(&self) -> crate::Dtype {
        match self.inner.dtype() {
            DType::BF16 => crate::Dtype::Bf16,
            DType::F16 => crate::Dtype::F16,
            _ => crate::Dtype::F32,
        }
    }

    /// The checkpoint's directory.
    pub fn path(&self) -> &Path {
        &self.files.model
    }

    pub(crate) fn files_mut(&mut self) -> &mut ModelFiles {
        &mut self.files
    }

    /// What its checkpoint was called.
    pub(crate) fn name(&self) -> &str {
        &self.files.name
    }

    /// What a saved model or adapter carries along: the tokenizer's files, and a generation configuration with the end
    /// tokens of `tokenizer`, or else of the tokenizer among the files.
    pub(crate) fn companions(&self, tokenizer: Option<&Tokenizer>) -> Result<Vec<Companion>, Error> {
        if tokenizer.is_some() {
            return companions(&self.files, tokenizer);
        }
        // One that cannot be read is copied like any other file, and keeps nobody from saving.
        companions(&self.files, self.files.load_tokenizer().ok().flatten().as_ref())
    }

    /// What its weights take in memory, by class.
    pub fn memory_report(&self) -> MemoryReport {
        self.inner.memory_report()
    }

    /// The model underneath.
    pub fn causal_lm(&self) -> &CausalLm {
        &self.inner
    }

    /// The model underneath, for training loops of your own.
    pub fn causal_lm_mut(&mut self) -> &mut CausalLm {
        &mut self.inner
    }

    /// The model with a new adapter; only the adapter is trained.
    ///
    /// # Errors
    /// [`Error::Model`] for a configuration that is invalid or matches nothing.
    pub fn get_peft_model(mut self, config: LoraConfig) -> Result<Self, Error> {
        self.inner.add_adapter(&config)?;
        self.note_carried_tables();
        Ok(self)
    }

    /// Says of a new adapter that it carries tables which it does not train.
    pub(crate) fn note_carried_tables(&mut self) {
        let tables = self.inner.carried_tables();
        let names: Vec<&str> = tables.iter().map(|name| name.rsplit('.').next().unwrap_or(name)).collect();
        if names.is_empty() {
            return;
        }
        let rows = self.inner.config().vocab_size();
        self.notices.push(format!(
            "resize_model_vocab: {} with {rows} rows stays frozen and is saved with the adapter, new rows as they are \
             (the mean of the others); to train them, add modules_to_save = [\"embed_tokens\", \"lm_head\"]",
            names.join(" and ")
        ));
    }

    /// The model with an adapter from PEFT's files: a directory, or a name on the hub ([`ModelSource`](crate::ModelSource)).
    /// [`load_adapter_as`](Self::load_adapter_as) is for several.
    ///
    /// Its tokenizer and chat template take the place of the checkpoint's where it brings them: saving writes these, and
    /// [`load_tokenizer`](Self::load_tokenizer) reads them. [`notices`](Self::notices) says so where they differ.
    ///
    /// # Errors
    /// [`Error::File`] when they are not found, [`Error::Model`] when they are unreadable or do not match this model
    /// exactly.
    pub fn load_adapter(mut self, name_or_path: impl AsRef<Path>) -> Result<Self, Error> {
        self.put(name_or_path.as_ref())?;
        Ok(self)
    }

    /// Returns notices for the user about the adapters: one that changes nothing, that carries untrained tables, or that
    /// brings another tokenizer or chat template than the checkpoint's.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Where what is called, or lies at, `name_or_path` is.
    pub(crate) fn find(&self, name_or_path: &Path) -> Result<PathBuf, Error> {
        Ok(find(name_or_path, None, &self.access, &mut |_, _| ())?.path)
    }

    /// Writes what is trained, with the tokenizer's files: all adapters, as PEFT lays them out (the one without a name of
    /// its own at the top, the others in directories of their names), or the whole model when all weights are trained.
    ///
    /// # Errors
    /// [`Error::Train`] when the system refuses; a directory that stood there before is then untouched.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<(), Error> {
        if self.inner.adapters().is_empty() {
            return Ok(save_result(&self.inner, dir.as_ref(), &self.companions(None)?, self.inner.trained_dtype())?);
        }
        Ok(save_adapters(&self.inner, dir.as_ref(), &self.companions(None)?)?)
    }

    /// [`evaluate`](Self::evaluate), with the loss of every token of every row.
    ///
    /// # Errors
    /// As `evaluate`.
    pub fn evaluate_tokens(
        &self,
        tokenizer: Option<&Tokenizer>,
        data: &DataSource,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Evaluation, Error> {
        let (dataset, _) = self.encode(tokenizer, data)?;
        Ok(evaluate_tokens(&self.inner, &dataset, EVAL_BATCH_SIZE, progress)?)
    }

    /// The loss of every row of `data`. Rows longer than the model's `max_seq_length` are errors.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit, [`Error::Train`] for a loss that is not finite.
    pub fn evaluate(
        &self,
        tokenizer: Option<&Tokenizer>,
        data: &DataSource,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Evaluation, Error> {
        let (dataset, _) = self.encode(tokenizer, data)?;
        Ok(evaluate(&self.inner, &dataset, EVAL_BATCH_SIZE, progress)?)
    }

    /// The ids that end a generation: `eos_token_id` of the checkpoint's `generation_config.json` or, where that has none,
    /// of `config.json`; and with a tokenizer, those of its own directory (an adapter's, say), its `eos_token`, and the
    /// token with which its chat template ends the assistant's turns.
    ///
    /// Rows are trained to end with one of these, so that a base model that learned conversations stops at the end of a
    /// turn, which its checkpoint does not name.
    ///
    /// # Errors
    /// [`Error::Data`] when a file of the checkpoint is broken.
    pub fn end_tokens(&self, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, Error> {
        end_tokens(self.path(), tokenizer)
    }

    /// What a user should be told when `rows` train texts to end with a token that the checkpoint does not name as an end
    /// token, as conversations do for most base models. [`end_tokens`](Self::end_tokens) has it all the same.
    ///
    /// # Errors
    /// [`Error::Data`] when a file of the checkpoint is broken.
    pub fn end_token_notice(&self, tokenizer: &Tokenizer, rows: &Dataset) -> Result<Option<String>, Error> {
        notice(self.path(), tokenizer, rows)
    }

    /// Reads the tokenizer that goes with the model, with its chat template: the adapter's where it brings them, else the
    /// checkpoint's; `None` where there is none.
    ///
    /// # Errors
    /// [`Error::Data`] for a broken tokenizer.
    pub fn load_tokenizer(&self) -> Result<Option<Tokenizer>, Error> {
        self.files.load_tokenizer()
    }

    /// The rows of `data` as this model takes them, and what was found in its files.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn encode(&self, tokenizer: Option<&Tokenizer>, data: &DataSource) -> Result<(Dataset, LoadReport), Error> {
        data.encode(tokenizer, self.inner.max_seq_length(), self.inner.config().vocab_size())
    }
}
