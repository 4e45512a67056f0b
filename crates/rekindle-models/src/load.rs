//! From a checkpoint to a model, tensor by tensor.

use burn::tensor::{DType, Device, Tensor, TensorData};
use rekindle_hub::{Checkpoint, Dtype, TensorView};
use rekindle_kernels::attention::Heads;
use rekindle_kernels::{ParamsBuilder, Weight, from_f32};
use rekindle_lora::{Linear, LinearGroup};

use crate::block::Block;
use crate::names::{self, EMBED, HEAD, NORM, Needed, Projection};
use crate::{CausalLm, Error, ModelConfig};

/// How a checkpoint is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where the weights go.
    pub device: Device,
    /// The dtype of frozen weights and activations.
    pub dtype: DType,
    /// The longest document; the rotary tables are made for it.
    pub max_seq_length: usize,
    /// Whether all weights are trained, in `f32`.
    pub full_finetuning: bool,
}

impl CausalLm {
    /// Builds the model that `checkpoint` holds. `progress` is told the bytes of each tensor as it is read.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Tensors`], each a list of everything that is wrong; [`Error::Argument`]
    /// for a `max_seq_length` beyond what the model was made for.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions, progress: &mut dyn FnMut(u64)) -> Result<Self, Error> {
        let config = ModelConfig::from_checkpoint(checkpoint)?;
        let LoadOptions { device, dtype, max_seq_length, full_finetuning } = options;
        check_length(&config, *max_seq_length)?;
        check_tensors(checkpoint, &config)?;
        let mut source = Source { checkpoint, options, params: ParamsBuilder::default(), progress };
        let embed = source.weight(EMBED)?;
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| source.block(&config, layer))
            .collect::<Result<Vec<_>, Error>>()?;
        let norm = source.weight(NORM)?;
        let head = if config.tie_word_embeddings { None } else { Some(source.weight(HEAD)?) };
        let tables = config.rope.tables(*max_seq_length);
        debug_assert!(*full_finetuning || source.params.is_empty());
        Ok(Self {
            embed,
            blocks,
            norm,
            head,
            params: source.params.build(device, *dtype),
            tables,
            device: device.clone(),
            dtype: *dtype,
            adapter_config: None,
            name_or_path: checkpoint.path().display().to_string(),
            config,
        })
    }
}

struct Source<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a LoadOptions,
    params: ParamsBuilder,
    progress: &'a mut dyn FnMut(u64),
}

impl Source<'_> {
    fn block(&mut self, c: &ModelConfig, layer: usize) -> Result<Block, Error> {
        let input_layernorm = self.weight(&names::norm(layer, "input_layernorm"))?;
        let qkv = self.group(c, layer, &[Projection::Q, Projection::K, Projection::V])?;
        let qk_norm = if c.qk_norm {
            let q = self.weight(&names::norm(layer, "self_attn.q_norm"))?;
            Some((q, self.weight(&names::norm(layer, "self_attn.k_norm"))?))
        } else {
            None
        };
        let heads = Heads {
            heads: c.num_attention_heads,
            kv_heads: c.num_key_value_heads,
            head_dim: c.head_dim,
            scale: (c.head_dim as f32).sqrt().recip(),
        };
        Ok(Block {
            input_layernorm,
            qkv,
            qk_norm,
            o: self.group(c, layer, &[Projection::O])?,
            post_attention_layernorm: self.weight(&names::norm(layer, "post_attention_layernorm"))?,
            gate_up: self.group(c, layer, &[Projection::Gate, Projection::Up])?,
            down: self.group(c, layer, &[Projection::Down])?,
            heads,
            eps: c.rms_norm_eps,
        })
    }

    fn group(&mut self, c: &ModelConfig, layer: usize, projections: &[Projection]) -> Result<LinearGroup, Error> {
        let linears = projections.iter().map(|projection| {
            let name = projection.module(layer);
            let weight = self.weight(&format!("{name}.weight"))?;
            let bias = projection.has_bias(c).then(|| self.weight(&format!("{name}.bias"))).transpose()?;
            Ok(Linear::new(name, weight, bias))
        });
        Ok(LinearGroup::new(linears.collect::<Result<_, Error>>()?))
    }

    fn weight(&mut self, name: &str) -> Result<Weight, Error> {
        let view = self.checkpoint.get(name).expect("every needed tensor was checked to be there");
        (self.progress)(view.data.len() as u64);
        if self.options.full_finetuning {
            // As in transformers' Trainer: norms and biases, the vectors, take no weight decay.
            let decays = view.shape.len() > 1;
            return Ok(Weight::Trained(self.params.push(name, view.shape, decays, &view.to_f32()?)));
        }
        let [rows, cols] = match *view.shape {
            [n] => [1, n],
            [rows, cols] => [rows, cols],
            _ => unreachable!("shapes were checked"),
        };
        Ok(Weight::Frozen(self.frozen(&view, [rows, cols])?))
    }

    fn frozen(&self, view: &TensorView<'_>, shape: [usize; 2]) -> Result<Tensor<2>, Error> {
        let (device, dtype) = (&self.options.device, self.options.dtype);
        let same = matches!((view.dtype, dtype), (Dtype::BF16, DType::BF16) | (Dtype::F16, DType::F16));
        if same {
            // The bits as they are, one copy.
            let data = TensorData::from_bytes_vec(view.data.to_vec(), shape, dtype);
            return Ok(Tensor::from_data(data, (device, dtype)));
        }
        Ok(from_f32(view.to_f32()?, shape, device, dtype))
    }
}

fn check_length(config: &ModelConfig, max_seq_length: usize) -> Result<(), Error> {
    let limit = config.max_position_embeddings;
    if max_seq_length == 0 || max_seq_length > limit {
        return Err(Error::Argument(format!(
            "max_seq_length is {max_seq_length}; this model takes 1 to {limit} (max_position_embeddings)"
        )));
    }
    Ok(())
}

/// Compares what the checkpoint has with what the configuration needs.
fn check_tensors(checkpoint: &Checkpoint, config: &ModelConfig) -> Result<(), Error> {
    let needed = names::needed(config);
    let mut problems = Vec::new();
    for Needed { name, shape } in &needed {
        match checkpoint.get(name) {
            None => problems.push(format!("tensor \"{name}\" {shape:?} is missing")),
            Some(view) if view.shape != shape.as_slice() => {
                problems.push(format!("tensor \"{name}\" has shape {:?}, expected {shape:?}", view.shape));
            }
            Some(view) if !matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                problems.push(format!("tensor \"{name}\" is {}; F32, F16 and BF16 are read", view.dtype));
            }
            Some(_) => {}
        }
    }
    let known: std::collections::BTreeSet<&str> = needed.iter().map(|n| n.name.as_str()).collect();
    for name in checkpoint.names().filter(|name| !known.contains(name)) {
        // Old Llama checkpoints carry the rotary frequencies, which follow from the configuration.
        if name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        if name == HEAD && config.tie_word_embeddings {
            let same = checkpoint.get(HEAD).map(|t| t.data) == checkpoint.get(EMBED).map(|t| t.data);
            if !same {
                problems
                    .push(format!("tensor \"{HEAD}\" differs from \"{EMBED}\" although tie_word_embeddings is true"));
            }
            continue;
        }
        problems.push(format!("tensor \"{name}\" is not part of {}", config.architecture));
    }
    if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: checkpoint.path().to_path_buf(), problems }) }
}
