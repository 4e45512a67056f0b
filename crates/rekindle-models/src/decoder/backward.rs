//! The way back through a decoder.

use rekindle_kernels::{BlockPass, Grads, Tensor, embedding};

use super::Decoder;
use crate::GradientCheckpointing;
use crate::layers::{BlockSaved, Checkpointed, Context};
use crate::router_loss::RouterLoad;

/// The saved state of a layer until its backward.
#[allow(clippy::large_enum_variant, reason = "one entry a layer")]
#[derive(Debug)]
enum LayerSaved {
    /// Everything it needs.
    Whole(Box<BlockSaved>),
    /// A part; the rest is recomputed.
    Checkpointed(Checkpointed),
}

/// Tensors that [`Decoder::forward`] saves for the backward.
#[derive(Debug)]
pub struct DecoderSaved {
    /// The residual stream after the last layer, and the final norm's rstd.
    end: Option<(Tensor<2>, Tensor<1>)>,
    layers: SavedLayers,
    /// The choices of mixtures, where the auxiliary loss is on.
    pub(crate) load: RouterLoad,
}

/// The layers that wait for their backward.
#[derive(Debug)]
struct SavedLayers {
    /// Those from `lowest` on.
    saved: Vec<LayerSaved>,
    lowest: usize,
    /// True if the embedding is trained.
    to_embedding: bool,
}

/// A backward pass on its way from the last layer to the embedding.
#[derive(Debug)]
pub struct DecoderBackward {
    /// The gradient to the residual stream before the layers that are done.
    dh: Option<Tensor<2>>,
    layers: SavedLayers,
    /// The pass through weights that several ranks hold together.
    pass: Option<BlockPass>,
}

impl DecoderSaved {
    pub(super) fn new(decoder: &Decoder) -> Self {
        let to_embedding = decoder.vocabulary.embedding.trained().is_some();
        let lowest = if to_embedding { 0 } else { decoder.lowest_trained() };
        let saved = Vec::with_capacity(decoder.layers.len());
        Self { end: None, layers: SavedLayers { saved, lowest, to_embedding }, load: RouterLoad::default() }
    }

    /// Saves what the backward of layer `index` needs; layers below the lowest trained one need none.
    pub(super) fn push(&mut self, index: usize, block: BlockSaved, checkpointing: GradientCheckpointing, last: bool) {
        if index < self.layers.lowest {
            return;
        }
        self.layers.change_last(Checkpointed::settled);
        self.layers.saved.push(match checkpointing {
            GradientCheckpointing::Off => LayerSaved::Whole(Box::new(block.detached())),
            _ => LayerSaved::Checkpointed(Checkpointed::new(block, checkpointing, last)),
        });
    }

    pub(super) fn finished(self, h: Tensor<2>, rstd: Tensor<1>) -> Self {
        Self { end: Some((h, rstd)), ..self }
    }
}

impl SavedLayers {
    /// Changes what waits for the backward of the layer below the next, if it is a checkpoint.
    fn change_last(&mut self, change: impl FnOnce(Checkpointed) -> Checkpointed) {
        match self.saved.pop() {
            Some(LayerSaved::Checkpointed(kept)) => self.saved.push(LayerSaved::Checkpointed(change(kept))),
            other => self.saved.extend(other),
        }
    }
}

impl DecoderBackward {
    /// The layer whose backward is next; `None` below the lowest trained one.
    pub fn next_layer(&self) -> Option<usize> {
        self.layers.saved.len().checked_sub(1).map(|above| self.layers.lowest + above)
    }
}

impl Decoder {
    /// Goes all the way back for `d_hidden`, the gradient to the result of [`forward`](Self::forward), and adds the
    /// gradients of what is trained.
    pub fn backward(
        &self,
        ctx: Context<'_>,
        saved: DecoderSaved,
        d_hidden: &Tensor<2>,
        input_ids: &[u32],
        grads: &mut Grads,
    ) {
        let mut backward = self.begin_backward(ctx, saved, d_hidden, grads);
        while self.backward_layer(ctx, &mut backward, grads).is_some() {}
        self.backward_embedding(backward, input_ids, grads);
    }

    /// Begins a backward pass: adds the gradient of the final norm.
    pub fn begin_backward(
        &self,
        ctx: Context<'_>,
        saved: DecoderSaved,
        d_hidden: &Tensor<2>,
        grads: &mut Grads,
    ) -> DecoderBackward {
        let DecoderSaved { end, layers, .. } = saved;
        let (h, rstd) = end.expect("the forward reached the end");
        self.norm.backward_weight(grads, d_hidden, &h, &rstd);
        let room = match self.residual_dtype() == self.dtype() {
            true => self.layers.iter().map(crate::layers::Block::room).max().unwrap_or(0),
            false => 0,
        };
        let dh = self.norm.backward_input(ctx.params, d_hidden, &h, &rstd, None, room);
        let pass = self.begin_pass(layers.lowest..layers.lowest + layers.saved.len(), true);
        DecoderBackward { dh: Some(dh), layers, pass }
    }

    /// The backward of the next layer, whose index is returned; `None` below the lowest trained one.
    pub fn backward_layer(&self, ctx: Context<'_>, backward: &mut DecoderBackward, grads: &mut Grads) -> Option<usize> {
        let index = backward.next_layer()?;
        let layers = &mut backward.layers;
        let entry = layers.saved.pop().expect("one entry for every layer from the lowest trained");
        layers.change_last(Checkpointed::coming);
        let layer = self.layers[index].gathered(backward.pass.as_mut());
        let saved = match entry {
            LayerSaved::Whole(saved) => *saved,
            LayerSaved::Checkpointed(kept) => layer.resume(ctx, kept),
        };
        let dh = backward.dh.take().expect("every layer but the lowest gives a gradient to the one below");
        let want_dx = index > layers.lowest || layers.to_embedding;
        backward.dh = layer.backward(ctx, grads, saved, dh, want_dx);
        Some(index)
    }

    /// Ends a backward pass: adds the gradient of the embedding, if it is trained.
    pub fn backward_embedding(&self, backward: DecoderBackward, input_ids: &[u32], grads: &mut Grads) {
        let Some((at, dh)) = self.vocabulary.embedding.trained().zip(backward.dh) else { return };
        let dh = match self.embedding_multiplier {
            None => dh,
            Some(multiplier) => dh.scale(multiplier),
        };
        embedding::backward(dh, input_ids, grads, at);
    }
}
