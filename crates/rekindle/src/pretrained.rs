//! `FastLanguageModel::from_pretrained`.

use std::path::{Path, PathBuf};

use burn::tensor::DType;
use rekindle_data::Tokenizer;
use rekindle_hub::Checkpoint;
use rekindle_kernels::{Device, DeviceKind, open_device};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{GradientCheckpointing, saved_rows};
use rekindle_models::{
    CausalLm, LoadIn, LoadOptions, ModelConfig, Positions, RopeScaling, loftq_base, saved_positions,
    stored_quantization,
};
use rekindle_quant::QuantConfig;
use serde::{Deserialize, Serialize};

use crate::{Error, Model, Source, skip};

mod files;
mod plan;
mod rows;
mod tokenizer;

pub use files::Files;
pub(crate) use files::base_directory;
pub use plan::{RunPlanner, saved_lora_config};
pub use rows::{EncodedRows, RowEncoder};

/// The entry point, named as in Unsloth.
#[derive(Debug)]
pub struct FastLanguageModel;

impl FastLanguageModel {
    /// A model, to be loaded with the returned builder: a checkpoint directory in the Hugging Face layout or, where
    /// there is no such directory, a name on the hub ([`Source`](crate::Source)). An adapter's directory or name stands
    /// for its base with the adapter on it.
    pub fn from_pretrained(name_or_path: impl Into<PathBuf>) -> Loader {
        Loader {
            source: Source::new(name_or_path),
            files: None,
            max_seq_length: None,
            rope_scaling: None,
            adapter: None,
            dtype: Dtype::Auto,
            device: DeviceKind::Auto,
            full_finetuning: false,
            stochastic_rounding: false,
            load_in_4bit: false,
            load_in_8bit: false,
            load_in_16bit: false,
            quant_config: None,
            skip_modules: None,
            use_gradient_checkpointing: GradientCheckpointing::Off,
            resize_model_vocab: None,
            fast_inference: false,
            progress: None,
        }
    }
}

/// The dtype of frozen weights and activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// f32 on the CPU and wgpu, bf16 on CUDA.
    #[default]
    Auto,
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// Single precision.
    F32,
}

/// The arguments of `from_pretrained`.
#[must_use = "nothing is loaded before `load`"]
pub struct Loader {
    /// The model, or an adapter that stands for one.
    source: Source<'static>,
    /// Once they are found.
    files: Option<Files>,
    max_seq_length: Option<usize>,
    rope_scaling: Option<RopeScaling>,
    adapter: Option<PathBuf>,
    dtype: Dtype,
    device: DeviceKind,
    full_finetuning: bool,
    stochastic_rounding: bool,
    load_in_4bit: bool,
    load_in_8bit: bool,
    load_in_16bit: bool,
    quant_config: Option<QuantConfig>,
    skip_modules: Option<Vec<String>>,
    use_gradient_checkpointing: GradientCheckpointing,
    resize_model_vocab: Option<usize>,
    fast_inference: bool,
    progress: Option<Box<dyn FnMut(u64, u64)>>,
}

/// The default of `max_seq_length`, bounded by what the model was made for.
const MAX_SEQ_LENGTH: usize = 2048;

impl Loader {
    /// The longest row. Default 2,048, or less if the model was made for less. More than that is reached by
    /// [`rope_scaling`](Self::rope_scaling).
    pub fn max_seq_length(mut self, max_seq_length: usize) -> Self {
        self.max_seq_length = Some(max_seq_length);
        self
    }

    /// How positions beyond the model's window are made. Default [`RopeScaling::Auto`], or what the adapter named in
    /// [`for_adapter`](Self::for_adapter) was trained with. What was done is [`CausalLm::context_extension`].
    pub fn rope_scaling(mut self, rope_scaling: impl Into<RopeScaling>) -> Self {
        self.rope_scaling = Some(rope_scaling.into());
        self
    }

    /// The adapter that will be put on the model: its tokenizer and chat template are the model's where it brings them, a window that was widened when it was trained is widened alike, tables
    /// get as many rows as those have that it saved, and a dense base is quantized as an adapter asks for that starts from
    /// what codes miss (LoftQ), unless [`load_in_4bit`](Self::load_in_4bit) and its like say how.
    pub fn for_adapter(mut self, dir: impl Into<PathBuf>) -> Self {
        self.adapter = Some(dir.into());
        self
    }

    /// The dtype of frozen weights and activations.
    pub fn dtype(mut self, dtype: Dtype) -> Self {
        self.dtype = dtype;
        self
    }

    /// Where to compute. Default [`DeviceKind::Auto`].
    pub fn device(mut self, device: DeviceKind) -> Self {
        self.device = device;
        self
    }

    /// Whether all weights are trained: in f32 or, with [`load_in_4bit`](Self::load_in_4bit) and its like, in codes that
    /// every step decodes, changes and rounds again stochastically. Default false.
    pub fn full_finetuning(mut self, full_finetuning: bool) -> Self {
        self.full_finetuning = full_finetuning;
        self
    }

    /// Returns true if weights that are trained are kept in bf16 alone, without an f32 copy, and updates are rounded
    /// stochastically. Needs [`full_finetuning`](Self::full_finetuning). Default false.
    pub fn stochastic_rounding(mut self, stochastic_rounding: bool) -> Self {
        self.stochastic_rounding = stochastic_rounding;
        self
    }

    /// Whether the linears of the blocks are kept in 4-bit codes, quantized while loading: NF4 in blocks of 64 with
    /// double quantization unless [`quant_config`](Self::quant_config) says otherwise. Default false, or true for a
    /// checkpoint that is 4-bit already, which is loaded as it is.
    pub fn load_in_4bit(mut self, load_in_4bit: bool) -> Self {
        self.load_in_4bit = load_in_4bit;
        self
    }

    /// Whether the linears of the blocks are kept in LLM.int8() codes. Default false, or true for a checkpoint that
    /// is 8-bit already.
    pub fn load_in_8bit(mut self, load_in_8bit: bool) -> Self {
        self.load_in_8bit = load_in_8bit;
        self
    }

    /// Whether all weights are kept dense, in [`dtype`](Self::dtype). This is the default; asking for it refuses a
    /// checkpoint that is quantized.
    pub fn load_in_16bit(mut self, load_in_16bit: bool) -> Self {
        self.load_in_16bit = load_in_16bit;
        self
    }

    /// The 4-bit format; needs [`load_in_4bit`](Self::load_in_4bit). What the codes are decoded to and computed in is
    /// [`dtype`](Self::dtype).
    pub fn quant_config(mut self, quant_config: QuantConfig) -> Self {
        self.quant_config = Some(quant_config);
        self
    }

    /// Modules that stay dense when the others are quantized: names of linears, or paths from the start such as
    /// `model.layers.0`, as in transformers' `llm_int8_skip_modules`. One that matches nothing is an error. Default
    /// `lm_head`; embeddings and norms are never quantized.
    pub fn skip_modules(mut self, modules: impl IntoIterator<Item = impl Into<String>>) -> Self {
        self.skip_modules = Some(modules.into_iter().map(Into::into).collect());
        self
    }

    /// What becomes of activations between forward and backward when all weights are trained, and with an adapter that
    /// asks for nothing itself, as one from files. Default [`GradientCheckpointing::Off`].
    pub fn use_gradient_checkpointing(mut self, checkpointing: impl Into<GradientCheckpointing>) -> Self {
        self.use_gradient_checkpointing = checkpointing.into();
        self
    }

    /// How many token ids the model is to have. The embedding table and the head lose their last rows, or get rows that
    /// are the mean of those they have. Default: as many as the checkpoint has.
    ///
    /// Adapters learn new rows with `modules_to_save`, and those that were saved bring their number along.
    pub fn resize_model_vocab(mut self, rows: usize) -> Self {
        self.resize_model_vocab = Some(rows);
        self
    }

    /// An engine of its own for generation, which is not there yet: `true` is an error.
    pub fn fast_inference(mut self, fast_inference: bool) -> Self {
        self.fast_inference = fast_inference;
        self
    }

    /// Is told the bytes read so far and in all.
    pub fn on_progress(mut self, progress: impl FnMut(u64, u64) + 'static) -> Self {
        self.progress = Some(Box::new(progress));
        self
    }

    /// Reads the model and its tokenizer.
    ///
    /// # Errors
    /// [`Error::File`] and [`Error::Model`] for a checkpoint that is missing, broken or not supported,
    /// [`Error::Data`] for its tokenizer, [`Error::Device`] and [`Error::Argument`] for what was asked, and those of
    /// [`fetch`](Self::fetch).
    pub fn load(mut self) -> Result<(Model, Tokenizer), Error> {
        let files = self.fetch()?.clone();
        let model = self.load_model()?;
        Ok((model, Tokenizer::from_dir(files.tokenizer())?))
    }

    /// Reads the model alone, for pretokenized rows.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_model(mut self) -> Result<Model, Error> {
        self.load_in()?;
        let files = self.fetch()?.clone();
        let checkpoint = Checkpoint::open(&files.model)?;
        let config = ModelConfig::from_checkpoint(&checkpoint)?;
        if let Some(modules) = &self.skip_modules {
            skip::check(modules, &config)?;
        }
        let (device, kind) = open_device(self.device)?;
        let options = self.options(&config, files.adapter.as_deref(), device, kind)?;
        let (mut done, total) = (0, checkpoint.total_bytes());
        let mut model = CausalLm::load(&checkpoint, &options, &mut |bytes| {
            done += bytes;
            if let Some(progress) = &mut self.progress {
                progress(done, total);
            }
        })?;
        model.set_name_or_path(&files.name, files.revision.clone());
        model.set_gradient_checkpointing(self.use_gradient_checkpointing);
        let adapter = files.adapter.clone();
        let mut model = Model::new(model, files, kind, self.source.access);
        if let Some(adapter) = &adapter {
            model.put(adapter)?;
        }
        Ok(model)
    }

    /// How a model with this configuration is loaded onto `device`; `adapter` is that of the files, if they have one.
    pub(crate) fn options(
        &self,
        config: &ModelConfig,
        adapter: Option<&Path>,
        device: Device,
        kind: DeviceKind,
    ) -> Result<LoadOptions, Error> {
        let (mut load_in, mut skip_modules) = (self.load_in()?, self.skip_modules.clone());
        let adapter = adapter.or(self.adapter.as_deref());
        let dtype = resolve(self.dtype, &device, kind)?;
        let stored = stored_quantization(&config.json).is_some();
        if let (Some(adapter), None, false) = (adapter, load_in, stored)
            && let Some(on) = loftq_base(&AdapterConfig::open(adapter).map_err(rekindle_models::Error::from)?)?
        {
            load_in = Some(on.load_in);
            skip_modules = skip_modules.or(on.skip_modules);
        }
        let (saved, max_seq_length) = self.positions(adapter, config)?;
        let saved = saved.map(RopeScaling::Saved);
        let rows = adapter.map(saved_rows).transpose().map_err(rekindle_models::Error::from)?.flatten();
        let rows = rows.filter(|rows| *rows != config.vocab_size());
        Ok(LoadOptions {
            dtype,
            device,
            max_seq_length,
            rope_scaling: self.rope_scaling.clone().or(saved).unwrap_or_default(),
            full_finetuning: self.full_finetuning,
            stochastic_rounding: self.stochastic_rounding,
            load_in,
            skip_modules,
            resize_model_vocab: self.resize_model_vocab.or(rows),
        })
    }

    /// The positions that an adapter was trained with, where it says them, and the longest row.
    pub(crate) fn positions(
        &self,
        adapter: Option<&Path>,
        config: &ModelConfig,
    ) -> Result<(Option<Positions>, usize), Error> {
        let saved = adapter.map(saved_positions).transpose()?.flatten();
        let window = match (&saved, &self.rope_scaling) {
            (Some(saved), None) => saved.max_position_embeddings(),
            _ => config.max_position_embeddings,
        };
        Ok((saved, self.max_seq_length.unwrap_or(MAX_SEQ_LENGTH.min(window))))
    }

    /// Returns true if the arguments agree with one another, before anything is read.
    ///
    /// # Errors
    /// [`Error::Argument`] for two ways of loading at once, a 4-bit format without 4-bit loading, or what is not there
    /// yet.
    pub fn check(&self) -> Result<(), Error> {
        self.load_in()?;
        if self.fast_inference {
            return Err(Error::Argument(
                "fast_inference = true is not there yet: generation runs the model that is trained; leave it out"
                    .to_owned(),
            ));
        }
        Ok(())
    }

    /// How the linears are kept, if anything was asked for.
    fn load_in(&self) -> Result<Option<LoadIn>, Error> {
        let asked = [
            (self.load_in_4bit, LoadIn::FourBit(self.quant_config)),
            (self.load_in_8bit, LoadIn::EightBit),
            (self.load_in_16bit, LoadIn::SixteenBit),
        ];
        let asked: Vec<LoadIn> = asked.into_iter().filter_map(|(on, load_in)| on.then_some(load_in)).collect();
        match asked[..] {
            [first, second, ..] => Err(Error::Argument(format!(
                "{} and {} exclude each other; set one of them",
                first.argument(),
                second.argument()
            ))),
            [one] if self.quant_config.is_none() || self.load_in_4bit => Ok(Some(one)),
            [] if self.quant_config.is_none() => Ok(None),
            _ => Err(Error::Argument(
                "quant_type, blocksize and double_quant describe 4-bit codes; they need load_in_4bit".to_owned(),
            )),
        }
    }
}

impl core::fmt::Debug for Loader {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Loader").field("source", &self.source).field("dtype", &self.dtype).finish_non_exhaustive()
    }
}

/// The tensor dtype for `asked` on `device`.
fn resolve(asked: Dtype, device: &Device, kind: DeviceKind) -> Result<DType, Error> {
    let dtype = match asked {
        Dtype::Auto if matches!(kind, DeviceKind::Cuda(_)) => DType::BF16,
        Dtype::Auto | Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
    };
    if !device.supports_dtype(dtype) {
        return Err(Error::Argument(format!(
            "dtype {dtype:?} is not supported by device \"{kind}\"; use dtype \"f32\""
        )));
    }
    Ok(dtype)
}
