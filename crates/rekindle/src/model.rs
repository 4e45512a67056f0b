//! A loaded model.

use std::path::{Path, PathBuf};

use rekindle_data::{Dataset, LoadReport, Tokenizer};
use rekindle_hub::AtomicDir;
use rekindle_kernels::{Device, DeviceKind};
use rekindle_lora::LoraConfig;
use rekindle_models::{CausalLm, LoadOptions, MemoryReport};
use rekindle_train::{Companion, Evaluation, evaluate, evaluate_tokens, save_adapters, save_result};
use serde_json::Value;

use crate::end_tokens::{companions, end_tokens, notice};
use crate::model_source::find;
use crate::{DEFAULT_ADAPTER, DataSource, Error, GgufExport, GgufFile, GgufFileType, HubAccess, ModelFiles};

/// Rows of a pass in evaluation.
const EVAL_BATCH_SIZE: usize = 8;

/// A loaded model, with its tokenizer files and its device.
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

impl rekindle_engine::EngineModel for Model {
    fn causal_lm(&self) -> &CausalLm {
        &self.inner
    }

    fn causal_lm_mut(&mut self) -> Option<&mut CausalLm> {
        Some(&mut self.inner)
    }
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

    /// Returns the bytes of the device that a run of this model can use in addition to the free ones: on a GPU all that the
    /// process has mapped, elsewhere the weights.
    pub(crate) fn reusable_bytes(&self) -> usize {
        match self.inner.device() {
            Device::Cuda(cuda) => cuda.memory().mapped,
            _ => self.memory_report().bytes() as usize,
        }
    }

    /// Returns the device, never [`DeviceKind::Auto`].
    pub fn device(&self) -> DeviceKind {
        self.device
    }

    /// Returns the compute dtype, never [`Dtype::Auto`](crate::Dtype::Auto).
    pub fn dtype(&self) -> crate::Dtype {
        self.inner.dtype().into()
    }

    /// Returns the checkpoint's directory.
    pub fn path(&self) -> &Path {
        &self.files.model
    }

    pub(crate) fn files_mut(&mut self) -> &mut ModelFiles {
        &mut self.files
    }

    /// Returns the checkpoint's name as given.
    pub(crate) fn name(&self) -> &str {
        &self.files.name
    }

    /// Returns the files to save with a model or adapter: the tokenizer's files, and a generation configuration with
    /// the end tokens of `tokenizer`, or else of the tokenizer among the files.
    pub(crate) fn companions(&self, tokenizer: Option<&Tokenizer>) -> Result<Vec<Companion>, Error> {
        if tokenizer.is_some() {
            return companions(&self.files, tokenizer);
        }
        // One that cannot be read is copied like any other file, and keeps nobody from saving.
        companions(&self.files, self.files.load_tokenizer().ok().flatten().as_ref())
    }

    /// Returns the memory of the weights, by class.
    pub fn memory_report(&self) -> MemoryReport {
        self.inner.memory_report()
    }

    /// Returns the underlying model.
    pub fn causal_lm(&self) -> &CausalLm {
        &self.inner
    }

    /// Returns the underlying model, for custom training loops.
    pub fn causal_lm_mut(&mut self) -> &mut CausalLm {
        &mut self.inner
    }

    /// Returns the model with a new adapter; only the adapter is trained.
    ///
    /// # Errors
    /// [`Error::Model`] for a configuration that is invalid or matches nothing.
    pub fn get_peft_model(mut self, config: LoraConfig) -> Result<Self, Error> {
        self.inner.add_adapter(&config)?;
        self.note_carried_tables();
        self.notices.extend(self.inner.expert_advice());
        Ok(self)
    }

    /// Records a notice if a new adapter contains tables that it does not train.
    pub(crate) fn note_carried_tables(&mut self) {
        let tables = self.inner.carried_tables();
        let names: Vec<&str> = tables.iter().map(|name| name.rsplit('.').next().unwrap_or(name)).collect();
        if names.is_empty() {
            return;
        }
        let rows = self.inner.config().vocab_size();
        self.notices.push(format!(
            "resize_model_vocab: {} with {rows} rows stays frozen and is saved with the adapter; new rows are the \
             mean of the others. To train them, add modules_to_save = [\"embed_tokens\", \"lm_head\"]",
            names.join(" and ")
        ));
    }

    /// Returns the model with an adapter from PEFT's files: a directory, or a name on the hub
    /// ([`ModelSource`](crate::ModelSource)). Use [`load_adapter_as`](Self::load_adapter_as) for several.
    ///
    /// If the adapter has a tokenizer and chat template, they replace the checkpoint's in saved files and in
    /// [`load_tokenizer`](Self::load_tokenizer). [`notices`](Self::notices) reports differences.
    ///
    /// # Errors
    /// [`Error::File`] if files are missing, [`Error::Model`] if they are invalid or do not match this model exactly.
    pub fn load_adapter(mut self, name_or_path: impl AsRef<Path>) -> Result<Self, Error> {
        self.put(name_or_path.as_ref())?;
        Ok(self)
    }

    /// Returns notices for the user about the adapters: one without an effect, with untrained tables or unknown keys,
    /// or with another tokenizer or chat template than the checkpoint's.
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Finds the directory of `name_or_path`.
    pub(crate) fn find(&self, name_or_path: &Path) -> Result<PathBuf, Error> {
        Ok(find(name_or_path, None, &self.access, &mut |_, _| ())?.path)
    }

    /// Writes the trained weights with the tokenizer's files: all adapters in PEFT's layout (the default one at the
    /// top, others in directories of their names), or the whole model if all weights are trained.
    ///
    /// # Errors
    /// [`Error::Train`] if the files cannot be written; an existing directory is unchanged then.
    pub fn save_pretrained(&self, dir: impl AsRef<Path>) -> Result<(), Error> {
        if self.inner.adapters().is_empty() {
            return Ok(save_result(&self.inner, dir.as_ref(), &self.companions(None)?, self.inner.trained_dtype())?);
        }
        Ok(save_adapters(&self.inner, dir.as_ref(), &self.companions(None)?)?)
    }

    /// Writes the model with its active adapter merged into it as GGUF files for llama.cpp, one of each precision, and a
    /// `Modelfile`: those that [`GgufExport`] makes of the result of [`save_pretrained`](Self::save_pretrained), which is
    /// deleted afterwards. Files are named after the directory.
    ///
    /// # Errors
    /// Those of [`save_pretrained`](Self::save_pretrained) and [`GgufExport::write`].
    pub fn save_pretrained_gguf(
        &self,
        dir: impl AsRef<Path>,
        file_types: &[GgufFileType],
    ) -> Result<Vec<GgufFile>, Error> {
        let dir = dir.as_ref();
        let saved = AtomicDir::replace(dir)?;
        let trained = saved.path().join("trained");
        let mut export = match self.inner.active_adapter() {
            // Adapters that are not active change nothing.
            None if !self.inner.adapters().is_empty() => GgufExport::new(&self.files.model),
            None => {
                self.save_pretrained(&trained)?;
                GgufExport::new(&trained)
            }
            Some(name) => {
                self.save_pretrained(&trained)?;
                let adapter = if name == DEFAULT_ADAPTER { trained } else { trained.join(name) };
                GgufExport::new(adapter).base(&self.files.model)
            }
        };
        if let Some(name) = dir.file_name() {
            export = export.name(name.to_string_lossy());
        }
        export.fetch(&mut |_, _| ())?;
        export.write(dir, file_types, &mut |_, _| ())
    }

    /// Evaluates like [`evaluate`](Self::evaluate), and returns the loss of every token of every row.
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

    /// Returns the loss of every row of `data`. Rows longer than the model's `max_seq_length` are errors.
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

    /// Returns the ids that end a generation: `eos_token_id` of the checkpoint's `generation_config.json`, else of
    /// `config.json`; and with a tokenizer, those of its own directory (such as an adapter's), its `eos_token`, and the
    /// token with which its chat template ends the assistant's turns.
    ///
    /// Rows are trained to end with one of these tokens, so a base model that was trained on conversations stops at the
    /// end of a turn, even if its checkpoint does not name that token.
    ///
    /// # Errors
    /// [`Error::Data`] if a file of the checkpoint is invalid.
    pub fn end_tokens(&self, tokenizer: Option<&Tokenizer>) -> Result<Vec<u32>, Error> {
        end_tokens(self.path(), tokenizer)
    }

    /// Returns a notice if `rows` train texts to end with a token that is no end token of the checkpoint, as
    /// conversations do for most base models. [`end_tokens`](Self::end_tokens) includes that token in any case.
    ///
    /// # Errors
    /// [`Error::Data`] if a file of the checkpoint is invalid.
    pub fn end_token_notice(&self, tokenizer: &Tokenizer, rows: &Dataset) -> Result<Option<String>, Error> {
        notice(self.path(), tokenizer, rows)
    }

    /// Reads the tokenizer and its chat template: the adapter's if it has them, else the checkpoint's; `None` if there
    /// is none.
    ///
    /// # Errors
    /// [`Error::Data`] for an invalid tokenizer.
    pub fn load_tokenizer(&self) -> Result<Option<Tokenizer>, Error> {
        self.files.load_tokenizer()
    }

    /// Encodes the rows of `data` for this model; also returns a report about the files.
    ///
    /// # Errors
    /// [`Error::Data`] for rows that cannot be read or do not fit.
    pub fn encode(&self, tokenizer: Option<&Tokenizer>, data: &DataSource) -> Result<(Dataset, LoadReport), Error> {
        data.encode(tokenizer, self.inner.max_seq_length(), self.inner.config().vocab_size())
    }
}
