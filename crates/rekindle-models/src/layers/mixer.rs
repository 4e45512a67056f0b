//! The half of a layer that looks across tokens, whichever it is.

use rekindle_kernels::{Grads, Tensor};
use rekindle_lora::{LinearGroup, LinearSaved};

use super::{
    Attention, AttentionPending, AttentionSaved, Context, GatedDeltaNet, GatedDeltaNetPending, GatedDeltaNetSaved,
    LayerBuilder, LayerState, VisitWeights,
};
use crate::spec::MixerSpec;
use crate::{DecodeBatch, Error};

/// The half of a layer that looks across tokens.
#[derive(Clone, Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each layer, for as long as the model lives")]
pub enum Mixer {
    /// Softmax attention.
    Attention(Attention),
    /// Linear attention by the gated delta rule.
    GatedDelta(GatedDeltaNet),
}

/// Tensors that [`Mixer::forward`] saves for the backward.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each layer")]
pub enum MixerSaved {
    /// Those of softmax attention.
    Attention(AttentionSaved),
    /// Those of a gated delta layer.
    GatedDelta(GatedDeltaNetSaved),
}

/// Gradients to the results of the projections, from the first half of the backward.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one at a time")]
pub enum MixerPending {
    /// Those of softmax attention.
    Attention(AttentionPending),
    /// Those of a gated delta layer.
    GatedDelta(GatedDeltaNetPending),
}

/// The result before the last linear. Where it is kept, what makes it does not run again, nor the linear after it unless a
/// norm follows.
#[derive(Debug)]
pub struct MixerCheckpoint<T> {
    pub(super) o: T,
    /// The logarithm of each softmax's denominator, for attention.
    pub(super) lse: Option<Tensor<2>>,
    pub(super) saved_o: LinearSaved,
}

impl<T> MixerCheckpoint<T> {
    pub(super) fn map<U>(self, f: impl FnOnce(T) -> U) -> MixerCheckpoint<U> {
        let Self { o, lse, saved_o } = self;
        MixerCheckpoint { o: f(o), lse, saved_o }
    }
}

impl MixerSaved {
    /// The part that makes the mixer and its output projection unnecessary in a recomputation.
    pub(super) fn into_checkpoint(self) -> MixerCheckpoint<Tensor<2>> {
        match self {
            Self::Attention(saved) => saved.into_checkpoint(),
            Self::GatedDelta(saved) => saved.into_checkpoint(),
        }
    }
}

impl Mixer {
    pub(crate) fn build(
        builder: &mut LayerBuilder<'_>,
        spec: &MixerSpec,
        hidden_size: usize,
        layout: Option<usize>,
    ) -> Result<Self, Error> {
        Ok(match spec {
            MixerSpec::Attention(spec) => {
                let layout = layout.expect("attention has a layout");
                Self::Attention(Attention::build(builder, spec, hidden_size, layout)?)
            }
            MixerSpec::GatedDelta(spec) => Self::GatedDelta(GatedDeltaNet::build(builder, spec, hidden_size)?),
        })
    }

    /// Returns softmax attention, if this is it.
    pub fn attention(&self) -> Option<&Attention> {
        match self {
            Self::Attention(attention) => Some(attention),
            Self::GatedDelta(_) => None,
        }
    }

    /// As [`attention`](Self::attention).
    pub fn attention_mut(&mut self) -> Option<&mut Attention> {
        match self {
            Self::Attention(attention) => Some(attention),
            Self::GatedDelta(_) => None,
        }
    }

    /// Visits the weights.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        match self {
            Self::Attention(attention) => attention.visit(visit),
            Self::GatedDelta(net) => net.visit(visit),
        }
    }

    /// The groups of linears in the order of the forward pass: those that read x, and the one that makes the result.
    pub fn groups(&self) -> [&LinearGroup; 2] {
        match self {
            Self::Attention(attention) => [&attention.qkv, &attention.o],
            Self::GatedDelta(net) => [&net.inputs, &net.output],
        }
    }

    /// As [`groups`](Self::groups).
    pub fn groups_mut(&mut self) -> [&mut LinearGroup; 2] {
        match self {
            Self::Attention(attention) => [&mut attention.qkv, &mut attention.o],
            Self::GatedDelta(net) => [&mut net.inputs, &mut net.output],
        }
    }

    /// The linears that read x.
    pub(super) fn inputs(&self) -> &LinearGroup {
        self.groups()[0]
    }

    /// The linear that makes the result.
    pub(super) fn output(&self) -> &LinearGroup {
        self.groups()[1]
    }

    /// Returns the result for a whole batch, `[tokens, hidden]`.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, MixerSaved) {
        match self {
            Self::Attention(attention) => {
                let (y, saved) = attention.forward(ctx, x);
                (y, MixerSaved::Attention(saved))
            }
            Self::GatedDelta(net) => {
                let (y, saved) = net.forward(ctx, x);
                (y, MixerSaved::GatedDelta(saved))
            }
        }
    }

    /// Returns what [`forward`](Self::forward) saved, from the part that was kept.
    pub fn resume(&self, ctx: Context<'_>, x: Tensor<2>, kept: MixerCheckpoint<Tensor<2>>) -> MixerSaved {
        match self {
            Self::Attention(attention) => MixerSaved::Attention(attention.resume(ctx, x, kept)),
            Self::GatedDelta(net) => MixerSaved::GatedDelta(net.resume(ctx, x, kept)),
        }
    }

    /// [`resume`](Self::resume) with the result, from what was kept before the last linear.
    pub fn resume_output(
        &self,
        ctx: Context<'_>,
        x: Tensor<2>,
        kept: MixerCheckpoint<Tensor<2>>,
    ) -> (Tensor<2>, MixerSaved) {
        match self {
            Self::Attention(attention) => {
                let (y, saved) = attention.resume_output(ctx, x, kept);
                (y, MixerSaved::Attention(saved))
            }
            Self::GatedDelta(net) => {
                let (y, saved) = net.resume_output(ctx, x, kept);
                (y, MixerSaved::GatedDelta(saved))
            }
        }
    }

    /// Returns the result for new tokens of sequences whose earlier tokens are in `state`.
    pub fn decode(&self, ctx: Context<'_>, x: Tensor<2>, state: &mut LayerState, batch: &DecodeBatch) -> Tensor<2> {
        match self {
            Self::Attention(attention) => attention.decode(ctx, x, state, batch),
            Self::GatedDelta(net) => net.decode(ctx, x, state, batch),
        }
    }

    /// The first half of the backward, down to the results of the projections.
    pub fn backward_heads(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        saved: MixerSaved,
        dy: &Tensor<2>,
    ) -> MixerPending {
        match (self, saved) {
            (Self::Attention(attention), MixerSaved::Attention(saved)) => {
                MixerPending::Attention(attention.backward_heads(ctx, grads, saved, dy))
            }
            (Self::GatedDelta(net), MixerSaved::GatedDelta(saved)) => {
                MixerPending::GatedDelta(net.backward_heads(ctx, grads, saved, dy))
            }
            _ => unreachable!("saved by this layer"),
        }
    }

    /// The second half of the backward: adds the gradients of the projections, and returns that to x if `want_dx`. `x`
    /// makes the forward's x where it was not kept.
    pub fn backward_projections(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        pending: MixerPending,
        x: impl FnOnce() -> Tensor<2>,
        want_dx: bool,
    ) -> Option<Tensor<2>> {
        match (self, pending) {
            (Self::Attention(attention), MixerPending::Attention(pending)) => {
                attention.backward_projections(ctx, grads, pending, x, want_dx)
            }
            (Self::GatedDelta(net), MixerPending::GatedDelta(pending)) => {
                net.backward_projections(ctx, grads, pending, x, want_dx)
            }
            _ => unreachable!("made by this layer"),
        }
    }
}
