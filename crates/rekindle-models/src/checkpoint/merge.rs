//! Merges an adapter into its base, as a checkpoint or in memory.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;

use rekindle_hub::{Checkpoint, Dtype, TensorSpec, write_f32};
use rekindle_kernels::{Params, Weight, from_f32, to_f32};
use rekindle_lora::{Adapter, EmbeddingTable, ExpertLinear, LoraFactors};
use rekindle_quant::bnb::StoredWeight;
use rekindle_quant::mxfp4;
use rekindle_rope::Positions;
use serde_json::Value;

use super::check_tensors::check_tensors;
use super::experts::{ByExpert, by_expert, stored_order};
use super::quantization::{Quantization, QuantizationPlan, stored_bytes, written_dtype};
use super::resize::resize_rows;
use super::tensor_names::canonical;
use super::writer::{self, CheckpointTensor, KeptTensors};
use crate::adapters::quantization_plan;
use crate::parameters::{ExpertStack, LayerRole, ParameterSpec};
use crate::spec::FeedForwardSpec;
use crate::{CausalLm, Error, ModelConfig, NonFinite, Role};

/// The properties of a merged checkpoint that differ from the base's.
#[derive(Clone, Copy, Debug, Default)]
pub struct MergeOptions<'a> {
    /// The positions that the adapter was trained with.
    pub positions: Option<&'a Positions>,
    /// Rows of the embedding table and the head, as [`LoadOptions`](crate::LoadOptions) has it.
    pub resize_model_vocab: Option<usize>,
    /// The dtype of all tensors.
    pub dtype: Option<Dtype>,
}

/// Writes `base` with `adapter` merged into it, into the existing directory `dir`: W + s·B·A in `f32`, rounded once to
/// `dtype`, or to what the tensor has in the base.
///
/// Codes of a quantized base are decoded: the adapter was trained against what they stand for, and the result is
/// dense. For an adapter that starts from what codes miss (LoftQ) those codes are made of a dense base here. One tensor
/// is in memory at a time. `progress` is told the bytes of each tensor as it is read.
///
/// # Errors
/// [`Error::Config`] and [`Error::Tensors`] for the base, [`Error::Lora`] for an adapter of another model,
/// [`Error::NonFinite`] for a base, an adapter or a result with an infinity or NaN, [`Error::File`] when the system
/// refuses.
pub fn merge(
    base: &Checkpoint,
    adapter: &Adapter,
    options: MergeOptions<'_>,
    dir: &Path,
    progress: &mut dyn FnMut(u64),
) -> Result<(), Error> {
    let MergeOptions { positions, resize_model_vocab, dtype } = options;
    let source = MergedTensors::open(base, Some(adapter), resize_model_vocab)?;
    let tensor = |needed: ParameterSpec| {
        let dtype = dtype.unwrap_or_else(|| source.dtype(&needed));
        CheckpointTensor { spec: TensorSpec::new(needed.name.clone(), dtype, needed.shape.clone()), source: needed }
    };
    let tensors = source.tensors().into_iter().map(tensor).collect();
    let mut refused = None;
    let mut config = source.config.clone();
    let kept = KeptTensors::of(source.base.path(), &config)?;
    let written = writer::write_tensors(dir, &kept, tensors, |needed, spec, out| {
        let values = source.merged(needed).and_then(|values| {
            check_values(&needed.name, spec.dtype, &values)?;
            Ok(values)
        });
        let values = values.map_err(|error| {
            refused = Some(error);
            std::io::Error::other("a tensor cannot be merged")
        })?;
        progress(source.bytes(needed));
        write_f32(out, spec.dtype, &values)
    });
    if let Some(error) = refused {
        return Err(error);
    }
    written?;
    if source.unties() {
        config.set_json("tie_word_embeddings", Value::from(false));
    }
    if let Some(positions) = positions {
        positions.apply(config.decoder_json_mut());
    }
    let mut json = config.json.clone();
    writer::set_quantization(&mut json, None);
    if let Some(dtype) = dtype {
        writer::set_dtype(&mut json, dtype);
    }
    writer::write_config(dir, &json)
}

/// The tensors of a base, with an adapter added into them if there is one.
pub(super) struct MergedTensors<'a> {
    base: Checkpoint,
    /// The configuration of the result.
    pub(super) config: ModelConfig,
    plan: Option<QuantizationPlan>,
    adapter: Option<&'a Adapter>,
    /// True if the base has the linears of all experts of a layer in one tensor.
    was_stacked: bool,
    /// True if the base's embedding table is its head.
    is_tied: bool,
    /// The name of the embedding table, which a tied head is read from.
    embedding: String,
}

impl<'a> MergedTensors<'a> {
    /// Checks a base and an adapter, and returns the tensors of the result, with `resize_model_vocab` rows.
    pub(super) fn open(
        base: &Checkpoint,
        adapter: Option<&'a Adapter>,
        resize_model_vocab: Option<usize>,
    ) -> Result<Self, Error> {
        adapter.map(check_adapter).transpose()?;
        let base = &canonical(base);
        let mut config = ModelConfig::from_checkpoint(base)?;
        let brings_score = adapter.is_some_and(|adapter| adapter.config.is_reward_model());
        if brings_score {
            config = config.with_score_head()?;
        }
        let ByExpert { checkpoint: base, was_stacked } = by_expert(base, &config)?;
        let plan = match adapter {
            Some(adapter) => quantization_plan(&base, adapter, &config)?,
            None => QuantizationPlan::of(&base, None, None, &config)?,
        };
        check_tensors(&base, &config, plan.as_ref(), brings_score)?;
        if let Some(rows) = resize_model_vocab {
            config = config.resized(rows)?;
        }
        let (is_tied, embedding) = (config.tie_word_embeddings(), config.names.tensor(Role::Embedding));
        Ok(Self { base, config, plan, adapter, was_stacked, is_tied, embedding })
    }

    /// Returns the tensors of the result: the base's, and a head of its own where the adapter unties it from the table.
    pub(super) fn tensors(&self) -> Vec<ParameterSpec> {
        let list = self.parameters();
        if !self.was_stacked && !self.config.names.experts.only_stacked {
            return list;
        }
        list.into_iter().filter_map(|needed| self.config.stacked_parameter(needed)).collect()
    }

    /// Returns the parameters of the result, each alone but for the linears of experts: those of one kind of a layer are
    /// together, in the order of experts.
    pub(super) fn stacks(&self) -> Vec<Vec<ParameterSpec>> {
        let key = |needed: &ParameterSpec| match (needed.role, needed.role.expert()) {
            (Role::Layer(layer, _), Some((role, _))) => Some((layer, role)),
            _ => None,
        };
        let mut stacks: Vec<Vec<ParameterSpec>> = Vec::new();
        let mut places = BTreeMap::new();
        for needed in self.parameters() {
            match key(&needed) {
                None => stacks.push(vec![needed]),
                Some(key) => {
                    let place = *places.entry(key).or_insert(stacks.len());
                    if place == stacks.len() {
                        stacks.push(Vec::new());
                    }
                    stacks[place].push(needed);
                }
            }
        }
        stacks
    }

    /// Returns the parameters of the result, and a head of its own where the adapter unties it from the table.
    fn parameters(&self) -> Vec<ParameterSpec> {
        let config = &self.config;
        let mut list = config.parameters();
        if self.unties() {
            let shape = vec![config.vocab_size(), config.hidden_size()];
            list.push(ParameterSpec { name: config.names.tensor(Role::Head), role: Role::Head, shape });
        }
        list
    }

    /// Returns true if the head is the embedding table in the base and has rows of its own in the result.
    pub(super) fn unties(&self) -> bool {
        self.adapter.is_some_and(|adapter| unties(adapter, &self.config))
    }

    /// Returns the tensor of the base if it is the result: stored dense, with the given shape, and not adapted.
    pub(super) fn unchanged(&self, needed: &ParameterSpec) -> Option<rekindle_hub::TensorView<'_>> {
        let module = needed.module();
        let is_adapted = self.adapter.is_some_and(|adapter| {
            adapter.biases.contains_key(module)
                || adapter.saved.contains_key(module)
                || self.factors(needed).is_some()
                || self.table(needed).is_some()
        });
        let is_quantized = self.plan.is_some() && needed.role.is_linear();
        self.view(needed).filter(|view| !is_adapted && !is_quantized && view.shape == needed.shape)
    }

    fn dtype(&self, needed: &ParameterSpec) -> Dtype {
        // A tensor that is quantized here has a dtype in the base.
        let in_base = self.plan.as_ref().is_some_and(|plan| plan.is_stored(&needed.name));
        match if in_base { self.stored(needed) } else { Ok(None) } {
            Ok(Some(weight)) => weight.dense_dtype(),
            _ => self.view(needed).map_or(Dtype::F32, |view| written_dtype(view.dtype)),
        }
    }

    fn view(&self, needed: &ParameterSpec) -> Option<rekindle_hub::TensorView<'_>> {
        if let Some(first) = self.linears(needed).first() {
            return self.base.get(&first.name);
        }
        let tied = || (needed.role == Role::Head).then(|| self.base.get(&self.embedding)).flatten();
        self.base.get(&needed.name).or_else(tied)
    }

    /// The bytes that a tensor has in the base, whatever it is there.
    pub(super) fn bytes(&self, needed: &ParameterSpec) -> u64 {
        let bytes = |view: rekindle_hub::TensorView<'_>| view.bytes() as u64;
        let linears = self.linears(needed);
        if linears.is_empty() {
            return self.view(needed).map_or(0, bytes);
        }
        linears.iter().map(|linear| stored_bytes(&self.base, &linear.name)).sum()
    }

    fn stored(&self, needed: &ParameterSpec) -> Result<Option<StoredWeight>, Error> {
        match &self.plan {
            Some(plan) if needed.role.is_linear() => plan.weight(&self.base, &needed.name, &needed.shape),
            _ => Ok(None),
        }
    }

    /// Returns the codes and scales of a linear that the base has in MXFP4 and the adapter does not change.
    pub(super) fn mxfp4(&self, needed: &ParameterSpec) -> Option<(&[u8], &[u8])> {
        let stored = |suffix| self.base.get(&format!("{}{suffix}", needed.name)).map(|view| view.data);
        let both = stored(mxfp4::BLOCKS).zip(stored(mxfp4::SCALES));
        both.filter(|_| self.factors(needed).is_none())
    }

    /// The table that the adapter brings for this parameter; one stands for both where the base ties them.
    fn table(&self, needed: &ParameterSpec) -> Option<&EmbeddingTable> {
        let tables = &self.adapter?.tables;
        let tied = || tables.values().next().filter(|_| self.is_tied && needed.role.is_vocabulary());
        tables.get(needed.module()).or_else(tied)
    }

    /// The linears of the experts whose tensor this is; none of another tensor.
    fn linears(&self, needed: &ParameterSpec) -> Vec<ParameterSpec> {
        let Role::Layer(layer, LayerRole::Experts(stack)) = needed.role else { return Vec::new() };
        let FeedForwardSpec::Moe(moe) = &self.config.spec.layers[layer].feed_forward else { return Vec::new() };
        let (experts, roles) = (moe.experts, moe.roles(stack));
        let shape = moe.expert_shape(stack, self.config.hidden_size()).to_vec();
        let linear = |role| {
            let role = Role::Layer(layer, role);
            ParameterSpec { name: self.config.names.tensor(role), role, shape: shape.clone() }
        };
        let of = |expert| roles.iter().map(move |&role| LayerRole::Expert(role, expert));
        (0..experts).flat_map(of).map(linear).collect()
    }

    /// The factors on a linear; of those on all outputs of an expert, the part for this one.
    fn factors(&self, needed: &ParameterSpec) -> Option<(Cow<'_, LoraFactors>, f64)> {
        let adapter = self.adapter?;
        let (factors, lora) = (&adapter.factors, adapter.config.lora());
        let module = needed.module();
        if let Some(found) = factors.get(module) {
            return Some((Cow::Borrowed(found), lora.scale_of(module)));
        }
        let (role, _) = needed.role.expert()?;
        let joined = format!("{}.{}", module.rsplit_once('.')?.0, self.config.names.experts.joined);
        let (stack, place) = role.place();
        let LoraFactors { r, a, b, .. } = factors.get(&joined).filter(|_| stack == ExpertStack::GateUp)?;
        // Where gate and up are one linear, the factors are under its own name.
        let rows = b.len() / 2;
        let part = LoraFactors { r: *r, a: a.clone(), b: b[place * rows..][..rows].to_vec(), magnitude: None };
        Some((Cow::Owned(part), lora.scale_of(&joined)))
    }

    /// The values of a tensor with what the adapter adds to it.
    pub(super) fn merged(&self, needed: &ParameterSpec) -> Result<Vec<f32>, Error> {
        let linears = self.linears(needed);
        if !linears.is_empty() {
            let mut all = Vec::with_capacity(needed.numel());
            for linear in &linears {
                all.extend(self.merged(linear)?);
            }
            return Ok(stored_order(&all, &self.config, needed.role).into_owned());
        }
        let (module, kind) = needed.name.rsplit_once('.').unwrap_or((&needed.name, ""));
        if kind == "bias"
            && let Some(bias) = self.adapter.and_then(|adapter| adapter.biases.get(module))
        {
            return Ok(bias.clone());
        }
        if kind == "weight"
            && let Some((_, weight)) = self.adapter.and_then(|adapter| adapter.saved.get(module))
        {
            return Ok(weight.clone());
        }
        if kind == "weight"
            && let Some(table) = self.table(needed)
        {
            return Ok(table.values.clone());
        }
        let mut values = match self.stored(needed)? {
            Some(weight) => weight.dequantize(),
            None => self.view(needed).expect("every needed tensor was checked to be there").to_f32()?,
        };
        if let (true, &[rows, width]) = (needed.role.is_vocabulary(), needed.shape.as_slice()) {
            values = resize_rows(values, width, rows);
        }
        if let (Some((factors, scale)), &[out, input]) = (self.factors(needed), needed.shape.as_slice()) {
            rekindle_lora::merge(&mut values, [out, input], &factors, scale, factors.magnitude.as_deref());
        }
        Ok(values)
    }
}

impl CausalLm {
    /// Returns true if an adapter was merged into the weights, which are then no longer those of the checkpoint.
    pub fn is_merged(&self) -> bool {
        self.provenance.merged
    }

    /// Merges the active adapter into the weights and deletes it: the same function, without the adapter's cost. Merged
    /// linears become dense. Inactive adapters are deleted, since they belong to the base before the merge. Without an
    /// active adapter nothing happens.
    ///
    /// # Errors
    /// [`Error::NonFinite`] for an adapter with an infinity or NaN, and [`Error::Argument`] for a base that several ranks hold
    /// together; the model is unchanged. [`Error::Device`] when the device fails, for example without free memory; the model
    /// must then be loaded again.
    pub fn merge_and_unload(&mut self) -> Result<(), Error> {
        let Some(adapter) = self.adapter() else { return Ok(()) };
        if self.decoder.shards().is_some() {
            return Err(Error::Argument(
                "an adapter is not merged into a base that several ranks hold together (shard_base); save the adapter, \
                 and merge it with one rank (rekindle merge)"
                    .to_owned(),
            ));
        }
        check_adapter(&adapter)?;
        self.remove_adapter();
        self.adapters.inactive.clear();
        self.provenance.merged = true;
        let (device, dtype) = (self.device().clone(), self.dtype());
        let frozen = |values: Vec<f32>, shape: [usize; 2]| Weight::Frozen(from_f32(values, shape, &device, dtype));
        let Self { decoder, params, provenance, .. } = self;
        decoder.replace_weights(|linear| {
            let (factors, bias) = (adapter.factors.get(&linear.name), adapter.biases.get(&linear.name));
            if let Some(factors) = factors {
                let shape = linear.weight.dims();
                let mut values = to_f32(linear.weight.matrix(params));
                let scale = adapter.config.lora().scale_of(&linear.name);
                rekindle_lora::merge(&mut values, shape, factors, scale, factors.magnitude.as_deref());
                linear.weight = frozen(values, shape);
                if let Some(quantization) = &mut provenance.quantization {
                    quantization.disk_metadata.remove(&format!("{}.weight", linear.name));
                }
            }
            if let Some(bias) = bias {
                linear.bias = Some(frozen(bias.clone(), [1, bias.len()]));
            }
            factors.is_some() || bias.is_some()
        });
        for experts in decoder.experts_mut() {
            merge_experts(experts, &adapter, params, &frozen, provenance.quantization.as_mut());
        }
        if let Some(quantization) = &mut provenance.quantization {
            quantization.keep_dense(adapter.factors.keys());
            if quantization.disk_metadata.is_empty() {
                provenance.quantization = None;
            }
        }
        let vocabulary = &mut self.decoder.vocabulary;
        for (name, EmbeddingTable { shape, values, .. }) in &adapter.tables {
            let table = frozen(values.clone(), *shape);
            if *name == self.config.names.module(Role::Head) && !self.config.tie_word_embeddings() {
                vocabulary.head = Some(table);
            } else {
                vocabulary.embedding = table;
            }
        }
        if unties(&adapter, &self.config) {
            vocabulary.head = Some(vocabulary.embedding.clone());
            self.config.spec.head.tied = false;
            self.config.set_json("tie_word_embeddings", Value::from(false));
        }
        for (name, (shape, values)) in adapter.saved {
            let weight = frozen(values, shape);
            if name == self.config.names.module(Role::Embedding) {
                vocabulary.embedding = weight;
            } else if !self.config.tie_word_embeddings() {
                vocabulary.head = Some(weight);
            }
        }
        self.device().check()?;
        Ok(())
    }
}

/// Adds the factors of an adapter into the weight of experts that it is on, which becomes dense.
fn merge_experts(
    experts: &mut ExpertLinear,
    adapter: &Adapter,
    params: &Params,
    frozen: &impl Fn(Vec<f32>, [usize; 2]) -> Weight,
    quantization: Option<&mut Quantization>,
) {
    let (names, count) = (experts.names().clone(), experts.experts());
    let is_adapted = |part: &str| adapter.factors.contains_key(&names.linear(0, part));
    let parts: Vec<_> = names.parts().into_iter().filter(|(part, ..)| is_adapted(part)).collect();
    if parts.is_empty() {
        return;
    }
    let shape @ [rows, input] = experts.weight.dims();
    let mut values = to_f32(experts.weight.matrix(params));
    for (expert, rows) in values.chunks_exact_mut(rows / count * input).enumerate() {
        for (part, first, width) in &parts {
            let name = names.linear(expert, part);
            let (factors, scale) = (&adapter.factors[&name], adapter.config.lora().scale_of(&name));
            rekindle_lora::merge(&mut rows[first * input..][..width * input], [*width, input], factors, scale, None);
        }
    }
    experts.weight = frozen(values, shape);
    if let Some(quantization) = quantization {
        let linears = (0..count).flat_map(|expert| names.outputs.iter().map(move |(output, _)| (expert, *output)));
        for (expert, output) in linears {
            quantization.disk_metadata.remove(&format!("{}.weight", names.linear(expert, output)));
        }
    }
}

/// Refuses an adapter with an infinity or NaN.
fn check_adapter(adapter: &Adapter) -> Result<(), Error> {
    let Some(name) = adapter.first_non_finite() else { return Ok(()) };
    let found = NonFinite::Weight { name, trained: true, rows: Vec::new() };
    Err(Error::NonFinite { what: "the adapter has a number that is not finite".to_owned(), found: Some(found) })
}

/// Refuses the values of a merged tensor that `dtype` cannot hold.
fn check_values(name: &str, dtype: Dtype, values: &[f32]) -> Result<(), Error> {
    // From here on values round to infinity: half a unit in the last place beyond the largest number.
    let limit = match dtype {
        Dtype::F16 => 65_520.0,
        Dtype::BF16 => f32::from_bits(0x7f7f_8000),
        _ => f32::INFINITY,
    };
    let Some(value) = values.iter().find(|value| value.is_nan() || value.abs() >= limit) else { return Ok(()) };
    let what = if value.is_finite() {
        format!("{value:e} in the merged \"{name}\" is outside the range of {dtype}: merge with dtype bf16 or f32")
    } else {
        format!("the merged \"{name}\" is not finite: the base's weight is damaged, or the adapter's product overflows")
    };
    Err(Error::NonFinite { what, found: None })
}

/// Returns true if table and head, one weight in the base, are two after the merge.
fn unties(adapter: &Adapter, config: &ModelConfig) -> bool {
    config.tie_word_embeddings() && !adapter.saved.is_empty() && !adapter.config.lora().ensure_weight_tying
}
