//! Forward and backward of a batch: hidden states, log-probabilities of its targets, and gradients from a weight for
//! each token.
//!
//! The gradient of a loss L is that of Σ w_t·nll_t with w_t = ∂L/∂nll_t = −∂L/∂log p_t. Where the weights are known before
//! the forward, [`CausalLm::forward_backward`] computes the logits once. Where they depend on the log-probabilities,
//! [`CausalLm::forward`], [`CausalLm::log_probs_of`] and [`CausalLm::backward`] compute them twice. Logits never exist in
//! full. [`Objective`](crate::Objective) says where the weights come from.

use core::convert::Infallible;
use core::ops::Range;

use rekindle_kernels::linear_cross_entropy::{self, Losses, TokenLogProbs, TokenWeights};
use rekindle_kernels::{Grads, ParamRef, Params, Tensor};

use crate::decoder::{BatchContext, DecoderSaved};
use crate::layers::{Block, Context};
use crate::objective::Metric;
use crate::router_loss::RouterLoss;
use crate::{Batch, CausalLm, Error, RouterPass, StepKey};

/// A forward pass, with everything that its backward needs.
#[derive(Debug)]
pub struct ForwardPass<'b> {
    batch: BatchContext<'b>,
    hidden: Tensor<2>,
    saved: DecoderSaved,
    router: Option<RouterLoss>,
    temperature: f32,
}

impl ForwardPass<'_> {
    /// Divides the logits of this pass by `temperature`, above 0, in its log-probabilities and in its backward. Default 1.
    #[must_use]
    pub fn at_temperature(self, temperature: f32) -> Self {
        Self { temperature, ..self }
    }

    /// The normalized hidden states that the head reads, `[tokens, hidden]`.
    pub fn hidden(&self) -> &Tensor<2> {
        &self.hidden
    }

    /// The auxiliary loss of mixtures, if it is on ([`CausalLm::set_router_aux_loss`]).
    pub fn router_loss(&self) -> Option<Metric> {
        self.router.as_ref().map(RouterLoss::metric)
    }
}

/// Receives the parameters, the gradients and the index of the range of [`Grads::ranges`] that is complete.
pub type ApplyGradients<'a> = &'a mut dyn FnMut(&mut Params, &Grads, usize);

impl CausalLm {
    /// Returns the hidden states of `batch` and what [`backward`](Self::backward) needs.
    ///
    /// `key` turns on dropout and noise. Documents are independent: how they are split into batches changes nothing.
    ///
    /// # Errors
    /// [`Error::Row`] for a token id beyond the vocabulary or a document beyond `max_seq_length`, [`Error::Device`]
    /// when a device fails; on CUDA a failure may also show later, when values are read.
    pub fn forward<'b>(&self, batch: &'b Batch, key: Option<StepKey>) -> Result<ForwardPass<'b>, Error> {
        self.check(batch)?;
        let context = self.prepare(batch, key);
        let router = if self.router_aux_loss > 0.0 { RouterPass::Save } else { RouterPass::Off };
        let ctx = Context { router, ..context.context(&self.params, true) };
        let (hidden, saved) = self.decoder.forward(ctx, &context, self.gradient_checkpointing());
        let router = saved.load.loss(self.router_aux_loss);
        self.checked(ForwardPass { batch: context, hidden, saved, router, temperature: 1.0 })
    }

    /// Returns the log-probability of each target of a forward pass, with entropies and arg-max flags.
    pub fn log_probs_of(&self, pass: &ForwardPass<'_>) -> TokenLogProbs {
        self.log_probs_of_at(pass, pass.temperature)
    }

    /// [`log_probs_of`](Self::log_probs_of) of logits that are divided by `temperature` instead of that of the pass.
    pub(crate) fn log_probs_of_at(&self, pass: &ForwardPass<'_>, temperature: f32) -> TokenLogProbs {
        let head = self.decoder.lm_head(&self.params, true).at_temperature(temperature);
        linear_cross_entropy::log_probs(&pass.hidden, &head, &pass.batch.batch().targets)
    }

    /// Adds the gradients of Σ w_t·nll_t to `grads`. `log_probs` are those of the pass.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward<'w>(
        &self,
        pass: ForwardPass<'_>,
        log_probs: &TokenLogProbs,
        weights: impl Into<TokenWeights<'w>>,
        grads: &mut Grads,
    ) -> Result<(), Error> {
        let d_hidden = self.backward_head(&pass, log_probs, weights.into(), grads);
        self.backward_decoder(pass, d_hidden, grads);
        self.checked(())
    }

    /// [`backward`](Self::backward) that applies gradients layer by layer, as
    /// [`forward_backward_applying`](Self::forward_backward_applying) does.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward_applying<'w>(
        &mut self,
        pass: ForwardPass<'_>,
        log_probs: &TokenLogProbs,
        weights: impl Into<TokenWeights<'w>>,
        apply: ApplyGradients<'_>,
    ) -> Result<(), Error> {
        let mut grads = self.grads_by_layer();
        let d_hidden = self.backward_head(&pass, log_probs, weights.into(), &mut grads);
        self.backward_decoder_applying(pass, d_hidden, grads, apply);
        self.checked(())
    }

    /// Returns the losses of `batch`, 0 where the mask excludes a token; adds the gradients of Σ w_t·nll_t to `grads`.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_backward<'w>(
        &self,
        batch: &Batch,
        weights: impl Into<TokenWeights<'w>>,
        grads: &mut Grads,
        key: Option<StepKey>,
    ) -> Result<Losses, Error> {
        self.loss_and_backward(self.forward(batch, key)?, weights.into(), grads)
    }

    /// [`forward_backward`](Self::forward_backward) that gives the gradients of a layer to `apply` as soon as they are
    /// complete, and reuses their memory for the next layer: those of all parameters never exist at once.
    ///
    /// `apply` may change the parameters in the range that is complete, which nothing of this batch reads any more. Layers
    /// come from the last to the first, then the rest of the model.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_backward_applying<'w>(
        &mut self,
        batch: &Batch,
        weights: impl Into<TokenWeights<'w>>,
        key: Option<StepKey>,
        apply: ApplyGradients<'_>,
    ) -> Result<Losses, Error> {
        self.loss_and_backward_applying(self.forward(batch, key)?, weights.into(), apply)
    }

    /// The second half of [`forward_backward`](Self::forward_backward).
    pub(crate) fn loss_and_backward(
        &self,
        pass: ForwardPass<'_>,
        weights: TokenWeights<'_>,
        grads: &mut Grads,
    ) -> Result<Losses, Error> {
        let (losses, d_hidden) = self.loss_and_backward_head(&pass, weights, grads);
        self.backward_decoder(pass, d_hidden, grads);
        self.checked(losses)
    }

    /// The second half of [`forward_backward_applying`](Self::forward_backward_applying).
    pub(crate) fn loss_and_backward_applying(
        &mut self,
        pass: ForwardPass<'_>,
        weights: TokenWeights<'_>,
        apply: ApplyGradients<'_>,
    ) -> Result<Losses, Error> {
        let mut grads = self.grads_by_layer();
        let (losses, d_hidden) = self.loss_and_backward_head(&pass, weights, &mut grads);
        self.backward_decoder_applying(pass, d_hidden, grads, apply);
        self.checked(losses)
    }

    /// The losses and the gradient to the hidden states; adds that of the head.
    fn loss_and_backward_head(
        &self,
        pass: &ForwardPass<'_>,
        weights: TokenWeights<'_>,
        grads: &mut Grads,
    ) -> (Losses, Tensor<2>) {
        let head = self.decoder.lm_head(&self.params, true).at_temperature(pass.temperature);
        let targets = &pass.batch.batch().targets;
        linear_cross_entropy::forward_backward(&pass.hidden, &head, targets, weights, self.head_grad(grads))
    }

    /// The gradient to the hidden states; adds that of the head.
    fn backward_head(
        &self,
        pass: &ForwardPass<'_>,
        log_probs: &TokenLogProbs,
        weights: TokenWeights<'_>,
        grads: &mut Grads,
    ) -> Tensor<2> {
        let head = self.decoder.lm_head(&self.params, true).at_temperature(pass.temperature);
        linear_cross_entropy::backward(&pass.hidden, &head, log_probs, weights, self.head_grad(grads))
    }

    /// Returns the target of the head's gradient, if it is trained.
    fn head_grad<'g>(&self, grads: &'g mut Grads) -> Option<(&'g mut Grads, ParamRef)> {
        self.decoder.head(true).trained().map(|at| (grads, at))
    }

    /// The backward of everything below the head.
    pub(crate) fn backward_decoder(&self, pass: ForwardPass<'_>, d_hidden: Tensor<2>, grads: &mut Grads) {
        let ForwardPass { batch, hidden, saved, router, .. } = pass;
        let ctx = Context { router: RouterLoss::pass(router.as_ref()), ..batch.context(&self.params, true) };
        let mut backward = self.decoder.begin_backward(ctx, saved, &d_hidden, grads);
        drop((hidden, d_hidden));
        while self.decoder.backward_layer(ctx, &mut backward, grads).is_some() {}
        self.decoder.backward_embedding(backward, &batch.batch().input_ids, grads);
    }

    /// [`backward_decoder`](Self::backward_decoder) with the gradients of [`grads_by_layer`](Self::grads_by_layer).
    pub(crate) fn backward_decoder_applying(
        &mut self,
        pass: ForwardPass<'_>,
        d_hidden: Tensor<2>,
        mut grads: Grads,
        apply: ApplyGradients<'_>,
    ) {
        let ForwardPass { batch, hidden, saved, router, .. } = pass;
        let mut backward = self.decoder.begin_backward(batch.context(&self.params, true), saved, &d_hidden, &mut grads);
        let router = RouterLoss::pass(router.as_ref());
        drop((hidden, d_hidden));
        let layers = self.trained_ranges();
        while let Some(next) = backward.next_layer() {
            grads.begin(0, layers[next].clone());
            let ctx = Context { router, ..batch.context(&self.params, true) };
            self.decoder.backward_layer(ctx, &mut backward, &mut grads);
            apply(&mut self.params, &grads, 0);
        }
        grads.begin(0, 0..0);
        self.decoder.backward_embedding(backward, &batch.batch().input_ids, &mut grads);
        for range in 1..grads.ranges().len() {
            apply(&mut self.params, &grads, range);
        }
    }

    /// Gradients of zero in ranges: an empty one that goes from layer to layer, then those around the layers, which are
    /// complete at the end.
    pub(crate) fn grads_by_layer(&self) -> Grads {
        let around = between(&self.trained_ranges(), self.params.numel());
        self.params.zero_grads_of(core::iter::once(0..0).chain(around))
    }

    fn trained_ranges(&self) -> Vec<Range<usize>> {
        self.decoder.layers.iter().map(Block::trained_range).collect()
    }

    /// Returns the negative log-likelihood of every target of `batch`, 0 where the mask excludes it. No dropout.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn nll(&self, batch: &Batch) -> Result<Vec<f32>, Error> {
        self.nll_with(batch, true)
    }

    /// Returns [`nll`](Self::nll) of the base model without the active adapter. No weight is moved or copied.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and [`Error::Argument`] while the active adapter has subtracted its initial B·A from
    /// the base (`pissa`, `olora`).
    pub fn base_nll(&self, batch: &Batch) -> Result<Vec<f32>, Error> {
        self.check_base()?;
        self.nll_with(batch, false)
    }

    /// Returns the log-probability of every target of `batch`, with entropies and arg-max flags. No dropout, and nothing
    /// is saved for a backward.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn log_probs(&self, batch: &Batch) -> Result<TokenLogProbs, Error> {
        self.log_probs_with(batch, true, 1.0)
    }

    /// [`log_probs`](Self::log_probs) of logits that are divided by `temperature`, above 0.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn log_probs_at(&self, batch: &Batch, temperature: f32) -> Result<TokenLogProbs, Error> {
        self.log_probs_with(batch, true, temperature)
    }

    /// [`log_probs`](Self::log_probs) of the base model: those of a reference model while an adapter is trained.
    ///
    /// # Errors
    /// As [`base_nll`](Self::base_nll).
    pub fn base_log_probs(&self, batch: &Batch) -> Result<TokenLogProbs, Error> {
        self.base_log_probs_at(batch, 1.0)
    }

    /// [`base_log_probs`](Self::base_log_probs) of logits that are divided by `temperature`, above 0.
    ///
    /// # Errors
    /// As [`base_nll`](Self::base_nll).
    pub fn base_log_probs_at(&self, batch: &Batch, temperature: f32) -> Result<TokenLogProbs, Error> {
        self.check_base()?;
        self.log_probs_with(batch, false, temperature)
    }

    fn nll_with(&self, batch: &Batch, adapters: bool) -> Result<Vec<f32>, Error> {
        self.check_vocabulary_head()?;
        let hidden = self.hidden(batch, adapters)?;
        let head = self.decoder.lm_head(&self.params, adapters);
        self.checked(linear_cross_entropy::forward(&hidden, &head, &batch.targets).values())
    }

    fn log_probs_with(&self, batch: &Batch, adapters: bool, temperature: f32) -> Result<TokenLogProbs, Error> {
        self.check_vocabulary_head()?;
        let hidden = self.hidden(batch, adapters)?;
        let head = self.decoder.lm_head(&self.params, adapters).at_temperature(temperature);
        self.checked(linear_cross_entropy::log_probs(&hidden, &head, &batch.targets))
    }

    /// The hidden states without dropout.
    pub(crate) fn hidden(&self, batch: &Batch, adapters: bool) -> Result<Tensor<2>, Error> {
        self.check(batch)?;
        let context = self.prepare(batch, None);
        let ctx = context.context(&self.params, adapters);
        let Ok(hidden) = self.decoder.hidden(ctx, &context, |_, _: &Tensor<2>| Ok::<(), Infallible>(()));
        Ok(hidden)
    }

    /// The batch, ready to go through the decoder.
    pub(crate) fn prepare<'a>(&self, batch: &'a Batch, key: Option<StepKey>) -> BatchContext<'a> {
        self.decoder.prepare(batch, self.lora().map_or(0.0, |lora| lora.lora_dropout as f32), key)
    }

    /// Returns `result`, unless the device failed on the way to it.
    fn checked<T>(&self, result: T) -> Result<T, Error> {
        self.device().check()?;
        Ok(result)
    }

    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<(), String> {
        let vocab = self.config.vocab_size();
        match ids.iter().find(|&&id| id as usize >= vocab) {
            Some(id) => Err(format!(
                "token id {id} is outside the model's vocabulary of {vocab}; if its tokenizer has that token, load the \
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
}

/// The ranges that lie between those of `layers`, before and behind them.
fn between(layers: &[Range<usize>], end: usize) -> Vec<Range<usize>> {
    let mut layers: Vec<&Range<usize>> = layers.iter().filter(|layer| !layer.is_empty()).collect();
    layers.sort_by_key(|layer| layer.start);
    let starts = core::iter::once(0).chain(layers.iter().map(|layer| layer.end));
    let ends = layers.iter().map(|layer| layer.start).chain([end]);
    starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
}
