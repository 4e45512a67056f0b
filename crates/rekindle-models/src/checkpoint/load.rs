//! Loads a model from a checkpoint, tensor by tensor.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rekindle_hub::{Checkpoint, Dtype, TensorView};
use rekindle_kernels::fp8::Fp8Products;
use rekindle_kernels::gated_delta::DeltaHeads;
use rekindle_kernels::quantized::{QuantizedData, QuantizedFormat};
use rekindle_kernels::rope::HeadNorm;
use rekindle_kernels::{
    DType, Device, DeviceLimits, FrozenShards, Group, ParamsBuilder, QuantizedWeight, ShardExchange, Tensor, Weight,
    from_f32, from_le_bytes,
};
use rekindle_quant::DiskMetadata;
use rekindle_rope::{ContextExtension, RopeScaling};

use super::check_tensors::check_tensors;
use super::experts::{ByExpert, by_expert};
use super::kept_blocks::KeptBlocks;
use super::quantization::{LoadIn, Quantization, QuantizationPlan, is_quantized, stored_bytes};
use super::tensor_names::canonical;
use super::{master_weights, resize};
use crate::causal_lm::Provenance;
use crate::layers::{StackedTensors, WeightSource, plain_head_norm};
use crate::parameters::ParameterSpec;
use crate::spec::MixerSpec;
use crate::{CausalLm, Decoder, Error, ModelConfig, Role};

/// The options of loading a checkpoint.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// The device of the weights.
    pub device: Device,
    /// The dtype of frozen weights and activations.
    pub dtype: DType,
    /// The maximum length of a document, which is also the length of the rotary tables.
    pub max_seq_length: usize,
    /// The context extension beyond the model's window.
    pub rope_scaling: RopeScaling,
    /// True if all weights are trained: in `f32`, or quantized if `load_in` or the checkpoint selects that.
    pub full_finetuning: bool,
    /// True if trained weights are only stored in bf16, and updates are rounded stochastically.
    pub stochastic_rounding: bool,
    /// The storage of the blocks' linears. `None` is that of the checkpoint, dense or quantized.
    pub load_in: Option<LoadIn>,
    /// Linears to leave dense when the others are quantized, as transformers' `llm_int8_skip_modules`. `None` is
    /// `lm_head`.
    pub skip_modules: Option<Vec<String>>,
    /// The products with frozen linears that are in fp8 ([`rekindle_kernels::fp8`]); a dense checkpoint is then loaded in fp8.
    /// With `None`, they are computed in `dtype`.
    pub fp8: Option<Fp8Products>,
    /// Rows that the embedding table and the head are brought to. New ones are the mean of the old.
    pub resize_model_vocab: Option<usize>,
    /// The seed of a score head, which replaces the head over the vocabulary. If the checkpoint has a score head, it is loaded
    /// instead. `None` loads the head that the checkpoint describes.
    pub score_head: Option<u64>,
    /// The ranks that hold the frozen weights of the layers together, each a part. `None` loads all of them.
    pub shard_base: Option<Arc<dyn ShardExchange>>,
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
            fp8: None,
            resize_model_vocab: None,
            score_head: None,
            shard_base: None,
        }
    }
}

impl LoadOptions {
    /// Returns the options with dense weights quantized to fp8 where products in fp8 need that.
    pub(super) fn with_fp8_weights(&self, is_quantized: bool) -> Self {
        let in_fp8 = self.fp8.is_some() && !is_quantized && !self.full_finetuning;
        Self { load_in: self.load_in.or(in_fp8.then_some(LoadIn::Fp8)), ..self.clone() }
    }
}

impl CausalLm {
    /// Builds the model in `checkpoint`. `progress` receives the bytes of each tensor after it is read.
    ///
    /// # Errors
    /// [`Error::Config`] or [`Error::Tensors`], each a list of everything that is wrong; [`Error::Argument`]
    /// for a `max_seq_length` that `rope_scaling` does not reach.
    pub fn load(checkpoint: &Checkpoint, options: &LoadOptions, progress: &mut dyn FnMut(u64)) -> Result<Self, Error> {
        let checkpoint = &canonical(checkpoint);
        let options = &options.with_fp8_weights(is_quantized(checkpoint.config()));
        let LoadOptions { device, dtype, full_finetuning, load_in, skip_modules, .. } = options;
        let (mut config, extension) = options.prepare(ModelConfig::from_checkpoint(checkpoint)?)?;
        let ByExpert { checkpoint, was_stacked } = &by_expert(checkpoint, &config)?;
        let stored = is_quantized(checkpoint.config());
        let load_in = if *full_finetuning && !stored { load_in.map(master_weights::format) } else { *load_in };
        let plan = QuantizationPlan::of(checkpoint, load_in, skip_modules.as_deref(), &config)?;
        let in_place = master_weights::in_place(options, plan.is_some(), &config)?;
        let new_score = options.score_head.filter(|_| checkpoint.get(&config.names.tensor(Role::Head)).is_none());
        let new_score = new_score.map(|seed| initial_score(&config, seed));
        check_tensors(checkpoint, &config, plan.as_ref(), new_score.is_some())?;
        let kept = KeptBlocks::of(checkpoint.config(), options)?;
        let stored_rows = config.vocab_size();
        if let Some(rows) = options.resize_model_vocab {
            config = config.resized(rows)?;
        }
        let resized = config.vocab_size() != stored_rows;
        // What is trained is saved dense, whatever it was in between.
        let quantization = plan.as_ref().filter(|_| !full_finetuning).map(|plan| Quantization {
            config: plan.config().clone(),
            disk_metadata: BTreeMap::new(),
            dtypes: BTreeMap::new(),
        });
        let params =
            if in_place { ParamsBuilder::in_place(device, *dtype) } else { ParamsBuilder::new(device, *dtype) };
        let vectors = BTreeMap::new();
        let mut source = CheckpointWeights {
            checkpoint,
            options,
            plan,
            kept,
            quantization,
            in_place,
            params,
            vectors,
            new_score,
            progress,
        };
        source.load_vectors(&config)?;
        let mut decoder =
            Decoder::build(&config, &mut source, device, *dtype, options.max_seq_length, options.shards())?;
        if let Some(products) = options.fp8 {
            decoder.multiply_in_fp8(products, *dtype)?;
        }
        debug_assert!(*full_finetuning || source.params.is_empty());
        device.check()?;
        let CheckpointWeights { params, quantization, .. } = source;
        let stacked_experts = *was_stacked;
        let provenance =
            Provenance { quantization, resized, stacked_experts, ..Provenance::new(checkpoint.path(), extension) };
        Ok(Self::new(config, decoder, params, provenance))
    }
}

impl LoadOptions {
    /// The frozen weights that this rank shares with others.
    pub(crate) fn shards(&self) -> Option<Arc<FrozenShards>> {
        let exchange = self.shard_base.as_ref().filter(|exchange| exchange.size() > 1)?;
        Some(FrozenShards::new(Arc::clone(exchange), &self.device))
    }

    /// Refuses to divide frozen weights where there are none, or where it has not been compared with whole ones.
    fn check_shards(&self) -> Result<(), Error> {
        if self.shard_base.as_ref().is_none_or(|exchange| exchange.size() == 1) {
            return Ok(());
        }
        let refuse = |problem: &str| Err(Error::Argument(problem.to_owned()));
        if self.full_finetuning {
            return refuse(
                "shard_base divides frozen weights, and full_finetuning trains all; remove shard_base, and use \
                 shard_optimizer",
            );
        }
        if !self.device.is_cpu() && !self.device.is_planned() {
            return refuse(
                "shard_base has been compared with whole weights only on CPUs; remove it, or use device \"cpu\"",
            );
        }
        Ok(())
    }

    /// The configuration for the length that is asked for, and what that took, after checks of what the device can.
    pub(crate) fn prepare(&self, config: ModelConfig) -> Result<(ModelConfig, Option<ContextExtension>), Error> {
        let config = if self.score_head.is_some() { config.with_score_head()? } else { config };
        if config.has_score_head() && !self.device.is_cpu() {
            return Err(Error::Argument(format!(
                "a reward model ({}) has been compared with TRL only on the CPU; use device \"cpu\"",
                config.architecture
            )));
        }
        self.check_shards()?;
        if self.max_seq_length == 0 {
            return Err(Error::Argument("max_seq_length is 0; it must be at least 1".to_owned()));
        }
        let (config, extension) = config.with_context_length(self.max_seq_length, &self.rope_scaling)?;
        let unsupported = config.spec.unsupported(self.max_seq_length);
        if !unsupported.is_empty() {
            return Err(Error::Argument(format!(
                "{} needs features that this version does not support: {}",
                config.architecture,
                unsupported.join(", ")
            )));
        }
        let limits = self.device.limits();
        if let Some(most) = limits.max_hidden_size.filter(|&most| config.hidden_size() > most) {
            return Err(Error::Argument(format!(
                "hidden_size is {}, more than the {most} that CUDA supports; use device \"cpu\"",
                config.hidden_size()
            )));
        }
        if let Some(heads) = config.layouts().into_iter().find(|heads| !limits.takes_head_dim(heads.head_dim)) {
            let DeviceLimits { head_dim_multiple, max_head_dim, .. } = limits;
            return Err(Error::Argument(format!(
                "head_dim is {}; on CUDA it must be a multiple of {head_dim_multiple}, up to {}; use device \"cpu\"",
                heads.head_dim,
                max_head_dim.unwrap_or(usize::MAX)
            )));
        }
        let deltas = config.spec.layers.iter().filter_map(|layer| match &layer.mixer {
            MixerSpec::GatedDelta(delta) => Some(delta.heads()),
            MixerSpec::Attention(_) => None,
        });
        if let Some(heads) = deltas.into_iter().find(|heads| !heads.supported_by(&self.device)) {
            let DeltaHeads { key_dim, value_dim, .. } = heads;
            return Err(Error::Argument(format!(
                "linear_key_head_dim is {key_dim} and linear_value_head_dim {value_dim}; on CUDA each is 16, 32, 64 or 128; \
                 use device \"cpu\""
            )));
        }
        Ok((config, extension))
    }
}

/// The weights of a checkpoint.
struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    options: &'a LoadOptions,
    plan: Option<QuantizationPlan>,
    /// The linears that stay in the blocks of a GGUF file.
    kept: Option<KeptBlocks>,
    quantization: Option<Quantization>,
    /// True if trained weights have no f32 copy.
    in_place: bool,
    params: ParamsBuilder,
    /// Frozen norms and biases, by name.
    vectors: BTreeMap<String, Weight>,
    /// The values of a score head that the checkpoint does not have.
    new_score: Option<Vec<f32>>,
    progress: &'a mut dyn FnMut(u64),
}

impl CheckpointWeights<'_> {
    /// Loads frozen norms and biases before everything else: matrices then lie side by side in a device's memory, and
    /// what replaces some of them (an adapter's stack) finds space without gaps.
    fn load_vectors(&mut self, config: &ModelConfig) -> Result<(), Error> {
        if !self.options.full_finetuning {
            for tensor in config.parameters().into_iter().filter(ParameterSpec::is_vector) {
                let weight = self.dense(&tensor)?;
                self.vectors.insert(tensor.name, weight);
            }
        }
        Ok(())
    }

    /// The codes of a linear; `None` when it stays dense.
    fn codes(&mut self, tensor: &ParameterSpec) -> Result<Option<QuantizedData>, Error> {
        let name = &tensor.name;
        if let (Some(kept), &[out, input]) = (&self.kept, tensor.shape.as_slice()) {
            let blocks = kept.blocks(self.checkpoint, name, tensor.module(), [out, input])?;
            if let Some(QuantizedData { format: QuantizedFormat::Blocks { bytes, .. }, .. }) = &blocks {
                (self.progress)(bytes.len() as u64);
            }
            return Ok(blocks);
        }
        let Some(plan) = &self.plan else { return Ok(None) };
        let Some(stored) = plan.weight(self.checkpoint, name, &tensor.shape)? else { return Ok(None) };
        (self.progress)(stored_bytes(self.checkpoint, name));
        let (metadata, codes) =
            DiskMetadata::split(stored).expect("the weight of a linear is a matrix, as was checked");
        if let Some(quantization) = &mut self.quantization {
            quantization.disk_metadata.insert(name.clone(), metadata);
        }
        Ok(Some(codes))
    }

    /// The quantized weight of a linear, or of all experts.
    fn quantized(&mut self, name: &str, codes: QuantizedData) -> Result<Weight, Error> {
        let packed = QuantizedWeight::new(codes, &self.options.device);
        if !self.options.full_finetuning {
            return Ok(Weight::Quantized(packed));
        }
        if !packed.can_be_trained() {
            return Err(master_weights::untrainable(
                name,
                self.plan.as_ref().expect("something is quantized").config().format(),
            ));
        }
        Ok(Weight::Trained(self.params.push_quantized(name, packed)))
    }

    /// The codes of the linears of all experts; `None` where they stay dense.
    fn stacked_codes(&mut self, stack: &StackedTensors) -> Result<Option<QuantizedData>, Error> {
        let mut codes = Vec::new();
        for part in &stack.parts {
            codes.extend(self.codes(part)?);
        }
        let (found, all) = (codes.len(), stack.parts.len());
        let fail =
            |problem: String| Error::Tensors { path: self.checkpoint.path().to_owned(), problems: vec![problem] };
        let name = &stack.whole.name;
        if found == 0 {
            return Ok(None);
        }
        if found < all {
            return Err(fail(format!(
                "{found} of the {all} linears of experts in \"{name}\" are quantized; all of a layer are, or none"
            )));
        }
        let stacked = QuantizedData::stacked(codes).ok_or_else(|| {
            fail(format!(
                "the linears of experts in \"{name}\" {:?} are not quantized alike in whole blocks; load the experts in \
                 16 bits with skip_modules = [\".*experts\"], or use a smaller blocksize",
                stack.parts[0].shape
            ))
        })?;
        Ok(Some(stacked))
    }

    /// A tensor as it is read, with its dtype noted.
    fn view(&mut self, name: &str) -> TensorView<'_> {
        let view = self.checkpoint.get(name).expect("every needed tensor was checked to be there");
        (self.progress)(view.bytes() as u64);
        if let Some(quantization) = &mut self.quantization {
            quantization.dtypes.insert(name.to_owned(), view.dtype);
        }
        view
    }

    /// The linears of all experts as one dense weight.
    fn dense_stack(&mut self, StackedTensors { whole, parts }: &StackedTensors) -> Result<Weight, Error> {
        let shape = [whole.shape[0], whole.shape[1]];
        let (device, dtype) = (self.options.device.clone(), self.options.dtype);
        if self.in_place {
            let mut bytes = Vec::with_capacity(2 * whole.numel());
            for part in parts {
                bytes.extend_from_slice(&master_weights::bf16_bytes(&self.view(&part.name))?);
            }
            return Ok(Weight::Trained(self.params.push_bf16(group(whole), &whole.name, &shape, &bytes)));
        }
        let stored = self.checkpoint.get(&parts[0].name).map(|view| view.dtype);
        let same_bits = parts.iter().all(|part| self.checkpoint.get(&part.name).map(|view| view.dtype) == stored)
            && stored.is_some_and(|stored| is_same(stored, dtype));
        if same_bits && !self.options.full_finetuning {
            let mut bytes = Vec::with_capacity(dtype.size() * whole.numel());
            for part in parts {
                bytes.extend_from_slice(&self.view(&part.name).row_major());
            }
            return Ok(Weight::Frozen(from_le_bytes(&bytes, shape, &device, dtype)));
        }
        let mut values = Vec::with_capacity(whole.numel());
        for part in parts {
            values.extend(self.view(&part.name).to_f32()?);
        }
        if self.options.full_finetuning {
            return Ok(Weight::Trained(self.params.push_in(group(whole), &whole.name, &shape, true, &values)));
        }
        Ok(Weight::Frozen(from_f32(values, shape, &device, dtype)))
    }

    /// The weight of a new score head.
    fn scored(&mut self, tensor: &ParameterSpec, values: &[f32]) -> Weight {
        let (name, shape) = (&tensor.name, &tensor.shape);
        if self.in_place {
            return Weight::Trained(self.params.push_bf16(
                group(tensor),
                name,
                shape,
                &master_weights::rounded(values),
            ));
        }
        if self.options.full_finetuning {
            return Weight::Trained(self.params.push_in(group(tensor), name, shape, true, values));
        }
        let shape = [1, values.len()];
        Weight::Frozen(from_f32(values.to_vec(), shape, &self.options.device, self.options.dtype))
    }

    fn dense(&mut self, tensor: &ParameterSpec) -> Result<Weight, Error> {
        if let Some(values) = self.new_score.clone().filter(|_| tensor.is_score()) {
            return Ok(self.scored(tensor, &values));
        }
        let (name, group) = (&tensor.name, group(tensor));
        let view = self.checkpoint.get(name).expect("every needed tensor was checked to be there");
        (self.progress)(view.bytes() as u64);
        if let Some(quantization) = &mut self.quantization {
            quantization.dtypes.insert(name.clone(), view.dtype);
        }
        if let (Some(rows), true) = (self.options.resize_model_vocab, tensor.is_vocabulary()) {
            return self.resized(tensor, &view, rows);
        }
        if self.options.full_finetuning && !tensor.is_buffer() {
            if self.in_place && !tensor.is_vector() {
                let bytes = master_weights::bf16_bytes(&view)?;
                return Ok(Weight::Trained(self.params.push_bf16(group, name, view.shape, &bytes)));
            }
            // As in transformers' Trainer: norms and biases, the vectors, take no weight decay.
            let decays = tensor.decays();
            return Ok(Weight::Trained(self.params.push_in(group, name, view.shape, decays, &view.to_f32()?)));
        }
        let [rows, cols] = match *view.shape {
            [n] => [1, n],
            [rows, cols] | [rows, 1, cols] => [rows, cols],
            _ => unreachable!("shapes were checked"),
        };
        Ok(Weight::Frozen(frozen(&view, [rows, cols], &self.options.device, self.options.dtype)?))
    }

    /// The table `view` with as many rows as the vocabulary is to have.
    fn resized(&mut self, tensor: &ParameterSpec, view: &TensorView<'_>, rows: usize) -> Result<Weight, Error> {
        let (name, group) = (&tensor.name, group(tensor));
        let hidden = view.shape[1];
        let values = resize::resize_rows(view.to_f32()?, hidden, rows);
        if self.in_place {
            let bytes = master_weights::rounded(&values);
            return Ok(Weight::Trained(self.params.push_bf16(group, name, &[rows, hidden], &bytes)));
        }
        if self.options.full_finetuning {
            return Ok(Weight::Trained(self.params.push_in(group, name, &[rows, hidden], true, &values)));
        }
        Ok(Weight::Frozen(from_f32(values, [rows, hidden], &self.options.device, self.options.dtype)))
    }
}

impl WeightSource for CheckpointWeights<'_> {
    fn weight(&mut self, tensor: &ParameterSpec) -> Result<Weight, Error> {
        if let Some(weight) = self.vectors.remove(&tensor.name) {
            return Ok(weight);
        }
        if tensor.role.is_linear()
            && let Some(codes) = self.codes(tensor)?
        {
            return self.quantized(&tensor.name, codes);
        }
        self.dense(tensor)
    }

    fn ones(&self, head_dim: usize, eps: f64) -> HeadNorm {
        plain_head_norm(head_dim, eps, &self.options.device, self.options.dtype)
    }

    fn stacked(&mut self, stack: &StackedTensors) -> Result<Weight, Error> {
        match self.stacked_codes(stack)? {
            Some(codes) => self.quantized(&stack.whole.name, codes),
            None => self.dense_stack(stack),
        }
    }
}

/// The learning-rate group of a weight.
fn group(tensor: &ParameterSpec) -> Group {
    if tensor.is_vocabulary() { Group::Embedding } else { Group::Default }
}

/// Returns true if 16-bit elements of a file are those of a tensor, bit for bit.
fn is_same(stored: Dtype, dtype: DType) -> bool {
    matches!((stored, dtype), (Dtype::BF16, DType::BF16) | (Dtype::F16, DType::F16))
}

/// A frozen tensor on its device.
pub(crate) fn frozen(
    view: &TensorView<'_>,
    shape: [usize; 2],
    device: &Device,
    dtype: DType,
) -> Result<Tensor<2>, Error> {
    if is_same(view.dtype, dtype) {
        // The bits as they are, one copy.
        return Ok(from_le_bytes(&view.row_major(), shape, device, dtype));
    }
    Ok(from_f32(view.to_f32()?, shape, device, dtype))
}

/// Returns the values of a new score head: normal with mean 0 and standard deviation `initializer_range`, as in
/// transformers.
fn initial_score(config: &ModelConfig, seed: u64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || rng.random::<f64>();
    let range = config.initializer_range();
    // Box and Muller's transform.
    let mut normal = || (-2.0 * (1.0 - uniform()).ln()).sqrt() * (core::f64::consts::TAU * uniform()).cos();
    (0..config.hidden_size()).map(|_| (range * normal()) as f32).collect()
}
