//! The decoder: embedding → layers → final norm, in one walk.
//!
//! Training, evaluation, generation and the search for non-finite numbers all go through [`Decoder::walk`]. The head
//! and the loss come after it (`loss.rs`).

mod backward;
mod batch_context;
mod decode;
mod fp8;
mod step;

use core::convert::Infallible;
use core::ops::Range;
use std::sync::Arc;

use rekindle_kernels::attention::Heads;
use rekindle_kernels::linear_cross_entropy::LmHead;
use rekindle_kernels::neftune::{self, Noise};
use rekindle_kernels::rope::RopeTables;
use rekindle_kernels::{BlockPass, DType, Device, FrozenShards, Params, Tensor, Weight, embedding, from_f32, to_f32};
use rekindle_lora::{Adaptable, AdaptableMut, ExpertLinear, Linear, LinearGroup};
use rekindle_rope::RopeConfig;

pub use backward::{DecoderBackward, DecoderSaved};
pub use batch_context::{BatchContext, StepKey};
pub(crate) use decode::SequenceRows;
pub use decode::{DecodeBatch, DecodeStates};
pub use step::{DecodeSteps, PendingStep};

use crate::layers::{Block, Context, FeedForward, LayerBuilder, RmsNorm, WeightSource};
use crate::parameters::{ExpertStack, Parameter, ParameterSpec, WeightPart};
use crate::spec::{AttentionSpec, EmbeddingSpec, QueryScale, RopeId};
use crate::{Batch, Error, GradientCheckpointing, LayerSpec, ModelConfig, Role};

/// The layers of a model with its embedding and head.
///
/// # Shapes
/// ids `[tokens]`; every residual stream and the result `[tokens, hidden]`.
///
/// # Dtypes
/// Weights, activations and the result have the compute dtype, the residual stream and its gradient
/// [`residual_dtype`](Self::residual_dtype).
#[derive(Clone, Debug)]
pub struct Decoder {
    /// The layers in order.
    pub layers: Vec<Block>,
    /// The norm after the last layer.
    pub norm: RmsNorm,
    /// The current embedding table and head.
    pub(crate) vocabulary: Vocabulary,
    /// The embedding table and head of the base model, if an adapter trains one of them in full.
    pub(crate) base_vocabulary: Option<Vocabulary>,
    embedding_multiplier: Option<f32>,
    /// True if the multiplier belongs to the embedding: noise is added to the product.
    noise_after_multiplier: bool,
    logit_multiplier: f32,
    logit_softcap: Option<f32>,
    ropes: Vec<RopeTables>,
    /// The distinct layouts of attention; [`Attention::layout`](crate::layers::Attention::layout) is an index.
    layouts: Vec<Heads>,
    /// The frozen weights of the layers, if several ranks hold them together.
    shards: Option<Arc<FrozenShards>>,
    device: Device,
    dtype: DType,
}

/// The two matrices with a row for each token id.
#[derive(Clone, Debug)]
pub(crate) struct Vocabulary {
    pub(crate) embedding: Weight,
    /// `None` where it is the embedding table.
    pub(crate) head: Option<Weight>,
}

impl Vocabulary {
    pub(crate) fn head(&self) -> &Weight {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

impl Decoder {
    /// Builds the decoder of `config` from `source`, for documents of up to `max_seq_length` tokens. `shards` divides the frozen
    /// weights of its layers, one layer after another.
    pub(crate) fn build(
        config: &ModelConfig,
        source: &mut dyn WeightSource,
        device: &Device,
        dtype: DType,
        max_seq_length: usize,
        shards: Option<Arc<FrozenShards>>,
    ) -> Result<Self, Error> {
        let spec = &config.spec;
        let names = &config.names;
        let table = vec![spec.vocab_size, spec.hidden_size];
        let tensor = |role: Role, shape: Vec<usize>| ParameterSpec { name: names.tensor(role), role, shape };
        let embedding = source.weight(&tensor(Role::Embedding, table.clone()))?;
        let layouts = config.layouts();
        let mut layers = Vec::with_capacity(spec.layers.len());
        for (layer, layer_spec) in spec.layers.iter().enumerate() {
            let heads = layer_spec.attention().map(AttentionSpec::layout);
            let layout = layouts.iter().position(|known| Some(*known) == heads);
            let mut builder = LayerBuilder { source: &mut *source, names, layer };
            let mut block = Block::build(&mut builder, layer_spec, spec.hidden_size, layout)?;
            if let Some(shards) = &shards {
                shards.push_block(block.weights_mut());
            }
            layers.push(block);
        }
        let norm = source.weight(&tensor(Role::FinalNorm, vec![spec.hidden_size]))?;
        let head =
            if spec.head.tied { None } else { Some(source.weight(&tensor(Role::Head, config.head_shape().to_vec()))?) };
        let tables = |rope: &RopeConfig, scale: Option<QueryScale>| {
            let mut tables = rope.tables(max_seq_length);
            if let Some(scale) = scale {
                let scaled = |row: (usize, &mut [f32])| row.1.iter_mut().for_each(|x| *x *= scale.at(row.0));
                tables.cos.chunks_exact_mut(tables.half).enumerate().for_each(scaled);
                tables.sin.chunks_exact_mut(tables.half).enumerate().for_each(scaled);
            }
            RopeTables::new(tables.cos, tables.sin, tables.half, device)
        };
        let mut ropes: Vec<RopeTables> = spec.ropes.iter().map(|rope| tables(rope, None)).collect();
        let mut scaled: Vec<(RopeId, QueryScale)> = Vec::new();
        for (layer, layer_spec) in layers.iter_mut().zip(&spec.layers) {
            let Some(attention) = layer_spec.attention() else { continue };
            let Some((rope, scale)) = attention.rope.zip(attention.query_scale) else { continue };
            let known = scaled.iter().position(|known| *known == (rope.id, scale));
            let at = known.unwrap_or_else(|| {
                scaled.push((rope.id, scale));
                ropes.push(tables(&spec.ropes[rope.id.0], Some(scale)));
                scaled.len() - 1
            });
            if let Some(attention) = layer.mixer.attention_mut() {
                attention.query_rope = Some(RopeId(spec.ropes.len() + at));
            }
        }
        Ok(Self {
            layers,
            norm: RmsNorm::new(norm, &spec.final_norm),
            vocabulary: Vocabulary { embedding, head },
            base_vocabulary: None,
            embedding_multiplier: spec.embedding.multiplier_in(dtype),
            noise_after_multiplier: spec.embedding.rounds_multiplier,
            logit_multiplier: spec.head.multiplier.map_or(1.0, |m| m as f32),
            logit_softcap: spec.head.softcap.map(|c| c as f32),
            ropes,
            layouts,
            shards,
            device: device.clone(),
            dtype,
        })
    }

    /// Returns the device of the weights.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Returns the frozen weights of the layers, if several ranks hold them together.
    pub fn shards(&self) -> Option<&Arc<FrozenShards>> {
        self.shards.as_ref()
    }

    /// Begins a pass through layers whose weights several ranks hold together.
    fn begin_pass(&self, layers: Range<usize>, is_backward: bool) -> Option<BlockPass> {
        self.shards.as_ref().map(|shards| shards.begin(layers, is_backward))
    }

    /// Returns the dtype of frozen weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the dtype of the residual stream and of its gradient: f32 if activations are f16, whose range the sum of all
    /// layers and its gradient leave first, and otherwise the dtype of activations.
    pub fn residual_dtype(&self) -> DType {
        if self.dtype == DType::F16 { DType::F32 } else { self.dtype }
    }

    /// Returns the maximum length of a document.
    pub fn max_seq_length(&self) -> usize {
        self.ropes.iter().map(RopeTables::positions).min().unwrap_or(0)
    }

    /// Returns the embedding table; with `adapters`, the one that an adapter trains in full, if any.
    pub fn embedding(&self, adapters: bool) -> &Weight {
        &self.vocabulary(adapters).embedding
    }

    /// Returns the output layer, which may be the embedding table.
    pub fn head(&self, adapters: bool) -> &Weight {
        self.vocabulary(adapters).head()
    }

    /// Returns the output layer for the loss and for generation.
    pub fn lm_head(&self, params: &Params, adapters: bool) -> LmHead {
        let weight = self.head(adapters).matrix(params);
        LmHead { weight, multiplier: self.logit_multiplier, softcap: self.logit_softcap }
    }

    fn vocabulary(&self, adapters: bool) -> &Vocabulary {
        self.base_vocabulary.as_ref().filter(|_| !adapters).unwrap_or(&self.vocabulary)
    }

    /// Visits every weight with its role, in the order in which trained ones lie in the flat buffers.
    pub fn parameters<'a>(&'a self, visit: &mut dyn FnMut(Parameter<'a>)) {
        visit(Parameter { role: Role::Embedding, weight: &self.vocabulary.embedding });
        for (index, layer) in self.layers.iter().enumerate() {
            layer.visit(&mut |role, weight| visit(Parameter { role: Role::Layer(index, role), weight }));
        }
        visit(Parameter { role: Role::FinalNorm, weight: &self.norm.weight });
        if let Some(weight) = &self.vocabulary.head {
            visit(Parameter { role: Role::Head, weight });
        }
    }

    /// Returns the weight with a role, or the one that holds the rows of an expert's linear.
    pub(crate) fn weight_part(&self, role: Role) -> Option<WeightPart<'_>> {
        let (Role::Layer(layer, _), Some((linear, expert))) = (role, role.expert()) else {
            return Some(WeightPart { weight: self.weight(role)?, part: (0, 1) });
        };
        let FeedForward::Moe(moe) = &self.layers.get(layer)?.feed_forward else { return None };
        let (stack, place) = linear.place();
        let experts = match stack {
            ExpertStack::GateUp => &moe.gate_up,
            ExpertStack::Down => &moe.down,
        };
        let each = experts.names().outputs.len();
        Some(WeightPart { weight: &experts.weight, part: (expert * each + place, experts.experts() * each) })
    }

    /// Returns the weight with a role; `None` for one that this model does not have.
    pub fn weight(&self, role: Role) -> Option<&Weight> {
        match role {
            Role::Embedding => Some(&self.vocabulary.embedding),
            Role::Layer(layer, role) => self.layers.get(layer)?.weight(role),
            Role::FinalNorm => Some(&self.norm.weight),
            Role::Head => self.vocabulary.head.as_ref(),
        }
    }

    /// Everything in the layers that adapters can be on, in the order of the forward pass.
    pub fn adaptable(&self) -> impl Iterator<Item = Adaptable<'_>> {
        self.layers.iter().flat_map(Block::adaptable)
    }

    /// Returns the same as [`adaptable`](Self::adaptable), mutably.
    pub fn adaptable_mut(&mut self) -> impl Iterator<Item = AdaptableMut<'_>> {
        self.layers.iter_mut().flat_map(Block::adaptable_mut)
    }

    /// The linears of all layers without those of experts, in the order of the forward pass.
    pub fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.adaptable().filter_map(Adaptable::linears).flat_map(LinearGroup::linears)
    }

    /// Replaces weights and biases of [`linears`](Self::linears) as [`LinearGroup::replace_weights`] does.
    pub fn replace_weights(&mut self, mut replace: impl FnMut(&mut Linear) -> bool) {
        self.adaptable_mut().filter_map(AdaptableMut::linears).for_each(|group| group.replace_weights(&mut replace));
    }

    /// The projections of the experts of all layers, in the order of the forward pass.
    pub fn experts_mut(&mut self) -> impl Iterator<Item = &mut ExpertLinear> {
        self.adaptable_mut().filter_map(AdaptableMut::experts)
    }

    /// Returns the normalized hidden states that the head reads, `[tokens, hidden]`, and what the backward needs. Layers
    /// below the lowest trained one save nothing.
    pub fn forward(
        &self,
        ctx: Context<'_>,
        batch: &BatchContext<'_>,
        checkpointing: GradientCheckpointing,
    ) -> (Tensor<2>, DecoderSaved) {
        let mut saved = DecoderSaved::new(self);
        let last = self.layers.len();
        let Ok(h) = self.walk(
            self.embed(ctx, &batch.batch.input_ids),
            batch.noise(),
            |index, layer, h| {
                let (y, block) = layer.forward(ctx, h);
                block.add_to(&mut saved.load);
                saved.push(index, block, checkpointing, index + 1 == last);
                y
            },
            |_, _| Ok::<(), Infallible>(()),
        );
        let (n, rstd) = self.norm.forward(ctx.params, &h, 0);
        (n, saved.finished(h, rstd))
    }

    /// Returns the normalized hidden states that the head reads, and saves nothing. `look` sees the residual stream after
    /// the embedding (depth 0) and after each layer, then the result, and ends the walk with an error.
    pub fn hidden<E>(
        &self,
        ctx: Context<'_>,
        batch: &BatchContext<'_>,
        mut look: impl FnMut(usize, &Tensor<2>) -> Result<(), E>,
    ) -> Result<Tensor<2>, E> {
        let h = self.embed(ctx, &batch.batch.input_ids);
        let h = self.walk(h, batch.noise(), |_, layer, h| layer.forward(ctx, h).0, &mut look)?;
        let (n, _) = self.norm.forward(ctx.params, &h, 0);
        look(self.layers.len() + 1, &n)?;
        Ok(n)
    }

    /// Returns the rows of the embedding table for `ids`.
    fn embed(&self, ctx: Context<'_>, ids: &[u32]) -> Tensor<2> {
        embedding::forward(&self.embedding(ctx.adapters).matrix(ctx.params), ids)
    }

    /// Returns the residual stream after the last layer, from the rows of the embedding table. `layer` runs each layer;
    /// `look` sees what it reads.
    fn walk<E>(
        &self,
        mut h: Tensor<2>,
        noise: Option<Noise<'_>>,
        mut layer: impl FnMut(usize, &Block, Tensor<2>) -> Tensor<2>,
        mut look: impl FnMut(usize, &Tensor<2>) -> Result<(), E>,
    ) -> Result<Tensor<2>, E> {
        h = h.cast(self.residual_dtype());
        let (before, after) = if self.noise_after_multiplier { (None, noise) } else { (noise, None) };
        if let Some(noise) = before {
            h = neftune::apply(h, noise);
        }
        if let Some(multiplier) = self.embedding_multiplier {
            h = h.scale(multiplier);
        }
        if let Some(noise) = after {
            h = neftune::apply(h, noise);
        }
        look(0, &h)?;
        let mut pass = self.begin_pass(0..self.layers.len(), false);
        for (index, block) in self.layers.iter().enumerate() {
            h = layer(index, &block.gathered(pass.as_mut()), h);
            look(index + 1, &h)?;
        }
        Ok(h)
    }

    /// The first layer with something to train; nothing below it needs a backward.
    fn lowest_trained(&self) -> usize {
        self.layers.iter().position(Block::is_trained).unwrap_or(self.layers.len())
    }

    /// Prepares a batch: the angles of its tokens, its documents, and what random numbers depend on.
    pub fn prepare<'a>(&self, batch: &'a Batch, lora_dropout: f32, key: Option<StepKey>) -> BatchContext<'a> {
        BatchContext::new(self, batch, lora_dropout, key)
    }
}

impl EmbeddingSpec {
    /// The factor on the rows of a table in this dtype.
    fn multiplier_in(&self, dtype: DType) -> Option<f32> {
        let multiplier = self.multiplier? as f32;
        if !self.rounds_multiplier {
            return Some(multiplier);
        }
        to_f32(from_f32(vec![multiplier], [1], &Device::cpu(), dtype)).pop()
    }
}

impl ModelConfig {
    /// The distinct layouts of attention, in the order of their first layers.
    pub(crate) fn layouts(&self) -> Vec<Heads> {
        let mut layouts: Vec<Heads> = Vec::new();
        for attention in self.spec.layers.iter().filter_map(LayerSpec::attention) {
            let heads = attention.layout();
            if !layouts.contains(&heads) {
                layouts.push(heads);
            }
        }
        layouts
    }
}
