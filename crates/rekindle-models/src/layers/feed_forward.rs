//! The feed-forward half of a layer, whichever it is.

use rekindle_kernels::{Grads, Tensor};
use rekindle_lora::{LinearGroup, LinearSaved};

use super::{Context, GatedMlp, GatedMlpSaved, LayerBuilder, VisitWeights};
use crate::Error;
use crate::spec::FeedForwardSpec;

/// The feed-forward half of a layer. A mixture of experts becomes a second variant.
#[derive(Clone, Debug)]
pub enum FeedForward {
    /// A gated one.
    Gated(GatedMlp),
}

/// Tensors that [`FeedForward::forward`] saves for the backward.
#[derive(Debug)]
pub enum FeedForwardSaved {
    /// Those of a gated one.
    Gated(GatedMlpSaved),
}

impl FeedForwardSaved {
    /// The part that makes the last linear unnecessary in a recomputation.
    pub(super) fn into_checkpoint(self) -> LinearSaved {
        let Self::Gated(saved) = self;
        saved.into_checkpoint()
    }

    pub(super) fn detached(self) -> Self {
        let Self::Gated(saved) = self;
        Self::Gated(saved.detached())
    }
}

impl FeedForward {
    pub(crate) fn build(
        builder: &mut LayerBuilder<'_>,
        spec: &FeedForwardSpec,
        hidden_size: usize,
    ) -> Result<Self, Error> {
        let FeedForwardSpec::Gated(gated) = spec else { unreachable!("refused by `ModelSpec::unsupported`") };
        Ok(Self::Gated(GatedMlp::build(builder, gated, hidden_size)?))
    }

    /// Visits the weights.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        let Self::Gated(mlp) = self;
        mlp.visit(visit);
    }

    /// The groups of linears in the order of the forward pass.
    pub fn groups(&self) -> [&LinearGroup; 2] {
        let Self::Gated(mlp) = self;
        [&mlp.gate_up, &mlp.down]
    }

    /// As [`groups`](Self::groups).
    pub fn groups_mut(&mut self) -> [&mut LinearGroup; 2] {
        let Self::Gated(mlp) = self;
        [&mut mlp.gate_up, &mut mlp.down]
    }

    /// The linears that read x.
    pub(super) fn inputs(&self) -> &LinearGroup {
        self.groups()[0]
    }

    /// The linear that makes the result.
    pub(super) fn output(&self) -> &LinearGroup {
        self.groups()[1]
    }

    /// Returns the result for x.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, FeedForwardSaved) {
        let Self::Gated(mlp) = self;
        let (y, saved) = mlp.forward(ctx, x);
        (y, FeedForwardSaved::Gated(saved))
    }

    /// Returns the result for x, added to `onto`.
    pub fn forward_onto(&self, ctx: Context<'_>, x: Tensor<2>, onto: &Tensor<2>) -> (Tensor<2>, FeedForwardSaved) {
        let Self::Gated(mlp) = self;
        let (y, saved) = mlp.forward_onto(ctx, x, onto);
        (y, FeedForwardSaved::Gated(saved))
    }

    /// Returns what [`forward`](Self::forward) saved, from the part that was kept.
    pub(super) fn resume(&self, ctx: Context<'_>, x: Tensor<2>, kept: LinearSaved) -> FeedForwardSaved {
        let Self::Gated(mlp) = self;
        FeedForwardSaved::Gated(mlp.resume(ctx, x, kept))
    }

    /// Adds the gradients of what is trained and returns that to x, which `x` makes where it was not kept.
    pub fn backward(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        saved: FeedForwardSaved,
        dy: &Tensor<2>,
        x: impl FnOnce() -> Tensor<2>,
    ) -> Tensor<2> {
        let (Self::Gated(mlp), FeedForwardSaved::Gated(saved)) = (self, saved);
        mlp.backward(ctx, grads, saved, dy, x)
    }
}
