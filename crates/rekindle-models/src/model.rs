//! A causal language model: embedding, decoder blocks, final norm and head.

use core::ops::Range;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::DType;
use rekindle_kernels::attention::{Documents, Heads};
use rekindle_kernels::dropout::{Dropout, Token, Tokens};
use rekindle_kernels::linear_cross_entropy::{self, Losses};
use rekindle_kernels::neftune::{self, Noise};
use rekindle_kernels::rope::{Angles, Tables};
use rekindle_kernels::{Device, Grads, Params, RngKey, Tensor, Weight, embedding, rms_norm};
use rekindle_lora::{GradientCheckpointing, LoraConfig, peft::AdapterConfig};
use rekindle_rope::Widened;

use crate::adapt::Replaced;
use crate::adapters::Held;
use crate::block::{Block, Context, Kept, Saved};
use crate::names::Projection;
use crate::quantization::Quantization;
use crate::start::Taken;
use crate::{Batch, Error, ModelConfig};

/// A Qwen2, Qwen3 or Llama model with its trainable parameters.
///
/// Either all weights are trained, or none until [`add_adapter`](Self::add_adapter).
#[derive(Debug)]
pub struct CausalLm {
    pub(crate) config: ModelConfig,
    pub(crate) embed: Weight,
    pub(crate) blocks: Vec<Block>,
    pub(crate) norm: Weight,
    /// `None` when the embedding table is the output layer.
    pub(crate) head: Option<Weight>,
    pub(crate) params: Params,
    pub(crate) tables: Tables,
    pub(crate) device: Device,
    pub(crate) dtype: DType,
    pub(crate) adapter_config: Option<AdapterConfig>,
    /// What the adapter is called, while there is one.
    pub(crate) adapter_name: String,
    /// The adapters that are not on the model, by name.
    pub(crate) waiting: BTreeMap<String, Held>,
    /// The base's weights of modules that the adapter on the model replaces.
    pub(crate) replaced: Replaced,
    /// The names of frozen tables that the adapter on the model is saved with.
    pub(crate) carried: Vec<&'static str>,
    /// Whether the tables have another number of rows than the checkpoint's.
    pub(crate) resized: bool,
    /// What holds where an adapter asks for nothing.
    pub(crate) checkpointing: GradientCheckpointing,
    pub(crate) quantization: Option<Quantization>,
    /// What was done to the checkpoint's positions, if anything.
    pub(crate) widened: Option<Widened>,
    /// Where the weights came from, written into adapters.
    pub(crate) name_or_path: String,
    /// Of a name on the hub: the revision that was asked for.
    pub(crate) revision: Option<String>,
    /// The directory of the checkpoint.
    pub(crate) path: PathBuf,
    /// What the adapter took out of the base.
    pub(crate) taken: Taken,
    /// Whether the weights have an adapter in them that the checkpoint has not.
    pub(crate) merged: bool,
}

/// What is random in a step of training, and what it depends on.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepKey {
    /// Seed of the run.
    pub seed: u64,
    /// Number of the optimizer step.
    pub step: u32,
    /// Noise on the embeddings ([`rekindle_kernels::neftune`]); 0 for none.
    pub neftune_noise_alpha: f32,
}

impl StepKey {
    /// Returns the key of the step's random numbers.
    pub(crate) fn rng(self) -> RngKey {
        RngKey { seed: self.seed, step: self.step }
    }
}

/// What waits for a block's backward.
#[allow(clippy::large_enum_variant, reason = "one entry a block")]
enum Tape {
    /// Everything it needs.
    Whole(Box<Saved>),
    /// A part; the rest is computed again.
    Kept(Kept),
}

impl CausalLm {
    /// The model's numbers.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Returns the name of the checkpoint, as new adapters give it.
    pub fn name_or_path(&self) -> &str {
        &self.name_or_path
    }

    /// What new adapters say that they belong to: a name on the hub, with the revision if one was asked for. Without
    /// this it is the checkpoint's directory.
    pub fn set_name_or_path(&mut self, name_or_path: impl Into<String>, revision: Option<String>) {
        self.name_or_path = name_or_path.into();
        self.revision = revision;
    }

    /// The directory of the checkpoint that the weights came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where the weights lie.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The dtype of frozen weights and activations.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The longest document that a batch may hold.
    pub fn max_seq_length(&self) -> usize {
        self.tables.positions()
    }

    /// What `rope_scaling` did to the positions of the checkpoint, if anything.
    pub fn widened(&self) -> Option<&Widened> {
        self.widened.as_ref()
    }

    /// What a checkpoint's `config.json` says of weights in codes, if there are any.
    pub fn quantization_config(&self) -> Option<serde_json::Value> {
        self.quantization.as_ref().map(|quantization| quantization.config.to_json())
    }

    /// The trainable parameters.
    pub fn params(&self) -> &Params {
        &self.params
    }

    /// The trainable parameters, for the optimizer.
    pub fn params_mut(&mut self) -> &mut Params {
        &mut self.params
    }

    /// The configuration of the adapter, if there is one.
    pub fn lora(&self) -> Option<&LoraConfig> {
        self.adapter_config.as_ref().map(AdapterConfig::lora)
    }

    /// What the adapter's file says, if there is an adapter.
    pub fn adapter_config(&self) -> Option<&AdapterConfig> {
        self.adapter_config.as_ref()
    }

    /// Number of scalars in all weights, adapters not counted.
    pub fn num_parameters(&self) -> usize {
        crate::names::needed(&self.config).iter().map(|n| n.shape.iter().product::<usize>()).sum()
    }

    /// `(full name, in, out)` of every linear of the blocks.
    pub fn linears(&self) -> Vec<(String, usize, usize)> {
        (0..self.config.num_hidden_layers)
            .flat_map(|layer| Projection::ALL.map(|p| (p.module(layer), p.shape(&self.config))))
            .map(|(name, [out, input])| (name, input, out))
            .collect()
    }

    /// The losses of `batch`, 0 where a token does not count; adds the gradients of `grad_scale · Σ nll` to `grads`.
    ///
    /// `key` turns on dropout and noise. Documents are independent: how they are split into batches changes nothing.
    ///
    /// # Errors
    /// [`Error::Row`] for a token id beyond the vocabulary or a document beyond `max_seq_length`, [`Error::Device`]
    /// when a device fails; on CUDA a failure may also show later, when the losses are read.
    pub fn forward_backward(
        &self,
        batch: &Batch,
        grad_scale: f32,
        grads: &mut Grads,
        key: Option<StepKey>,
    ) -> Result<Losses, Error> {
        self.check(batch)?;
        let pass = self.pass(batch, key);
        let (nll, mut way) = self.to_loss(&pass, batch, grad_scale, grads);
        while self.back(&pass, &mut way, grads).is_some() {}
        self.to_embedding(way, batch, grads);
        self.finished(nll)
    }

    /// [`forward_backward`](Self::forward_backward) that gives the gradients of a block to `apply` as soon as they are
    /// there, and uses their memory for the next: those of all parameters never exist at once.
    ///
    /// `apply` is told which of the ranges of [`Grads::ranges`] is complete, and may change the parameters in it, which
    /// nothing of this batch reads any more. Blocks come from the last to the first, then what stands around them.
    ///
    /// # Errors
    /// As [`forward_backward`](Self::forward_backward).
    pub fn forward_backward_applying(
        &mut self,
        batch: &Batch,
        grad_scale: f32,
        key: Option<StepKey>,
        apply: &mut dyn FnMut(&mut Params, &Grads, usize),
    ) -> Result<Losses, Error> {
        self.check(batch)?;
        let pass = self.pass(batch, key);
        let blocks: Vec<Range<usize>> = self.blocks.iter().map(Block::trained_range).collect();
        // The one that goes from block to block, and what is complete at the end.
        let around = between(&blocks, self.params.numel());
        let count = around.len();
        let mut grads = self.params.zero_grads_of(core::iter::once(0..0).chain(around));
        let (nll, mut way) = self.to_loss(&pass, batch, grad_scale, &mut grads);
        while let Some(next) = way.next() {
            grads.begin(0, blocks[next].clone());
            self.back(&pass, &mut way, &mut grads);
            apply(&mut self.params, &grads, 0);
        }
        grads.begin(0, 0..0);
        self.to_embedding(way, batch, &mut grads);
        for range in 1..=count {
            apply(&mut self.params, &grads, range);
        }
        self.finished(nll)
    }

    /// What all blocks share while `batch` goes through.
    fn pass(&self, batch: &Batch, key: Option<StepKey>) -> Pass {
        let p = self.lora().map_or(0.0, |lora| lora.lora_dropout as f32);
        let random = key.filter(|key| p > 0.0 || key.neftune_noise_alpha > 0.0);
        let random = random.map(|key| (key, Tokens::new(tokens(batch), &self.device)));
        Pass { angles: self.tables.angles(&batch.positions), documents: self.documents(batch), p, random }
    }

    /// The losses, and where the way back begins; adds the gradients of the head and the norm before it.
    fn to_loss(&self, pass: &Pass, batch: &Batch, grad_scale: f32, grads: &mut Grads) -> (Losses, WayBack) {
        let ctx = pass.context(&self.params);
        let checkpointing = self.gradient_checkpointing();
        let to_embedding = self.embed.trained().is_some();
        let lowest = if to_embedding { 0 } else { self.lowest_trained() };

        let mut h = embedding::forward(&self.embed.matrix(&self.params), &batch.input_ids);
        if let Some((key, tokens)) = pass.random.as_ref().filter(|(key, _)| key.neftune_noise_alpha > 0.0) {
            let (alpha, lengths) = (key.neftune_noise_alpha, &lengths(batch));
            h = neftune::apply(h, Noise { alpha, key: key.rng(), tokens, lengths });
        }
        let mut tape = Vec::with_capacity(self.blocks.len());
        for (i, block) in self.blocks.iter().enumerate() {
            let (y, saved) = block.forward(ctx, h);
            h = y;
            if i >= lowest {
                change_last(&mut tape, Kept::settled);
                tape.push(match checkpointing {
                    GradientCheckpointing::Off => Tape::Whole(Box::new(saved.kept())),
                    _ => Tape::Kept(Kept::of(saved, checkpointing, i + 1 == self.blocks.len())),
                });
            }
        }
        let norm = self.norm.vector(&self.params);
        let (n, rstd) = rms_norm::forward(&h, &norm, self.config.rms_norm_eps, 0);
        let head = self.head.as_ref().unwrap_or(&self.embed);
        let head_grad = head.trained().map(|at| (&mut *grads, at));
        let (nll, dn) = linear_cross_entropy::forward_backward(
            &n,
            &head.matrix(&self.params),
            &batch.targets,
            grad_scale,
            head_grad,
        );
        if let Some(at) = self.norm.trained() {
            grads.add(at, rms_norm::weight_grad(&dn, &h, &rstd).as_row());
        }
        let room = self.blocks.iter().map(Block::room).max().unwrap_or(0);
        let dh = Some(rms_norm::backward(&dn, &h, &norm, &rstd, None, room));
        (nll, WayBack { dh, tape, lowest, to_embedding })
    }

    /// The backward of the next block, which is returned; `None` below the lowest that is trained.
    fn back(&self, pass: &Pass, way: &mut WayBack, grads: &mut Grads) -> Option<usize> {
        let i = way.next()?;
        let ctx = pass.context(&self.params);
        let entry = way.tape.pop().expect("one entry for every block from the lowest trained");
        change_last(&mut way.tape, Kept::coming);
        let block = &self.blocks[i];
        let saved = match entry {
            Tape::Whole(saved) => *saved,
            Tape::Kept(kept) => block.resume(ctx, kept),
        };
        let dh = way.dh.take().expect("every block but the lowest gives a gradient to the next");
        way.dh = block.backward(ctx, saved, dh, grads, i > way.lowest || way.to_embedding);
        Some(i)
    }

    /// The end of the way back.
    fn to_embedding(&self, way: WayBack, batch: &Batch, grads: &mut Grads) {
        if let (Some(at), Some(dh)) = (self.embed.trained(), way.dh) {
            embedding::backward(dh, &batch.input_ids, grads, at);
        }
    }

    /// The negative log-likelihood of every target of `batch`, 0 where it does not count. No dropout.
    ///
    /// # Errors
    /// As [`forward_backward`](Self::forward_backward).
    pub fn nll(&self, batch: &Batch) -> Result<Vec<f32>, Error> {
        self.check(batch)?;
        let (angles, documents) = (self.tables.angles(&batch.positions), self.documents(batch));
        let ctx = Context { params: &self.params, angles: &angles, documents: Some(&documents), dropout: None };
        let mut h = embedding::forward(&self.embed.matrix(&self.params), &batch.input_ids);
        for block in &self.blocks {
            h = block.forward(ctx, h).0;
        }
        let (n, _) = rms_norm::forward(&h, &self.norm.vector(&self.params), self.config.rms_norm_eps, 0);
        let head = self.head.as_ref().unwrap_or(&self.embed);
        let nll = linear_cross_entropy::forward(&n, &head.matrix(&self.params), &batch.targets).values();
        self.finished(nll)
    }

    /// `result`, unless the device failed on the way to it.
    fn finished<T>(&self, result: T) -> Result<T, Error> {
        self.device.check()?;
        Ok(result)
    }

    pub(crate) fn documents(&self, batch: &Batch) -> Documents {
        Documents::new(&batch.cu_seqlens, self.heads(), &self.device, self.dtype)
    }

    /// The heads of every attention layer.
    pub(crate) fn heads(&self) -> Heads {
        self.config.heads()
    }

    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), String> {
        let vocab = self.config.vocab_size;
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(format!(
                "token id {id} is beyond the model's vocabulary of {vocab}; if its tokenizer has that token, load the \
                 model with resize_model_vocab = {}",
                u64::from(*id) + 1
            )),
            None => Ok(()),
        }
    }

    fn check(&self, batch: &Batch) -> Result<(), Error> {
        for (document, row) in batch.documents().zip(&batch.rows) {
            let limit = self.max_seq_length();
            let fail = |problem: String| Error::Row(format!("row {row} of the step: {problem}"));
            if document.len() > limit {
                return Err(fail(format!("{} tokens are more than max_seq_length {limit}", document.len())));
            }
            self.check_ids(&batch.input_ids[document.clone()]).map_err(fail)?;
            let targets = batch.targets[document].iter().filter(|&&t| t != crate::IGNORED);
            self.check_ids(&targets.map(|&t| t as u32).collect::<Vec<_>>()).map_err(fail)?;
        }
        Ok(())
    }

    /// The first block with something to train; nothing below it needs a backward.
    fn lowest_trained(&self) -> usize {
        self.blocks.iter().position(Block::is_trained).unwrap_or(self.blocks.len())
    }
}

/// What all blocks share while a batch goes through, whatever the parameters are.
struct Pass {
    angles: Angles,
    documents: Documents,
    /// Probability of dropping an element.
    p: f32,
    /// What random numbers of this batch depend on, where there are any.
    random: Option<(StepKey, Tokens)>,
}

impl Pass {
    fn context<'a>(&'a self, params: &'a Params) -> Context<'a> {
        let dropout = self.random.as_ref().filter(|_| self.p > 0.0);
        let dropout = dropout.map(|(key, tokens)| Dropout { p: self.p, key: key.rng(), tokens });
        Context { params, angles: &self.angles, documents: Some(&self.documents), dropout }
    }
}

/// How far a batch is on its way back.
struct WayBack {
    /// The gradient to the last block's input that there was need for.
    dh: Option<Tensor<2>>,
    /// What waits, for blocks from `lowest` on.
    tape: Vec<Tape>,
    lowest: usize,
    /// Whether the embedding is trained.
    to_embedding: bool,
}

impl WayBack {
    /// The block whose backward is next.
    fn next(&self) -> Option<usize> {
        self.tape.len().checked_sub(1).map(|above| self.lowest + above)
    }
}

/// The ranges that lie between `blocks`, before and behind them.
fn between(blocks: &[Range<usize>], end: usize) -> Vec<Range<usize>> {
    let mut blocks: Vec<&Range<usize>> = blocks.iter().filter(|block| !block.is_empty()).collect();
    blocks.sort_by_key(|block| block.start);
    let starts = core::iter::once(0).chain(blocks.iter().map(|block| block.end));
    let ends = blocks.iter().map(|block| block.start).chain([end]);
    starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
}

/// Changes what waits for the backward of the block below the next, if it is a part.
fn change_last(tape: &mut Vec<Tape>, change: impl FnOnce(Kept) -> Kept) {
    match tape.pop() {
        Some(Tape::Kept(kept)) => tape.push(Tape::Kept(change(kept))),
        other => tape.extend(other),
    }
}

/// Of each token's document.
pub(crate) fn lengths(batch: &Batch) -> Vec<u32> {
    batch.documents().flat_map(|document| std::iter::repeat_n(document.len() as u32, document.len())).collect()
}

pub(crate) fn tokens(batch: &Batch) -> Vec<Token> {
    batch
        .documents()
        .zip(&batch.rows)
        .flat_map(|(document, &row)| document.map(move |t| (t, row)))
        .map(|(t, row)| Token { row, position: batch.positions[t] })
        .collect()
}
