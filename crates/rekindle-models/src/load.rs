//! From a checkpoint to a model, tensor by tensor.

use std::collections::BTreeMap;
use std::path::Path;

use burn::tensor::DType;
use rekindle_hub::{Checkpoint, Dtype, TensorView};
use rekindle_kernels::rope::Tables;
use rekindle_kernels::{
    Device, DeviceLimits, Group, ParamsBuilder, QuantizedWeight, Tensor, Weight, from_f32, from_le_bytes,
};
use rekindle_lora::{GradientCheckpointing, Linear, LinearGroup};
use rekindle_quant::Origin;
use rekindle_rope::{RopeScaling, Widened};

use crate::adapt::Replaced;
use crate::block::Block;
use crate::layout::canonical;
use crate::names::{self, EMBED, HEAD, NORM, Needed, Projection};
use crate::quantization::{LoadIn, Plan, Quantization, stored_bytes, stored_quantization};
use crate::start::Taken;
use crate::{CausalLm, Error, ModelConfig, trainable, vocab};

/// How a checkpoint is loaded.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Where the weights go.
    pub device: Device,
    /// The dtype of frozen weights and activations.
    pub dtype: DType,
    /// The longest document; the rotary tables are made for it.
    pub max_seq_length: usize,
    /// How positions beyond the model's window are made.
    pub rope_scaling: RopeScaling,
    /// Whether all weights are trained: in `f32`, or in codes where `load_in` or the checkpoint says so.
    pub full_finetuning: bool,
    /// Whether weights that are trained are kept in bf16 alone, and updates are rounded stochastically.
    pub stochastic_rounding: bool,
    /// How the linears of the blocks are kept. `None` is dense, or as a quantized checkpoint has them.
    pub load_in: Option<LoadIn>,
    /// Linears that stay dense when the others are quantized, as transformers' `llm_int8_skip_modules`. `None` is
    /// `lm_head`.
    pub skip_modules: Option<Vec<String>>,
    /// Rows that the embedding table and the head are brought to. New ones are the mean of the old.
    pub resize_model_vocab: Option<usize>,
}

impl LoadOptions {
    /// Frozen weights, dense unless the checkpoint is quantized.
    pub fn new(device: Device, dtype: DType, max_seq_length: usize) -> Self {
        Self {
            device,
            dtype,
            max_seq_length,
            rope_scaling: RopeScaling::default(),
            full_finetuning: false,
            stochastic_rounding: false,
            load_in: None,
            skip_modules: None,
            resize_model_vocab: None,
        }
    }
}

impl CausalLm {
    /// Builds the model that `checkpoint` holds. `progress` is told the bytes of each tensor as it is read.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Tensors`], each a list of everything that is wrong; [`Error::Argument`]
    /// for a `max_seq_length` that `rope_scaling` does not reach.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions, progress: &mut dyn FnMut(u64)) -> Result<Self, Error> {
        let LoadOptions { device, dtype, full_finetuning, load_in, skip_modules, .. } = options;
        let checkpoint = &canonical(checkpoint);
        let (mut config, widened) = options.prepare(ModelConfig::from_checkpoint(checkpoint)?)?;
        let stored = stored_quantization(checkpoint.config()).is_some();
        let load_in = if *full_finetuning && !stored { load_in.map(trainable::format) } else { *load_in };
        let plan = Plan::of(checkpoint, load_in, skip_modules.as_deref())?;
        let in_place = trainable::in_place(options, plan.is_some(), &config)?;
        check_tensors(checkpoint, &config, plan.as_ref())?;
        let stored_rows = config.vocab_size;
        if let Some(rows) = options.resize_model_vocab {
            config = config.resized(rows)?;
        }
        let resized = config.vocab_size != stored_rows;
        // What is trained is saved dense, whatever it was in between.
        let quantization = plan.as_ref().filter(|_| !full_finetuning).map(|plan| Quantization {
            config: plan.config.clone(),
            origins: BTreeMap::new(),
            dtypes: BTreeMap::new(),
        });
        let params =
            if in_place { ParamsBuilder::in_place(device, *dtype) } else { ParamsBuilder::new(device, *dtype) };
        let vectors = BTreeMap::new();
        let mut source = Source { checkpoint, options, plan, quantization, in_place, params, vectors, progress };
        source.load_vectors(&config)?;
        let parts = Parts::of(&mut source, &config)?;
        debug_assert!(*full_finetuning || source.params.is_empty());
        device.check()?;
        let Source { params, quantization, .. } = source;
        Ok(Self { quantization, resized, ..parts.model(params, config, options, widened, checkpoint.path()) })
    }
}

impl LoadOptions {
    /// The configuration for the length that is asked for, and what that took, after checks of what the device can.
    pub(crate) fn prepare(&self, config: ModelConfig) -> Result<(ModelConfig, Option<Widened>), Error> {
        if self.max_seq_length == 0 {
            return Err(Error::Argument("max_seq_length is 0; give at least 1".to_owned()));
        }
        let (config, widened) = config.widened(self.max_seq_length, &self.rope_scaling)?;
        let limits = self.device.limits();
        if let Some(most) = limits.max_hidden_size.filter(|&most| config.hidden_size > most) {
            return Err(Error::Argument(format!(
                "hidden_size is {}; on CUDA it is at most {most}; use device \"cpu\"",
                config.hidden_size
            )));
        }
        if !limits.takes_head_dim(config.head_dim) {
            let DeviceLimits { head_dim_multiple, max_head_dim, .. } = limits;
            return Err(Error::Argument(format!(
                "head_dim is {}; on CUDA it is a multiple of {head_dim_multiple}, up to {}; use device \"cpu\"",
                config.head_dim,
                max_head_dim.unwrap_or(usize::MAX)
            )));
        }
        Ok((config, widened))
    }
}

/// Where the weights of a model come from, in the order in which it has them.
pub(crate) trait Weights {
    /// A dense tensor.
    fn weight(&mut self, name: &str) -> Result<Weight, Error>;

    /// The weight of a linear, in codes if it is among those that are quantized.
    fn linear(&mut self, name: &str, shape: &[usize]) -> Result<Weight, Error>;
}

/// The weights of a model.
pub(crate) struct Parts {
    embed: Weight,
    blocks: Vec<Block>,
    norm: Weight,
    head: Option<Weight>,
}

impl Parts {
    pub(crate) fn of(source: &mut dyn Weights, config: &ModelConfig) -> Result<Self, Error> {
        Ok(Self {
            embed: source.weight(EMBED)?,
            blocks: (0..config.num_hidden_layers)
                .map(|layer| block(source, config, layer))
                .collect::<Result<Vec<_>, Error>>()?,
            norm: source.weight(NORM)?,
            head: if config.tie_word_embeddings { None } else { Some(source.weight(HEAD)?) },
        })
    }

    /// The model of these weights, whose checkpoint is called, or lies at, `path`.
    pub(crate) fn model(
        self,
        params: ParamsBuilder,
        config: ModelConfig,
        options: &LoadOptions,
        widened: Option<Widened>,
        path: &Path,
    ) -> CausalLm {
        let Self { embed, blocks, norm, head } = self;
        let tables = config.rope.tables(options.max_seq_length);
        CausalLm {
            embed,
            blocks,
            norm,
            head,
            tables: Tables::new(tables.cos, tables.sin, tables.half, &options.device),
            params: params.build(),
            device: options.device.clone(),
            dtype: options.dtype,
            adapter_config: None,
            adapter_name: String::new(),
            waiting: BTreeMap::new(),
            replaced: Replaced::default(),
            carried: Vec::new(),
            resized: false,
            checkpointing: GradientCheckpointing::Off,
            quantization: None,
            name_or_path: path.display().to_string(),
            revision: None,
            widened,
            path: path.to_owned(),
            taken: Taken::default(),
            merged: false,
            config,
        }
    }
}

struct Source<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a LoadOptions,
    plan: Option<Plan>,
    quantization: Option<Quantization>,
    /// Whether what is trained has no f32 copy.
    in_place: bool,
    params: ParamsBuilder,
    /// Frozen norms and biases, by name.
    vectors: BTreeMap<String, Weight>,
    progress: &'a mut dyn FnMut(u64),
}

impl Source<'_> {
    /// Loads frozen norms and biases before everything else: matrices then lie side by side in a device's memory, and
    /// what takes the place of some of them (an adapter's stack) finds room without gaps.
    fn load_vectors(&mut self, config: &ModelConfig) -> Result<(), Error> {
        if !self.options.full_finetuning {
            for Needed { name, .. } in names::needed(config).into_iter().filter(|needed| needed.shape.len() == 1) {
                let weight = self.weight(&name)?;
                self.vectors.insert(name, weight);
            }
        }
        Ok(())
    }

    /// The table `view` with as many rows as the vocabulary is to have.
    fn resized(&mut self, name: &str, view: &TensorView<'_>, rows: usize) -> Result<Weight, Error> {
        let hidden = view.shape[1];
        let values = vocab::resize_rows(view.to_f32()?, hidden, rows);
        if self.in_place {
            let bytes = trainable::rounded(&values);
            return Ok(Weight::Trained(self.params.push_bf16(group(name), name, &[rows, hidden], &bytes)));
        }
        if self.options.full_finetuning {
            return Ok(Weight::Trained(self.params.push_in(group(name), name, &[rows, hidden], true, &values)));
        }
        Ok(Weight::Frozen(from_f32(values, [rows, hidden], &self.options.device, self.options.dtype)))
    }
}

impl Weights for Source<'_> {
    fn linear(&mut self, name: &str, shape: &[usize]) -> Result<Weight, Error> {
        let codes = self.plan.as_ref().map(|plan| plan.codes(self.checkpoint, name, shape)).transpose()?.flatten();
        let Some(stored) = codes else { return self.weight(name) };
        (self.progress)(stored_bytes(self.checkpoint, name));
        let (origin, codes) = Origin::take(stored).expect("the weight of a linear is a matrix, as was checked");
        if self.options.full_finetuning {
            let weight = QuantizedWeight::new(codes, &self.options.device);
            if !weight.can_be_trained() {
                return Err(trainable::coded_scales(&format!("tensor \"{name}\" of the checkpoint")));
            }
            return Ok(Weight::Trained(self.params.push_quantized(name, weight)));
        }
        let quantization = self.quantization.as_mut().expect("there is a plan");
        quantization.origins.insert(name.to_owned(), origin);
        Ok(Weight::Quantized(QuantizedWeight::new(codes, &self.options.device)))
    }

    fn weight(&mut self, name: &str) -> Result<Weight, Error> {
        if let Some(weight) = self.vectors.remove(name) {
            return Ok(weight);
        }
        let view = self.checkpoint.get(name).expect("every needed tensor was checked to be there");
        (self.progress)(view.data.len() as u64);
        if let Some(quantization) = &mut self.quantization {
            quantization.dtypes.insert(name.to_owned(), view.dtype);
        }
        if let (Some(rows), EMBED | HEAD) = (self.options.resize_model_vocab, name) {
            return self.resized(name, &view, rows);
        }
        if self.options.full_finetuning {
            if self.in_place && view.shape.len() > 1 {
                let bytes = trainable::bf16_bytes(&view)?;
                return Ok(Weight::Trained(self.params.push_bf16(group(name), name, view.shape, &bytes)));
            }
            // As in transformers' Trainer: norms and biases, the vectors, take no weight decay.
            let decays = view.shape.len() > 1;
            return Ok(Weight::Trained(self.params.push_in(group(name), name, view.shape, decays, &view.to_f32()?)));
        }
        let [rows, cols] = match *view.shape {
            [n] => [1, n],
            [rows, cols] => [rows, cols],
            _ => unreachable!("shapes were checked"),
        };
        Ok(Weight::Frozen(frozen(&view, [rows, cols], &self.options.device, self.options.dtype)?))
    }
}

fn block(source: &mut dyn Weights, c: &ModelConfig, layer: usize) -> Result<Block, Error> {
    let input_layernorm = source.weight(&names::norm(layer, "input_layernorm"))?;
    let qkv = linears(source, c, layer, &[Projection::Q, Projection::K, Projection::V])?;
    let qk_norm = if c.qk_norm {
        let q = source.weight(&names::norm(layer, "self_attn.q_norm"))?;
        Some((q, source.weight(&names::norm(layer, "self_attn.k_norm"))?))
    } else {
        None
    };
    Ok(Block {
        input_layernorm,
        qkv,
        qk_norm,
        o: linears(source, c, layer, &[Projection::O])?,
        post_attention_layernorm: source.weight(&names::norm(layer, "post_attention_layernorm"))?,
        gate_up: linears(source, c, layer, &[Projection::Gate, Projection::Up])?,
        down: linears(source, c, layer, &[Projection::Down])?,
        heads: c.heads(),
        eps: c.rms_norm_eps,
    })
}

fn linears(
    source: &mut dyn Weights,
    c: &ModelConfig,
    layer: usize,
    projections: &[Projection],
) -> Result<LinearGroup, Error> {
    let found = projections.iter().map(|projection| {
        let name = projection.module(layer);
        let weight = source.linear(&format!("{name}.weight"), &projection.shape(c))?;
        let bias = projection.has_bias(c).then(|| source.weight(&format!("{name}.bias"))).transpose()?;
        Ok(Linear::new(name, weight, bias))
    });
    Ok(LinearGroup::new(found.collect::<Result<_, Error>>()?))
}

/// Whose learning rate a weight has.
fn group(name: &str) -> Group {
    if matches!(name, EMBED | HEAD) { Group::Embedding } else { Group::Default }
}

/// The tensor as it is frozen.
pub(crate) fn frozen(
    view: &TensorView<'_>,
    shape: [usize; 2],
    device: &Device,
    dtype: DType,
) -> Result<Tensor<2>, Error> {
    let same = matches!((view.dtype, dtype), (Dtype::BF16, DType::BF16) | (Dtype::F16, DType::F16));
    if same {
        // The bits as they are, one copy.
        return Ok(from_le_bytes(view.data, shape, device, dtype));
    }
    Ok(from_f32(view.to_f32()?, shape, device, dtype))
}

/// Compares what the checkpoint has, under [`canonical`] names, with what the configuration needs.
pub(crate) fn check_tensors(checkpoint: &Checkpoint, config: &ModelConfig, plan: Option<&Plan>) -> Result<(), Error> {
    let in_codes = |name: &str| plan.is_some_and(|plan| plan.is_stored(name));
    let needed = names::needed(config);
    let (mut missing, mut unfit, mut foreign) = (Vec::new(), Vec::new(), Vec::new());
    for Needed { name, shape } in &needed {
        match checkpoint.get(name) {
            None => missing.push(format!("\"{name}\" {shape:?}")),
            // Checked when its codes are read.
            Some(_) if in_codes(name) && Projection::is_linear(name) => {}
            Some(_) if in_codes(name) => {
                unfit.push(format!("\"{name}\" is quantized; only the linears of the blocks are read so"));
            }
            Some(view) if view.shape != shape.as_slice() => {
                unfit.push(format!("\"{name}\" has shape {:?}, expected {shape:?}", view.shape));
            }
            Some(view) if !matches!(view.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) => {
                unfit.push(format!("\"{name}\" is {}; F32, F16 and BF16 are read", view.dtype));
            }
            Some(_) => {}
        }
    }
    let known: std::collections::BTreeSet<&str> = needed.iter().map(|n| n.name.as_str()).collect();
    for name in checkpoint.names().filter(|name| !known.contains(name)) {
        if rekindle_quant::bnb::owner(name).is_some_and(|weight| in_codes(&weight) && known.contains(weight.as_str())) {
            continue;
        }
        // Old Llama checkpoints carry the rotary frequencies, which follow from the configuration.
        if name.ends_with("rotary_emb.inv_freq") {
            continue;
        }
        if name == HEAD && config.tie_word_embeddings {
            let same = checkpoint.get(HEAD).map(|t| t.data) == checkpoint.get(EMBED).map(|t| t.data);
            if !same {
                unfit.push(format!("\"{HEAD}\" differs from \"{EMBED}\" although tie_word_embeddings is true"));
            }
            continue;
        }
        foreign.push(format!("\"{name}\""));
    }
    let architecture = &config.architecture;
    let problems = if missing.len() == needed.len() {
        let example = listed(&missing);
        let has = checkpoint.names().map(|name| format!("\"{name}\"")).collect::<Vec<_>>();
        vec![format!(
            "no tensor has a name that {architecture} needs ({example}); it has {} tensors: {}",
            has.len(),
            listed(&has)
        )]
    } else {
        let adapted = foreign.iter().any(|name| name.contains(".base_layer."));
        let kinds = [
            (missing, "is missing".to_owned(), "are missing".to_owned()),
            (unfit, String::new(), "do not fit config.json".to_owned()),
            (foreign, format!("is not part of {architecture}"), format!("are not part of {architecture}")),
        ];
        let mut problems: Vec<String> =
            kinds.into_iter().flat_map(|(list, one, many)| few(&list, &one, &many)).collect();
        if adapted {
            problems.push("it was saved with an adapter on it; call merge_and_unload before saving".to_owned());
        }
        problems
    };
    if problems.is_empty() { Ok(()) } else { Err(Error::Tensors { path: checkpoint.path().to_path_buf(), problems }) }
}

/// Tensors that a message lists.
const LISTED: usize = 3;

/// A sentence for each tensor, or one for all of them where there are many.
fn few(list: &[String], one: &str, many: &str) -> Vec<String> {
    if list.len() <= LISTED {
        return list.iter().map(|tensor| format!("tensor {tensor} {one}").trim_end().to_owned()).collect();
    }
    vec![format!("{} tensors {many}: {}", list.len(), listed(list))]
}

/// The first of the list, and how many more there are.
fn listed(list: &[String]) -> String {
    let shown: Vec<&str> = list.iter().take(LISTED).map(String::as_str).collect();
    let more = list.len() - shown.len();
    let more = if more > 0 { format!(" and {more} more") } else { String::new() };
    format!("{}{more}", shown.join(", "))
}
