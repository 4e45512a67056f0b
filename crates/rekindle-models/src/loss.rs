//! The loss of a batch, and its gradients.

use core::convert::Infallible;
use core::ops::Range;

use rekindle_kernels::linear_cross_entropy::{self, Losses};
use rekindle_kernels::{Grads, Params, Tensor};

use crate::decoder::{BatchContext, DecoderBackward};
use crate::layers::Block;
use crate::{Batch, CausalLm, Error, StepKey};

impl CausalLm {
    /// Returns the losses of `batch`, 0 where the mask excludes a token; adds the gradients of `grad_scale · Σ nll` to
    /// `grads`.
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
        let pass = self.prepare(batch, key);
        let (nll, mut backward) = self.forward_to_loss(&pass, batch, grad_scale, grads);
        let ctx = pass.context(&self.params, true);
        while self.decoder.backward_layer(ctx, &mut backward, grads).is_some() {}
        self.decoder.backward_embedding(backward, &batch.input_ids, grads);
        self.checked(nll)
    }

    /// [`forward_backward`](Self::forward_backward) that gives the gradients of a layer to `apply` as soon as they are
    /// complete, and reuses their memory for the next layer: those of all parameters never exist at once.
    ///
    /// `apply` receives the index of the range of [`Grads::ranges`] that is complete, and may change the parameters in it,
    /// which nothing of this batch reads any more. Layers come from the last to the first, then the rest of the model.
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
        let pass = self.prepare(batch, key);
        let layers: Vec<Range<usize>> = self.decoder.layers.iter().map(Block::trained_range).collect();
        // The one that goes from layer to layer, and what is complete at the end.
        let around = between(&layers, self.params.numel());
        let count = around.len();
        let mut grads = self.params.zero_grads_of(core::iter::once(0..0).chain(around));
        let (nll, mut backward) = self.forward_to_loss(&pass, batch, grad_scale, &mut grads);
        while let Some(next) = backward.next_layer() {
            grads.begin(0, layers[next].clone());
            self.decoder.backward_layer(pass.context(&self.params, true), &mut backward, &mut grads);
            apply(&mut self.params, &grads, 0);
        }
        grads.begin(0, 0..0);
        self.decoder.backward_embedding(backward, &batch.input_ids, &mut grads);
        for range in 1..=count {
            apply(&mut self.params, &grads, range);
        }
        self.checked(nll)
    }

    /// The losses, and the backward pass before the last layer; adds the gradients of the head and the final norm.
    fn forward_to_loss(
        &self,
        pass: &BatchContext<'_>,
        batch: &Batch,
        grad_scale: f32,
        grads: &mut Grads,
    ) -> (Losses, DecoderBackward) {
        let ctx = pass.context(&self.params, true);
        let (n, saved) = self.decoder.forward(ctx, pass, self.gradient_checkpointing());
        let head = self.decoder.head(true);
        let head_grad = head.trained().map(|at| (&mut *grads, at));
        let weight = head.matrix(&self.params);
        let (nll, dn) = linear_cross_entropy::forward_backward(&n, &weight, &batch.targets, grad_scale, head_grad);
        (nll, self.decoder.begin_backward(ctx, saved, &dn, grads))
    }

    /// Returns the negative log-likelihood of every target of `batch`, 0 where the mask excludes it. No dropout.
    ///
    /// # Errors
    /// As [`forward_backward`](Self::forward_backward).
    pub fn nll(&self, batch: &Batch) -> Result<Vec<f32>, Error> {
        self.nll_with(batch, true)
    }

    /// [`nll`](Self::nll) of the base model, whatever adapter is active: no weight is moved or copied.
    ///
    /// # Errors
    /// As [`forward_backward`](Self::forward_backward), and [`Error::Argument`] while the active adapter has subtracted
    /// its initial B·A from the base (`pissa`, `olora`).
    pub fn base_nll(&self, batch: &Batch) -> Result<Vec<f32>, Error> {
        self.check_base()?;
        self.nll_with(batch, false)
    }

    fn nll_with(&self, batch: &Batch, adapters: bool) -> Result<Vec<f32>, Error> {
        self.check(batch)?;
        let pass = self.prepare(batch, None);
        let ctx = pass.context(&self.params, adapters);
        let Ok(n) = self.decoder.hidden(ctx, &pass, |_, _: &Tensor<2>| Ok::<(), Infallible>(()));
        let head = self.decoder.head(adapters).matrix(&self.params);
        self.checked(linear_cross_entropy::forward(&n, &head, &batch.targets).values())
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
}

/// The ranges that lie between those of `layers`, before and behind them.
fn between(layers: &[Range<usize>], end: usize) -> Vec<Range<usize>> {
    let mut layers: Vec<&Range<usize>> = layers.iter().filter(|layer| !layer.is_empty()).collect();
    layers.sort_by_key(|layer| layer.start);
    let starts = core::iter::once(0).chain(layers.iter().map(|layer| layer.end));
    let ends = layers.iter().map(|layer| layer.start).chain([end]);
    starts.zip(ends).map(|(start, end)| start..end).filter(|range| !range.is_empty()).collect()
}
