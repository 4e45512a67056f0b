//! A causal language model: a decoder, its trained parameters, its adapters, and its provenance.

use std::path::{Path, PathBuf};

use rekindle_kernels::{DType, Device, Params, ParamsBuilder};
use rekindle_lora::{LoraConfig, peft::AdapterConfig};
use rekindle_rope::ContextExtension;

use crate::adapters::Adapters;
use crate::checkpoint::Quantization;
use crate::parameters::ParameterSpec;
use crate::{Decoder, Error, GradientCheckpointing, ModelConfig};

/// A causal language model with its trainable parameters.
///
/// Either all weights are trained, or none until [`add_adapter`](Self::add_adapter).
///
/// | what | where |
/// |---|---|
/// | losses and gradients | `loss.rs` |
/// | adapters by name | `adapters.rs` |
/// | loading, saving, merging | `checkpoint/` |
/// | generation | `generate.rs` |
#[derive(Debug)]
pub struct CausalLm {
    pub(crate) config: ModelConfig,
    pub(crate) decoder: Decoder,
    pub(crate) params: Params,
    pub(crate) adapters: Adapters,
    pub(crate) provenance: Provenance,
    /// The gradient checkpointing.
    pub(crate) checkpointing: GradientCheckpointing,
    /// The factor of the auxiliary loss for each token.
    pub(crate) router_aux_loss: f32,
}

/// The origin of a model's weights, and changes to them since loading.
#[derive(Debug)]
pub(crate) struct Provenance {
    /// The directory of the checkpoint.
    pub(crate) path: PathBuf,
    /// The name that adapters record as their base.
    pub(crate) name_or_path: String,
    /// The revision that was requested of a model on the hub.
    pub(crate) revision: Option<String>,
    /// The quantization of the checkpoint's linears, if any.
    pub(crate) quantization: Option<Quantization>,
    /// The extension of the checkpoint's context, if any.
    pub(crate) context_extension: Option<ContextExtension>,
    /// True if an adapter was merged into the weights.
    pub(crate) merged: bool,
    /// True if embedding and head have another number of rows than the checkpoint's.
    pub(crate) resized: bool,
    /// True if the checkpoint has the linears of all experts of a layer in one tensor.
    pub(crate) stacked_experts: bool,
}

impl Provenance {
    /// Returns the provenance of a dense checkpoint at `path`.
    pub(crate) fn new(path: &Path, context_extension: Option<ContextExtension>) -> Self {
        Self {
            path: path.to_owned(),
            name_or_path: path.display().to_string(),
            revision: None,
            quantization: None,
            context_extension,
            merged: false,
            resized: false,
            stacked_experts: false,
        }
    }
}

impl CausalLm {
    pub(crate) fn new(config: ModelConfig, decoder: Decoder, params: ParamsBuilder, provenance: Provenance) -> Self {
        Self {
            config,
            decoder,
            params: params.build(),
            adapters: Adapters::default(),
            provenance,
            checkpointing: GradientCheckpointing::Off,
            router_aux_loss: 0.0,
        }
    }

    /// Returns the model's configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the layers with embedding and head.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Returns the name of the checkpoint that new adapters record as their base.
    pub fn name_or_path(&self) -> &str {
        &self.provenance.name_or_path
    }

    /// Sets the name that new adapters record as their base: a model on the hub, with the revision if one was requested. Without
    /// this it is the checkpoint's directory.
    pub fn set_name_or_path(&mut self, name_or_path: impl Into<String>, revision: Option<String>) {
        self.provenance.name_or_path = name_or_path.into();
        self.provenance.revision = revision;
    }

    /// Returns the directory of the checkpoint.
    pub fn path(&self) -> &Path {
        &self.provenance.path
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> &Device {
        self.decoder.device()
    }

    /// Returns the dtype of frozen weights and activations.
    pub fn dtype(&self) -> DType {
        self.decoder.dtype()
    }

    /// Returns the maximum length of a document.
    pub fn max_seq_length(&self) -> usize {
        self.decoder.max_seq_length()
    }

    /// Returns the context extension by `rope_scaling`, if any.
    pub fn context_extension(&self) -> Option<&ContextExtension> {
        self.provenance.context_extension.as_ref()
    }

    /// Returns the `quantization_config` of a saved `config.json`, if the model is quantized.
    pub fn quantization_config(&self) -> Option<serde_json::Value> {
        self.provenance.quantization.as_ref().map(|quantization| quantization.config.to_json())
    }

    /// Returns the trainable parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// Returns the trainable parameters for the optimizer.
    pub fn params_mut(&mut self) -> &mut Params {
        &mut self.params
    }

    /// Returns the configuration of the active adapter.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.adapter_config().map(AdapterConfig::lora)
    }

    /// Returns the contents of the active adapter's configuration file.
    pub fn adapter_config(&self) -> Option<&AdapterConfig> {
        self.adapters.active.as_ref().map(|active| &active.config)
    }

    /// Returns a notice if the active adapter adapts experts: the number of experts, and their share of the trained
    /// parameters.
    pub fn expert_advice(&self) -> Option<String> {
        let (modules, lora) = (self.modules(), self.lora()?);
        modules.expert_advice(lora, &modules.targets(lora).ok()?)
    }

    /// Returns the number of scalars in all weights, without adapters.
    pub fn num_parameters(&self) -> usize {
        self.config.parameters().iter().map(ParameterSpec::numel).sum()
    }

    /// Returns `(full name, in, out)` of every linear of the layers.
    pub fn linears(&self) -> Vec<(String, usize, usize)> {
        let modules = self.modules();
        modules.linears.into_iter().map(|linear| (linear.name, linear.input, linear.out)).collect()
    }

    /// Returns the gradient checkpointing.
    pub fn gradient_checkpointing(&self) -> GradientCheckpointing {
        self.checkpointing
    }

    /// Adds the auxiliary loss that balances the experts of mixtures to later forward and backward passes: each batch adds
    /// the gradient of `per_token` · tokens · E·Σ_e f_e·P_e, with f_e the share of its tokens that select expert e and P_e
    /// the mean probability of e, both over all layers. For a coefficient c, `per_token` is c divided by the tokens of the
    /// step. 0 turns it off, which is the default; it changes nothing for a model without mixtures.
    pub fn set_router_aux_loss(&mut self, per_token: f32) {
        self.router_aux_loss = per_token;
    }

    /// Sets the gradient checkpointing. Default [`GradientCheckpointing::Off`].
    pub fn set_gradient_checkpointing(&mut self, checkpointing: GradientCheckpointing) {
        self.checkpointing = checkpointing;
    }

    /// Fails while the active adapter has subtracted its initial B·A from the base.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub fn check_base(&self) -> Result<(), Error> {
        if self.adapters.base_delta.is_empty() {
            return Ok(());
        }
        Err(Error::Argument(
            "the active adapter subtracted its initial B·A from the base (init_lora_weights pissa or olora), so the base \
             model's outputs are not available beside it; use init_lora_weights = true"
                .to_owned(),
        ))
    }
}
