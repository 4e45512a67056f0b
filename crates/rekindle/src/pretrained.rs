//! `FastLanguageModel::from_pretrained`.

use std::path::PathBuf;

use burn::tensor::{DType, Device};
use rekindle_data::Tokenizer;
use rekindle_hub::Checkpoint;
use rekindle_kernels::{DeviceKind, open_device};
use rekindle_models::{CausalLm, LoadOptions, ModelConfig};
use serde::{Deserialize, Serialize};

use crate::{Error, Model};

/// The entry point, named as in Unsloth.
#[derive(Debug)]
pub struct FastLanguageModel;

impl FastLanguageModel {
    /// A checkpoint directory in the Hugging Face layout, to be loaded with the returned builder.
    pub fn from_pretrained(path: impl Into<PathBuf>) -> Loader {
        Loader {
            path: path.into(),
            max_seq_length: None,
            dtype: Dtype::Auto,
            device: DeviceKind::Auto,
            full_finetuning: false,
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
    path: PathBuf,
    max_seq_length: Option<usize>,
    dtype: Dtype,
    device: DeviceKind,
    full_finetuning: bool,
    progress: Option<Box<dyn FnMut(u64, u64)>>,
}

/// The default of `max_seq_length`, bounded by what the model was made for.
const MAX_SEQ_LENGTH: usize = 2048;

impl Loader {
    /// The longest row. Default 2,048, or less if the model was made for less.
    pub fn max_seq_length(mut self, max_seq_length: usize) -> Self {
        self.max_seq_length = Some(max_seq_length);
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

    /// Whether all weights are trained, in f32. Default false.
    pub fn full_finetuning(mut self, full_finetuning: bool) -> Self {
        self.full_finetuning = full_finetuning;
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
    /// [`Error::Data`] for its tokenizer, [`Error::Device`] and [`Error::Argument`] for what was asked.
    pub fn load(self) -> Result<(Model, Tokenizer), Error> {
        let path = self.path.clone();
        let model = self.load_model()?;
        Ok((model, Tokenizer::from_dir(&path)?))
    }

    /// Reads the model alone, for pretokenized rows.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_model(mut self) -> Result<Model, Error> {
        let checkpoint = Checkpoint::open(&self.path)?;
        let limit = ModelConfig::from_checkpoint(&checkpoint)?.max_position_embeddings;
        let (device, kind) = open_device(self.device)?;
        let dtype = resolve(self.dtype, &device, kind, self.full_finetuning)?;
        let options = LoadOptions {
            dtype,
            device,
            max_seq_length: self.max_seq_length.unwrap_or(MAX_SEQ_LENGTH.min(limit)),
            full_finetuning: self.full_finetuning,
        };
        let (mut done, total) = (0, checkpoint.total_bytes());
        let model = CausalLm::load(&checkpoint, &options, &mut |bytes| {
            done += bytes;
            if let Some(progress) = &mut self.progress {
                progress(done, total);
            }
        })?;
        Ok(Model::new(model, &self.path, kind))
    }
}

impl core::fmt::Debug for Loader {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Loader").field("path", &self.path).field("dtype", &self.dtype).finish_non_exhaustive()
    }
}

/// The tensor dtype for `asked` on `device`.
fn resolve(asked: Dtype, device: &Device, kind: DeviceKind, full_finetuning: bool) -> Result<DType, Error> {
    let dtype = match asked {
        Dtype::Auto if matches!(kind, DeviceKind::Cuda(_)) && !full_finetuning => DType::BF16,
        Dtype::Auto | Dtype::F32 => DType::F32,
        Dtype::Bf16 => DType::BF16,
        Dtype::F16 => DType::F16,
    };
    if !device.supports_dtype(dtype) {
        return Err(Error::Argument(format!("dtype {dtype:?} is not supported by {device:?}; use dtype \"f32\"")));
    }
    Ok(dtype)
}
