//! Inspection of a checkpoint or an adapter from its headers.

use core::fmt;
use std::path::Path;

use rekindle_hub::CheckpointHeaders;
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{BLOCK_LINEARS, FUSED_LINEARS};
use rekindle_models::{MemoryReport, ModelConfig, saved_positions, stored_quantization};
use serde::Serialize;
use serde_json::Value;

use crate::{Error, ModelSource};

/// The properties of a checkpoint or an adapter.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Inspection {
    /// A model.
    Checkpoint {
        /// The entry of `architectures`.
        architecture: String,
        /// Layers, sizes and heads, as in `config.json`.
        shape: Value,
        /// The dtype that `config.json` names.
        dtype: Option<String>,
        /// The `quantization_config`, if there is one.
        quantization: Option<Value>,
        /// Bytes on disk, by class.
        memory: MemoryReport,
        /// Bytes of all tensors.
        bytes: u64,
        /// Bits per quantized weight, including scales.
        bits_per_quantized_weight: Option<f64>,
        /// The saving compared with a 16-bit model, as a share of its bytes; negative for wider weights.
        saving: f64,
    },
    /// An adapter in PEFT's format.
    Adapter {
        /// The base model's name.
        base_model_name_or_path: Option<String>,
        /// Rank.
        r: usize,
        /// The numerator of the scale.
        lora_alpha: f64,
        /// The factor of B·A·x.
        scale: f64,
        /// The window and RoPE parameters of its training, if they differ from its base's.
        positions: Option<Value>,
        /// The adapted linears, by the last part of their names.
        target_modules: Vec<String>,
        /// Tensors in the file.
        tensors: usize,
        /// Scalars in them.
        parameters: u64,
        /// Bytes on disk.
        bytes: u64,
    },
}

/// Reads the headers of the checkpoint or adapter in the directory or name `path`. Weights are neither read nor
/// downloaded. [`ModelSource::inspect`] has options for the hub.
///
/// # Errors
/// [`Error::File`] and [`Error::Model`] for a directory that contains neither, or an invalid one.
pub fn inspect(path: impl AsRef<Path>) -> Result<Inspection, Error> {
    Ok(ModelSource::new(path.as_ref()).inspect()?.0)
}

impl ModelSource<'_> {
    /// Inspects a checkpoint or an adapter by its headers. Of a name on the hub, only those and the configuration are
    /// downloaded. Also returns a notice if the hub could not be reached and the cache was used.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch), and [`Error::Model`] for an invalid configuration.
    pub fn inspect(self) -> Result<(Inspection, Option<String>), Error> {
        let (headers, notice) = self.headers()?;
        let found = if headers.is_adapter { adapter(&headers)? } else { checkpoint(&headers)? };
        Ok((found, notice))
    }
}

fn checkpoint(headers: &CheckpointHeaders) -> Result<Inspection, Error> {
    let path = headers.path.join("config.json");
    let json: Value = rekindle_hub::read_json(&path)?;
    let config = ModelConfig::from_json(&json).map_err(|problems| rekindle_models::Error::Config { path, problems })?;
    let dtype = ["dtype", "torch_dtype"].iter().find_map(|key| json.get(key)?.as_str());
    let memory = MemoryReport::of_headers(headers, &config);
    Ok(Inspection::Checkpoint {
        architecture: config.architecture.clone(),
        shape: serde_json::json!({
            "num_hidden_layers": config.num_hidden_layers(),
            "hidden_size": config.hidden_size(),
            "intermediate_size": config.intermediate_size(),
            "num_attention_heads": config.num_attention_heads(),
            "num_key_value_heads": config.num_key_value_heads(),
            "head_dim": config.head_dim(),
            "vocab_size": config.vocab_size(),
            "max_position_embeddings": config.max_position_embeddings,
            "rope_type": config.rope().scaling().name(),
            "tie_word_embeddings": config.tie_word_embeddings(),
        }),
        dtype: dtype.map(str::to_owned),
        quantization: stored_quantization(&json).cloned(),
        bytes: memory.bytes(),
        bits_per_quantized_weight: memory.bits_per_quantized_weight(),
        saving: memory.saving(),
        memory,
    })
}

fn adapter(headers: &CheckpointHeaders) -> Result<Inspection, Error> {
    let config = AdapterConfig::open(&headers.path).map_err(rekindle_models::Error::from)?;
    let lora = config.lora();
    let adapted = |linear: &&str| headers.tensors.keys().any(|name| name.contains(&format!(".{linear}.")));
    let targets =
        BLOCK_LINEARS.iter().chain(&FUSED_LINEARS).filter(|linear| adapted(linear)).map(|&linear| linear.to_owned());
    let parameters = headers.tensors.values().map(|tensor| tensor.shape.iter().product::<usize>() as u64);
    Ok(Inspection::Adapter {
        base_model_name_or_path: config.base_model_name_or_path().map(str::to_owned),
        r: lora.r,
        lora_alpha: lora.lora_alpha,
        scale: lora.scale(),
        positions: saved_positions(&headers.path)?.map(|positions| positions.to_json()),
        target_modules: targets.collect(),
        tensors: headers.tensors.len(),
        parameters: parameters.sum(),
        bytes: headers.total_bytes(),
    })
}

impl fmt::Display for Inspection {
    /// Formats the properties, one per line; for a checkpoint also the table of its bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Checkpoint {
                architecture, shape, dtype, quantization, memory, bits_per_quantized_weight, ..
            } => {
                writeln!(f, "{architecture}, {}", dtype.as_deref().unwrap_or("no dtype given"))?;
                for (key, value) in shape.as_object().into_iter().flatten() {
                    writeln!(f, "{key} {value}")?;
                }
                if let Some(quantization) = quantization {
                    writeln!(f, "quantization_config {quantization}")?;
                }
                if let Some(bits) = bits_per_quantized_weight {
                    writeln!(f, "{bits:.3} bits per quantized weight")?;
                }
                write!(f, "{memory}")
            }
            Self::Adapter {
                base_model_name_or_path,
                r,
                lora_alpha,
                scale,
                positions,
                target_modules,
                tensors,
                parameters,
                bytes,
            } => {
                writeln!(f, "LoRA adapter, r {r}, lora_alpha {lora_alpha}, scale {scale}")?;
                writeln!(f, "base model {}", base_model_name_or_path.as_deref().unwrap_or("not named"))?;
                writeln!(f, "on {}", target_modules.join(", "))?;
                if let Some(positions) = positions {
                    writeln!(f, "positions {positions}")?;
                }
                write!(f, "{parameters} parameters in {tensors} tensors, {bytes} bytes")
            }
        }
    }
}
