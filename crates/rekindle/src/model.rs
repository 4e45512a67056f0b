//! A loaded model and what can be done with it.

use std::path::{Path, PathBuf};

use burn::tensor::DType;

use rekindle_data::{Dataset, LoadReport, Tokenizer, eos_token_ids};
use rekindle_kernels::DeviceKind;
use rekindle_lora::LoraConfig;
use rekindle_models::{CausalLm, GenerationConfig, MemoryReport, StopReason};
use rekindle_train::{Evaluation, evaluate, save_adapters, save_result};

use crate::source::{Access, find};
use crate::{DataSource, Error, Files};

/// A model with its place on disk.
#[derive(Debug)]
pub struct Model {
    inner: CausalLm,
    files: Files,
    device: DeviceKind,
    access: Access,
    pub(crate) notices: Vec<String>,
}

/// What [`Model::generate`] made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// The new tokens, an end token included.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub stop: StopReason,
}

impl Model {
    pub(crate) fn new(inner: CausalLm, files: Files, device: DeviceKind, access: Access) -> Self {
        Self { inner, files, device, access, notices: Vec::new() }
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

    /// What its checkpoint was called.
    pub(crate) fn name(&self) -> &str {
        &self.files.name
    }

    /// The files that a saved model or adapter carries along: the tokenizer's, and what ends a generation.
    pub(crate) fn companions(&self) -> Vec<PathBuf> {
        self.files.companions()
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
        let rows = self.inner.config().vocab_size;
        self.notices.push(format!(
            "resize_model_vocab: {} with {rows} rows stays frozen and is saved with the adapter, new rows as they are \
             (the mean of the others); to train them, add modules_to_save = [\"embed_tokens\", \"lm_head\"]",
            names.join(" and ")
        ));
    }

    /// The model with an adapter from PEFT's files: a directory, or a name on the hub ([`Source`](crate::Source)).
    /// [`load_adapter_as`](Self::load_adapter_as) is for several.
    ///
    /// # Errors
    /// [`Error::File`] when they are not found, [`Error::Model`] when they are unreadable or do not match this model
    /// exactly.
    pub fn load_adapter(mut self, name_or_path: impl AsRef<Path>) -> Result<Self, Error> {
        self.put(name_or_path.as_ref())?;
        Ok(self)
    }

    /// Returns notices for the user about the adapters: one that changes nothing, or that carries untrained tables.
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
            return Ok(save_result(&self.inner, dir.as_ref(), &self.companions(), self.inner.trained_dtype())?);
        }
        Ok(save_adapters(&self.inner, dir.as_ref(), &self.companions())?)
    }

    /// The loss of every row of `data`. Rows longer than the model's `max_seq_length` are errors.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn evaluate(
        &self,
        tokenizer: Option<&Tokenizer>,
        data: &DataSource,
        progress: &mut dyn FnMut(usize),
    ) -> Result<Evaluation, Error> {
        let (dataset, _) = self.encode(tokenizer, data)?;
        Ok(evaluate(&self.inner, &dataset, 8, progress)?)
    }

    /// Continues `prompt` token by token; `on_token` returns whether to go on.
    ///
    /// # Errors
    /// [`Error::Model`] for a prompt that is empty, too long or beyond the vocabulary.
    pub fn generate(
        &self,
        prompt: &[u32],
        config: &GenerationConfig,
        on_token: impl FnMut(u32) -> bool,
    ) -> Result<Generated, Error> {
        let (ids, stop) = self.inner.generate(prompt, config, on_token)?;
        Ok(Generated { ids, stop })
    }

    /// The ids that end a generation, from the checkpoint's `generation_config.json` or `config.json`.
    ///
    /// Where there is a tokenizer, [`Tokenizer::eos_ids`] also knows its `eos_token`.
    ///
    /// # Errors
    /// [`Error::Data`] when the file is broken.
    pub fn eos_ids(&self) -> Result<Vec<u32>, Error> {
        Ok(eos_token_ids(self.path())?.unwrap_or_default())
    }

    /// The rows of `data` as this model takes them, and what was found in its files.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn encode(&self, tokenizer: Option<&Tokenizer>, data: &DataSource) -> Result<(Dataset, LoadReport), Error> {
        data.encode(tokenizer, self.inner.max_seq_length(), self.inner.config().vocab_size)
    }
}
