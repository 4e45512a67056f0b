//! `[model]`: the model of a run.

use std::path::PathBuf;

use rekindle_models::{LoadIn, RopeScaling, is_quantized};
use rekindle_quant::{Blocksize, QuantConfig};
use serde::{Deserialize, Serialize};

use super::ShardBase;
use crate::{Dtype, Error, Fp8, HubAccess, HubToken, Model, ModelSource};

/// `[model]`: the arguments of `from_pretrained`.
///
/// [`Loader::new`](crate::Loader::new) loads the model that they describe.
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
    /// If true, linears are quantized to fp8 (E4M3) with a scale per row while loading. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub load_in_fp8: bool,
    /// If true, the linears of a GGUF file are decoded while loading, and a quantized checkpoint is refused. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub load_in_16bit: bool,
    /// The products with frozen linears that are computed in fp8. Default [`Fp8::Off`].
    #[serde(skip_serializing_if = "Fp8::is_off")]
    pub fp8: Fp8,
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
    /// Vocabulary size after adding or removing rows of the embedding table and the head. Default: the checkpoint's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resize_model_vocab: Option<usize>,
    /// The frozen weights on several ranks: whole on each, or divided among them. Default `false`.
    #[serde(skip_serializing_if = "ShardBase::is_off")]
    pub shard_base: ShardBase,
    /// Accepted for run files of other programs and without effect: every device has the engine. Default false.
    #[serde(skip_serializing_if = "is_false")]
    pub fast_inference: bool,
    /// Branch, tag or commit of a name on the hub. Default `main`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// Token for private and gated repositories. Never serialized, because run files are shared.
    #[serde(skip_serializing)]
    pub token: Option<HubToken>,
    /// Directory for downloads. Default `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache_dir: Option<PathBuf>,
    /// If true, the network is not used. Default false, or `HF_HUB_OFFLINE`.
    #[serde(skip_serializing_if = "is_false")]
    pub local_files_only: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_false(value: &bool) -> bool {
    !value
}

impl ModelArguments {
    /// Returns the arguments for the model or adapter `name_or_path`, with the defaults.
    pub fn new(name_or_path: impl Into<PathBuf>) -> Self {
        Self { name_or_path: name_or_path.into(), ..Self::default() }
    }

    /// Returns the access to the hub.
    pub fn access(&self) -> HubAccess {
        HubAccess {
            token: self.token.clone(),
            cache_dir: self.cache_dir.clone(),
            local_files_only: self.local_files_only,
        }
    }

    /// Returns an adapter for the model, with the same access to the hub.
    pub fn adapter(&self, name_or_path: impl Into<PathBuf>) -> ModelSource<'static> {
        ModelSource::new(name_or_path).hub(self.access())
    }

    /// Checks the arguments against each other.
    ///
    /// # Errors
    /// [`Error::Argument`] for two formats at once, or a 4-bit format without 4-bit loading.
    pub fn check(&self) -> Result<(), Error> {
        self.load_in().map(|_| ())
    }

    /// Returns the requested format of the linears, if any.
    pub(crate) fn load_in(&self) -> Result<Option<LoadIn>, Error> {
        let quant_config = self.quant_config()?;
        let formats = [
            (self.load_in_4bit, LoadIn::FourBit(quant_config)),
            (self.load_in_8bit, LoadIn::EightBit),
            (self.load_in_fp8, LoadIn::Fp8),
            (self.load_in_16bit, LoadIn::SixteenBit),
        ];
        let requested: Vec<LoadIn> = formats.into_iter().filter_map(|(on, format)| on.then_some(format)).collect();
        match requested[..] {
            [first, second, ..] => Err(Error::Argument(format!(
                "{} and {} exclude each other; set one of them",
                first.argument(),
                second.argument()
            ))),
            [one] if quant_config.is_none() || self.load_in_4bit => Ok(Some(one)),
            [] if quant_config.is_none() => Ok(None),
            _ => Err(Error::Argument(
                "quant_type, blocksize and double_quant apply only with load_in_4bit = true; set it, or remove \
                 them"
                    .to_owned(),
            )),
        }
    }

    /// Fills in the defaults of the 4-bit format if they were used to quantize `model`.
    pub fn resolve_quant_config(&mut self, model: &Model) {
        if self.load_in_4bit && !is_quantized(&model.causal_lm().config().json) {
            let QuantConfig { quant_type, blocksize, double_quant } = QuantConfig::default();
            self.quant_type.get_or_insert_with(|| quant_type.name().to_owned());
            self.blocksize.get_or_insert(blocksize.get());
            self.double_quant.get_or_insert(double_quant);
        }
    }

    /// Returns the 4-bit format if any part of it is given.
    fn quant_config(&self) -> Result<Option<QuantConfig>, Error> {
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
