//! `FastLanguageModel::from_pretrained`.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rekindle_data::Tokenizer;
use rekindle_kernels::{Device, DeviceKind, ShardExchange, open_device};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::saved_rows;
use rekindle_models::spec::{AttentionMask, LayerSpec};
use rekindle_models::{
    CausalLm, LoadOptions, ModelConfig, Positions, RopeScaling, is_quantized, loftq_base, open_checkpoint,
    saved_positions,
};
use rekindle_quant::QuantConfig;

use crate::Fp8;
use crate::run::ModelArguments;
use crate::{Dtype, Error, Model, skip};

mod files;
mod plan;
mod rows;
mod tokenizer;

pub use files::ModelFiles;
pub(crate) use files::base_directory;
pub(crate) use plan::saved_lora_config;
pub use plan::{RankShares, RunPlanner};
pub use rows::{EncodedRows, RowEncoder};

/// The entry point, named as in Unsloth.
#[derive(Debug)]
pub struct FastLanguageModel;

impl FastLanguageModel {
    /// Returns a loader of a model: a checkpoint directory in the Hugging Face layout or, if there is no such
    /// directory, a name on the hub ([`ModelSource`](crate::ModelSource)). The directory or name of an adapter loads
    /// its base with the adapter attached.
    pub fn from_pretrained<'a>(name_or_path: impl Into<PathBuf>) -> Loader<'a> {
        Loader::new(ModelArguments { name_or_path: name_or_path.into(), ..ModelArguments::default() })
    }
}

/// A loader of a model: its [`ModelArguments`], the device and callbacks. The setters of arguments set their fields.
#[must_use = "nothing is loaded before `load`"]
pub struct Loader<'a> {
    /// The arguments of `from_pretrained`.
    args: ModelArguments,
    device: DeviceKind,
    /// An adapter that will be attached after loading.
    adapter: Option<PathBuf>,
    /// The seed of the head of a reward model, if that is wanted.
    score_head: Option<u64>,
    /// The ranks that divide the frozen weights.
    shard_base: Option<Arc<dyn ShardExchange>>,
    /// The files, once they are found.
    files: Option<ModelFiles>,
    on_download: Option<Box<dyn FnMut(u64, u64) + 'a>>,
    on_progress: Option<Box<dyn FnMut(u64, u64) + 'a>>,
}

/// The default of `max_seq_length`, unless the model's window is shorter.
const MAX_SEQ_LENGTH: usize = 2048;

impl<'a> Loader<'a> {
    /// Returns a loader with these arguments on [`DeviceKind::Auto`].
    pub fn new(args: ModelArguments) -> Self {
        Self {
            args,
            device: DeviceKind::Auto,
            adapter: None,
            score_head: None,
            shard_base: None,
            files: None,
            on_download: None,
            on_progress: None,
        }
    }

    /// Returns the arguments.
    pub fn arguments(&self) -> &ModelArguments {
        &self.args
    }

    /// Sets the maximum length of a row. Default 2,048, or the model's window if that is shorter; use
    /// [`rope_scaling`](Self::rope_scaling) to go beyond the window.
    pub fn max_seq_length(mut self, max_seq_length: usize) -> Self {
        self.args.max_seq_length = Some(max_seq_length);
        self
    }

    /// Sets the context extension beyond the model's window. Default [`RopeScaling::Auto`], or that of the adapter
    /// named in [`for_adapter`](Self::for_adapter). [`CausalLm::context_extension`] returns the result.
    pub fn rope_scaling(mut self, rope_scaling: impl Into<RopeScaling>) -> Self {
        self.args.rope_scaling = Some(rope_scaling.into());
        self
    }

    /// Prepares the model for an adapter that will be attached to it.
    ///
    /// The model gets the adapter's tokenizer and chat template if it has them, the adapter's context extension, and
    /// embedding tables with as many rows as those the adapter saved. A dense base of an adapter initialized by LoftQ
    /// is quantized as the adapter requires, unless [`load_in_4bit`](Self::load_in_4bit) or the like is set.
    pub fn for_adapter(mut self, dir: impl Into<PathBuf>) -> Self {
        self.adapter = Some(dir.into());
        self
    }

    /// Loads a reward model: the head is a score instead of the vocabulary. One that the checkpoint does not have is
    /// initialized from `seed`. A checkpoint of a reward model, and the adapter of one, need no call.
    pub fn score_head(mut self, seed: u64) -> Self {
        self.score_head = Some(seed);
        self
    }

    /// Sets the dtype of frozen weights and activations.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.args.dtype = dtype;
        self
    }

    /// Sets the device. Default [`DeviceKind::Auto`].
    pub fn device(mut self, device: DeviceKind) -> Self {
        self.device = device;
        self
    }

    /// If true, all weights are trained: in f32 or, with [`load_in_4bit`](Self::load_in_4bit) or
    /// [`load_in_8bit`](Self::load_in_8bit), as quantized weights that each step decodes, updates and rounds
    /// stochastically. Default false.
    pub fn full_finetuning(mut self, full_finetuning: bool) -> Self {
        self.args.full_finetuning = full_finetuning;
        self
    }

    /// If true, trained weights exist only in bf16, without an f32 copy, and updates are rounded stochastically. Needs
    /// [`full_finetuning`](Self::full_finetuning). Default false.
    pub fn stochastic_rounding(mut self, stochastic_rounding: bool) -> Self {
        self.args.stochastic_rounding = stochastic_rounding;
        self
    }

    /// If true, linears of layers are quantized to 4 bits while loading: NF4 in blocks of 64 with double quantization,
    /// unless [`quant_config`](Self::quant_config) is set. A 4-bit checkpoint is always loaded as it is. Default false.
    pub fn load_in_4bit(mut self, load_in_4bit: bool) -> Self {
        self.args.load_in_4bit = load_in_4bit;
        self
    }

    /// If true, linears of layers are quantized to LLM.int8() while loading. An 8-bit checkpoint is always loaded as it
    /// is. Default false.
    pub fn load_in_8bit(mut self, load_in_8bit: bool) -> Self {
        self.args.load_in_8bit = load_in_8bit;
        self
    }

    /// If true, linears of layers are quantized to fp8 (E4M3) with a scale per row while loading. An fp8 checkpoint always
    /// keeps its own codes and scales. Default false.
    pub fn load_in_fp8(mut self, load_in_fp8: bool) -> Self {
        self.args.load_in_fp8 = load_in_fp8;
        self
    }

    /// If true, all weights are dense, in [`dtype`](Self::dtype): the linears of a GGUF file are decoded while loading, and
    /// a quantized checkpoint is refused. Default false.
    pub fn load_in_16bit(mut self, load_in_16bit: bool) -> Self {
        self.args.load_in_16bit = load_in_16bit;
        self
    }

    /// Sets the products that are computed in fp8 by the linears of layers, which are kept in fp8. [`rekindle_kernels::fp8`]
    /// has the equations: activations and, with [`Fp8::On`], their gradients are rounded row by row. Default [`Fp8::Off`].
    pub fn fp8(mut self, fp8: Fp8) -> Self {
        self.args.fp8 = fp8;
        self
    }

    /// Sets the 4-bit format; needs [`load_in_4bit`](Self::load_in_4bit). Quantized weights are decoded to
    /// [`dtype`](Self::dtype).
    pub fn quant_config(mut self, quant_config: QuantConfig) -> Self {
        let QuantConfig { quant_type, blocksize, double_quant } = quant_config;
        self.args.quant_type = Some(quant_type.name().to_owned());
        self.args.blocksize = Some(blocksize.get());
        self.args.double_quant = Some(double_quant);
        self
    }

    /// Sets the modules that are not quantized: names of linears, or paths from the root such as `model.layers.0`, as
    /// in transformers' `llm_int8_skip_modules`. A name that matches nothing is an error. Default `lm_head`; embeddings
    /// and norms are never quantized.
    pub fn skip_modules(mut self, modules: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.args.skip_modules = Some(modules.into_iter().map(Into::into).collect());
        self
    }

    /// Sets the vocabulary size: rows of the embedding table and the head are removed at the end, or added as the mean
    /// of the existing rows. Default: that of the checkpoint.
    ///
    /// Train new rows with `modules_to_save`; an adapter saves the vocabulary size with its tables.
    pub fn resize_model_vocab(mut self, rows: usize) -> Self {
        self.args.resize_model_vocab = Some(rows);
        self
    }

    /// Accepted for run files of other programs and without effect: every device has the [engine](crate::engine). Default
    /// false.
    pub fn fast_inference(mut self, fast_inference: bool) -> Self {
        self.args.fast_inference = fast_inference;
        self
    }

    /// Divides the frozen weights of the blocks among ranks; each keeps a part, and all must compute together
    /// ([`ShardRanks`](rekindle_train::ShardRanks)). Default: each rank has all weights.
    pub fn shard_base(mut self, ranks: Arc<dyn ShardExchange>) -> Self {
        self.shard_base = Some(ranks);
        self
    }

    /// Sets a callback for the bytes read so far and in total.
    pub fn on_progress(mut self, on_progress: impl FnMut(u64, u64) + 'a) -> Self {
        self.on_progress = Some(Box::new(on_progress));
        self
    }

    /// Loads the model and its tokenizer.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Model`] for a checkpoint that is missing, invalid or not supported, [`Error::Data`]
    /// for its tokenizer, [`Error::Device`] and [`Error::Argument`] for the arguments, and those of
    /// [`fetch`](Self::fetch).
    pub fn load(mut self) -> Result<(Model, Tokenizer), Error> {
        let files = self.fetch()?.clone();
        let model = self.load_model()?;
        Ok((model, Tokenizer::from_dir(files.tokenizer())?))
    }

    /// Loads the model without a tokenizer, for pretokenized rows.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_model(mut self) -> Result<Model, Error> {
        self.args.load_in()?;
        let files = self.fetch()?.clone();
        let checkpoint = open_checkpoint(&files.model)?;
        let config = ModelConfig::from_checkpoint(&checkpoint)?;
        if let Some(modules) = &self.args.skip_modules {
            skip::check(modules, &config)?;
        }
        let (device, kind) = open_device(self.device)?;
        let options = self.options(&config, files.adapter.as_deref(), device, kind)?;
        let (mut done, total) = (0, checkpoint.total_bytes());
        let mut model = CausalLm::load(&checkpoint, &options, &mut |bytes| {
            done += bytes;
            if let Some(progress) = &mut self.on_progress {
                progress(done, total);
            }
        })?;
        model.set_name_or_path(&files.name, files.revision.clone());
        let adapter = files.adapter.clone();
        let mut model = Model::new(model, files, kind, self.args.access(), (checkpoint.config().clone(), options));
        if let Some(adapter) = &adapter {
            model.put(adapter)?;
        }
        Ok(model)
    }

    /// Returns the options for loading a model with this configuration onto `device`; `adapter` is that of the files.
    pub(crate) fn options(
        &self,
        config: &ModelConfig,
        adapter: Option<&Path>,
        device: Device,
        kind: DeviceKind,
    ) -> Result<LoadOptions, Error> {
        let (mut load_in, mut skip_modules) = (self.args.load_in()?, self.args.skip_modules.clone());
        let adapter = adapter.or(self.adapter.as_deref());
        let dtype = self.args.dtype.resolve(&device, kind)?;
        if let (Some(adapter), None, false) = (adapter, load_in, is_quantized(&config.json))
            && let Some(on) = loftq_base(&AdapterConfig::open(adapter).map_err(rekindle_models::Error::from)?)?
        {
            load_in = Some(on.load_in);
            skip_modules = skip_modules.or(on.skip_modules);
        }
        // The adapter of a reward model brings its head.
        let brings_score = match adapter {
            Some(adapter) => AdapterConfig::open(adapter).map_err(rekindle_models::Error::from)?.is_reward_model(),
            None => false,
        };
        let (saved, max_seq_length) = self.positions(adapter, config)?;
        let saved = saved.map(RopeScaling::Saved);
        let rows = adapter.map(saved_rows).transpose().map_err(rekindle_models::Error::from)?.flatten();
        let rows = rows.filter(|rows| *rows != config.vocab_size());
        Ok(LoadOptions {
            dtype,
            device,
            max_seq_length,
            rope_scaling: self.args.rope_scaling.clone().or(saved).unwrap_or_default(),
            full_finetuning: self.args.full_finetuning,
            stochastic_rounding: self.args.stochastic_rounding,
            load_in,
            skip_modules,
            fp8: self.args.fp8.products(),
            resize_model_vocab: self.args.resize_model_vocab.or(rows),
            score_head: self.score_head.or(brings_score.then_some(0)),
            shard_base: self.shard_base.clone(),
        })
    }

    /// Returns the positions that an adapter was trained with, if it records them, and the maximum length of a row.
    pub(crate) fn positions(
        &self,
        adapter: Option<&Path>,
        config: &ModelConfig,
    ) -> Result<(Option<Positions>, usize), Error> {
        let saved = adapter.map(saved_positions).transpose()?.flatten();
        let window = match (&saved, &self.args.rope_scaling) {
            (Some(saved), None) => saved.max_position_embeddings(),
            _ => supported_length(config),
        };
        Ok((saved, self.args.max_seq_length.unwrap_or(MAX_SEQ_LENGTH.min(window))))
    }

    /// Checks the arguments against each other, before anything is read.
    ///
    /// # Errors
    /// [`Error::Argument`] for two formats at once, a 4-bit format without 4-bit loading, or an unsupported argument.
    pub fn check(&self) -> Result<(), Error> {
        self.args.check()
    }
}

impl core::fmt::Debug for Loader<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Loader").field("args", &self.args).field("device", &self.device).finish_non_exhaustive()
    }
}

/// Returns the maximum length of documents that the model supports: its window, or a shorter attention window that this
/// version does not compute.
pub(crate) fn supported_length(config: &ModelConfig) -> usize {
    let window = config.max_position_embeddings;
    let attention = config.spec.layers.iter().filter_map(LayerSpec::attention);
    let windows = attention.filter_map(|attention| match attention.mask {
        AttentionMask::Full => None,
        AttentionMask::Sliding(tokens) | AttentionMask::Chunked(tokens) => Some(tokens),
    });
    match windows.min() {
        Some(shortest) if shortest < window && !config.spec.unsupported(window).is_empty() => shortest,
        _ => window,
    }
}
