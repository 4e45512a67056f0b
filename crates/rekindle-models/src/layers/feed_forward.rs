//! The feed-forward half of a layer, whichever it is.

use rekindle_kernels::{Grads, Tensor};
use rekindle_lora::{Adaptable, AdaptableMut, LinearSaved};

use super::moe::MoeCheckpoint;
use super::{Context, GatedMlp, GatedMlpSaved, LayerBuilder, Moe, MoeSaved, VisitWeights};
use crate::Error;
use crate::router_loss::RouterLoad;
use crate::spec::FeedForwardSpec;

/// The feed-forward half of a layer.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each layer")]
pub enum FeedForward {
    /// A gated one.
    Gated(GatedMlp),
    /// A mixture of experts.
    Moe(Moe),
}

/// Tensors that [`FeedForward::forward`] saves for the backward.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each layer")]
pub enum FeedForwardSaved {
    /// Those of a gated one.
    Gated(GatedMlpSaved),
    /// Those of a mixture.
    Moe(MoeSaved),
}

/// The part of a feed-forward half that is kept where the rest is recomputed.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each layer")]
pub(super) enum FeedForwardCheckpoint {
    Gated(LinearSaved),
    Moe(MoeCheckpoint),
}

impl FeedForwardSaved {
    /// The part that makes the last linear unnecessary in a recomputation.
    pub(super) fn into_checkpoint(self) -> FeedForwardCheckpoint {
        match self {
            Self::Gated(saved) => FeedForwardCheckpoint::Gated(saved.into_checkpoint()),
            Self::Moe(saved) => FeedForwardCheckpoint::Moe(saved.into_checkpoint()),
        }
    }

    /// Adds a mixture's choice to the sums of the auxiliary loss.
    pub(super) fn add_to(&self, load: &mut RouterLoad) {
        if let Self::Moe(saved) = self {
            saved.add_to(load);
        }
    }

    pub(super) fn detached(self) -> Self {
        match self {
            Self::Gated(saved) => Self::Gated(saved.detached()),
            Self::Moe(saved) => Self::Moe(saved.detached()),
        }
    }
}

impl FeedForwardCheckpoint {
    /// Returns true if this is no more than products with A and a router's choice.
    pub(super) fn is_small(&self) -> bool {
        match self {
            Self::Gated(down) => down.is_small(),
            Self::Moe(kept) => kept.is_small(),
        }
    }

    /// The same without references to the memory of inputs.
    pub(super) fn detached(self) -> Self {
        match self {
            Self::Gated(down) => Self::Gated(down.detached()),
            Self::Moe(kept) => Self::Moe(kept.detached()),
        }
    }
}

impl FeedForward {
    pub(crate) fn build(
        builder: &mut LayerBuilder<'_>,
        spec: &FeedForwardSpec,
        hidden_size: usize,
    ) -> Result<Self, Error> {
        Ok(match spec {
            FeedForwardSpec::Gated(gated) => Self::Gated(GatedMlp::build(builder, gated, hidden_size)?),
            FeedForwardSpec::Moe(moe) => Self::Moe(Moe::build(builder, moe, hidden_size)?),
            FeedForwardSpec::Plain { .. } => unreachable!("refused by `ModelSpec::unsupported`"),
        })
    }

    /// Visits the weights.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        match self {
            Self::Gated(mlp) => mlp.visit(visit),
            Self::Moe(moe) => moe.visit(visit),
        }
    }

    /// Everything that adapters can be on, in the order of the forward pass.
    pub fn adaptable(&self) -> Vec<Adaptable<'_>> {
        match self {
            Self::Gated(mlp) => [&mlp.gate_up, &mlp.down].map(Adaptable::Linears).to_vec(),
            Self::Moe(moe) => moe.adaptable(),
        }
    }

    /// Returns the same as [`adaptable`](Self::adaptable), mutably.
    pub fn adaptable_mut(&mut self) -> Vec<AdaptableMut<'_>> {
        match self {
            Self::Gated(mlp) => [&mut mlp.gate_up, &mut mlp.down].map(AdaptableMut::Linears).into(),
            Self::Moe(moe) => moe.adaptable_mut(),
        }
    }

    /// Columns that x should have room for.
    pub(super) fn input_room(&self) -> usize {
        match self {
            Self::Gated(mlp) => mlp.gate_up.room(),
            Self::Moe(moe) => moe.input_room(),
        }
    }

    /// Columns that the gradient to the result should have room for.
    pub(super) fn output_room(&self) -> usize {
        match self {
            Self::Gated(mlp) => mlp.down.room(),
            Self::Moe(moe) => moe.output_room(),
        }
    }

    /// Returns the result for x.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, FeedForwardSaved) {
        match self {
            Self::Gated(mlp) => {
                let (y, saved) = mlp.forward(ctx, x);
                (y, FeedForwardSaved::Gated(saved))
            }
            Self::Moe(moe) => {
                let (y, saved) = moe.forward(ctx, x, None);
                (y, FeedForwardSaved::Moe(saved))
            }
        }
    }

    /// Returns the result for x, added to `onto`, which has the dtype of the residual stream.
    pub fn forward_onto(&self, ctx: Context<'_>, x: Tensor<2>, onto: &Tensor<2>) -> (Tensor<2>, FeedForwardSaved) {
        match self {
            Self::Gated(mlp) => {
                let (y, saved) = mlp.forward_onto(ctx, x, onto);
                (y, FeedForwardSaved::Gated(saved))
            }
            Self::Moe(moe) if onto.dtype() != x.dtype() => {
                let (y, saved) = moe.forward(ctx, x, None);
                (y.plus(onto), FeedForwardSaved::Moe(saved))
            }
            Self::Moe(moe) => {
                let (y, saved) = moe.forward(ctx, x, Some(onto));
                (y, FeedForwardSaved::Moe(saved))
            }
        }
    }

    /// Returns what [`forward`](Self::forward) saved, from the part that was kept.
    pub(super) fn resume(&self, ctx: Context<'_>, x: Tensor<2>, kept: FeedForwardCheckpoint) -> FeedForwardSaved {
        match (self, kept) {
            (Self::Gated(mlp), FeedForwardCheckpoint::Gated(down)) => FeedForwardSaved::Gated(mlp.resume(ctx, x, down)),
            (Self::Moe(moe), FeedForwardCheckpoint::Moe(kept)) => FeedForwardSaved::Moe(moe.resume(ctx, x, kept)),
            _ => unreachable!("what was kept is of this half"),
        }
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
        match (self, saved) {
            (Self::Gated(mlp), FeedForwardSaved::Gated(saved)) => mlp.backward(ctx, grads, saved, dy, x),
            (Self::Moe(moe), FeedForwardSaved::Moe(saved)) => moe.backward(ctx, grads, saved, dy, x),
            _ => unreachable!("what was saved is of this half"),
        }
    }
}
