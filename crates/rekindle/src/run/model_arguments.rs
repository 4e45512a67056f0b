//! `[model]`: the model of a run.

use std::path::{Path, PathBuf};

use rekindle_kernels::DeviceKind;
use rekindle_models::{RopeScaling, stored_quantization};
use rekindle_quant::{Blocksize, QuantConfig};
use serde::{Deserialize, Serialize};

use crate::{Dtype, Error, FastLanguageModel, GradientCheckpointing, Loader, Model, Source};

/// `[model]`: the arguments of [`FastLanguageModel::from_pretrained`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelArguments {
    /// A model or an adapter: a directory, or a name on the hub.
    pub name_or_path: PathBuf,
    /// The maximum length of a row in tokens. Default 2048, or the model's window if that is shorter.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_seq_length: Option<usize>,
    /// Dtype of frozen weights and activations. Default [`Dtype::Auto`].
    pub dtype: Dtype,
    /// If true, all weights are trained. Default false.
    pub full_finetuning: bool,
    /// If true, trained weights exist only in bf16 and their updates are rounded stochastically. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub stochastic_rounding: bool,
    /// If true, linears are quantized to 4 bits while loading. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub load_in_4bit: bool,
    /// If true, linears are quantized to LLM.int8() while loading. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub load_in_8bit: bool,
    /// If true, a quantized checkpoint is refused. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub load_in_16bit: bool,
    /// The 4-bit data type, `nf4` or `fp4`. Default `nf4`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quant_type: Option<String>,
    /// Elements that share a scale in 4 bits. Default 64.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub blocksize: Option<usize>,
    /// If true, the scales of 4-bit weights are quantized too. Default true.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub double_quant: Option<bool>,
    /// Modules that are not quantized. Default `lm_head`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skip_modules: Option<Vec<String>>,
    /// Context extension beyond the model's window. Default [`RopeScaling::Auto`].
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope_scaling: Option<RopeScaling>,
    /// Gradient checkpointing.
    #[serde(skip_serializing_if = "is_off")]
    pub use_gradient_checkpointing: GradientCheckpointing,
    /// Vocabulary size after adding or removing rows of the embedding table and the head. Default: the checkpoint's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize_model_vocab: Option<usize>,
    /// Not supported: `true` is an error.
    #[serde(skip_serializing_if = "is_false")]
    pub fast_inference: bool,
    /// Branch, tag or commit of a name on the hub. Default `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Token for private and gated repositories. Never serialized, because run files are shared.
    #[serde(skip_serializing)]
    pub token: Option<String>,
    /// Directory for downloads. Default `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
    /// If true, the network is not used. Default false, or `HF_HUB_OFFLINE`.
    #[serde(skip_serializing_if = "is_false")]
    pub local_files_only: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_off(value: &GradientCheckpointing) -> bool {
    !value.recomputes()
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !value
}

impl ModelArguments {
    /// Returns the loader that these arguments describe.
    ///
    /// # Errors
    /// [`Error::Argument`] for an unknown 4-bit format.
    pub fn loader(&self, device: DeviceKind) -> Result<Loader, Error> {
        let mut loader = FastLanguageModel::from_pretrained(&self.name_or_path)
            .dtype(self.dtype)
            .device(device)
            .full_finetuning(self.full_finetuning)
            .stochastic_rounding(self.stochastic_rounding)
            .load_in_4bit(self.load_in_4bit)
            .load_in_8bit(self.load_in_8bit)
            .load_in_16bit(self.load_in_16bit)
            .use_gradient_checkpointing(self.use_gradient_checkpointing)
            .fast_inference(self.fast_inference)
            .local_files_only(self.local_files_only);
        if let Some(length) = self.max_seq_length {
            loader = loader.max_seq_length(length);
        }
        if let Some(rope_scaling) = &self.rope_scaling {
            loader = loader.rope_scaling(rope_scaling.clone());
        }
        if let Some(config) = self.quant_config()? {
            loader = loader.quant_config(config);
        }
        if let Some(modules) = &self.skip_modules {
            loader = loader.skip_modules(modules);
        }
        if let Some(rows) = self.resize_model_vocab {
            loader = loader.resize_model_vocab(rows);
        }
        if let Some(revision) = &self.revision {
            loader = loader.revision(revision);
        }
        if let Some(token) = &self.token {
            loader = loader.token(token);
        }
        if let Some(cache_dir) = &self.cache_dir {
            loader = loader.cache_dir(cache_dir);
        }
        Ok(loader)
    }

    /// Returns an adapter beside the model, found in the same cache and with the same token.
    pub fn source(&self, adapter: &Path) -> Source<'static> {
        let mut source = Source::new(adapter).local_files_only(self.local_files_only);
        if let Some(token) = &self.token {
            source = source.token(token);
        }
        if let Some(cache_dir) = &self.cache_dir {
            source = source.cache_dir(cache_dir);
        }
        source
    }

    /// Fills in the defaults of the 4-bit format if they were used to quantize `model`.
    pub fn resolve_quant_config(&mut self, model: &Model) {
        let was_quantized = stored_quantization(&model.causal_lm().config().json).is_some();
        if self.load_in_4bit && !was_quantized {
            let QuantConfig { quant_type, blocksize, double_quant } = QuantConfig::default();
            self.quant_type.get_or_insert_with(|| quant_type.name().to_owned());
            self.blocksize.get_or_insert(blocksize.get());
            self.double_quant.get_or_insert(double_quant);
        }
    }

    /// Returns the 4-bit format if any part of it is given.
    pub(crate) fn quant_config(&self) -> Result<Option<QuantConfig>, Error> {
        if self.quant_type.is_none() && self.blocksize.is_none() && self.double_quant.is_none() {
            return Ok(None);
        }
        let mut config = QuantConfig::default();
        let wrong = |error: rekindle_quant::Error| Error::Argument(error.to_string());
        if let Some(name) = &self.quant_type {
            config.quant_type = name.parse().map_err(wrong)?;
        }
        if let Some(size) = self.blocksize {
            config.blocksize = Blocksize::new(size).map_err(wrong)?;
        }
        config.double_quant = self.double_quant.unwrap_or(config.double_quant);
        Ok(Some(config))
    }
}
