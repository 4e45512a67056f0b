//! One decoder layer, forward and backward.

use core::ops::Range;
use std::borrow::Cow;

use rekindle_kernels::{BlockPass, Grads, ParamRef, Params, Tensor, Weight, to_f32};
use rekindle_lora::{Adaptable, AdaptableMut};

use super::checkpointed::CheckpointParts;
use super::{
    Checkpointed, Context, FeedForward, FeedForwardSaved, LayerBuilder, LayerState, Mixer, MixerSaved, RmsNorm,
    VisitWeights,
};
use crate::parameters::LayerRole;
use crate::router_loss::RouterLoad;
use crate::spec::{LayerSpec, NormSpec};
use crate::{DecodeBatch, Error};

/// A decoder layer on the residual stream: h = x + m·N₂(attention(N₁(x))); y = h + m·N₄(feed_forward(N₃(h))), with those of
/// the norms N₁ … N₄ that the spec has, and a residual multiplier m of 1 unless it has one.
///
/// A layer with an output scalar s (Gemma 4) computes s·y.
///
/// In a parallel layer (Cohere) both halves read N₁(x): y = x + attention(N₁(x)) + feed_forward(N₁(x)).
///
/// The residual stream stays in here, so that the fusions across its parts do: the first addition with N₂ and N₃, the
/// second with the last product or with N₄.
///
/// # Shapes
/// x, h, y `[tokens, hidden]`.
///
/// # Dtypes
/// x, h, y and the gradients to them have the dtype of the residual stream, which may be f32 where everything else has the
/// compute dtype. Then the halves read what the norms round, their results are added in f32, and their backward reads the
/// gradient rounded to the compute dtype.
///
/// # Gradients
/// To x and to what is trained. Saved: x, h, the norms' rstd, what N₂ and N₄ normalize, and what the parts save. The
/// results of N₁ and N₃ are recomputed unless an adapter's x·Aᵀ shares their memory.
#[derive(Clone, Debug)]
pub struct Block {
    /// The norms.
    pub norms: BlockNorms,
    /// The half that looks across tokens.
    pub mixer: Mixer,
    /// The feed-forward half.
    pub feed_forward: FeedForward,
    /// m.
    pub residual_multiplier: Option<f32>,
    /// True if both halves read N₁(x).
    pub parallel: bool,
    /// s.
    pub output_scalar: Option<OutputScalar>,
}

/// A factor on the output of a layer, which is never trained.
#[derive(Clone, Debug)]
pub struct OutputScalar {
    /// The tensor, one element.
    pub weight: Weight,
    /// Its value; 0 in a model without values.
    pub value: f32,
}

/// The norms of a [`Block`].
#[derive(Clone, Debug)]
pub struct BlockNorms {
    /// N₁, before attention.
    pub pre_attention: Option<RmsNorm>,
    /// N₂, of the result of attention.
    pub post_attention: Option<RmsNorm>,
    /// N₃, before the feed-forward half.
    pub pre_feed_forward: Option<RmsNorm>,
    /// N₄, of the result of the feed-forward half.
    pub post_feed_forward: Option<RmsNorm>,
}

/// Tensors that [`Block::forward`] saves for the backward.
#[derive(Debug)]
pub struct BlockSaved {
    /// `[tokens, hidden]`.
    pub(super) x: Tensor<2>,
    rstd: Option<Tensor<1>>,
    pub(super) mixer: MixerSaved,
    pub(super) post_attention: Option<Normalized>,
    /// `[tokens, hidden]`.
    pub(super) h: Tensor<2>,
    rstd2: Option<Tensor<1>>,
    pub(super) feed_forward: FeedForwardSaved,
    pub(super) post_feed_forward: Option<Normalized>,
}

/// The input of a norm after a half.
#[derive(Debug)]
pub(super) struct Normalized {
    /// `[tokens, hidden]`.
    x: Tensor<2>,
    pub(super) rstd: Tensor<1>,
}

/// The middle of the residual stream, and what the feed-forward half reads.
struct Middle {
    post_attention: Option<Normalized>,
    h: Tensor<2>,
    n: Tensor<2>,
    rstd: Option<Tensor<1>>,
}

impl BlockSaved {
    /// Adds the choice of a mixture to the sums of the auxiliary loss.
    pub(crate) fn add_to(&self, load: &mut RouterLoad) {
        self.feed_forward.add_to(load);
    }

    /// The same without a reference to the memory of the last linear's input.
    #[must_use]
    pub fn detached(self) -> Self {
        Self { feed_forward: self.feed_forward.detached(), ..self }
    }
}

impl Block {
    pub(crate) fn build(
        builder: &mut LayerBuilder<'_>,
        spec: &LayerSpec,
        hidden_size: usize,
        layout: Option<usize>,
    ) -> Result<Self, Error> {
        let norm = |builder: &mut LayerBuilder<'_>, role, norm: &Option<NormSpec>| {
            norm.as_ref().map(|norm| RmsNorm::build(builder, role, norm, hidden_size)).transpose()
        };
        let pre_attention = norm(builder, LayerRole::PreAttentionNorm, &spec.norms.pre_attention)?;
        let mixer = Mixer::build(builder, &spec.mixer, hidden_size, layout)?;
        let post_attention = norm(builder, LayerRole::PostAttentionNorm, &spec.norms.post_attention)?;
        let pre_feed_forward = norm(builder, LayerRole::PreFeedForwardNorm, &spec.norms.pre_feed_forward)?;
        let feed_forward = FeedForward::build(builder, &spec.feed_forward, hidden_size)?;
        let post_feed_forward = norm(builder, LayerRole::PostFeedForwardNorm, &spec.norms.post_feed_forward)?;
        let output_scalar = spec.output_scalar.then(|| OutputScalar::build(builder)).transpose()?;
        Ok(Self {
            norms: BlockNorms { pre_attention, post_attention, pre_feed_forward, post_feed_forward },
            mixer,
            feed_forward,
            residual_multiplier: spec.residual_multiplier.map(|m| m as f32),
            parallel: spec.parallel,
            output_scalar,
        })
    }

    /// Visits the weights in the order in which they were built.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        let BlockNorms { pre_attention, post_attention, pre_feed_forward, post_feed_forward } = &self.norms;
        let norm = |role, norm: &'a Option<RmsNorm>, visit: VisitWeights<'_, 'a>| {
            if let Some(norm) = norm {
                visit(role, &norm.weight);
            }
        };
        norm(LayerRole::PreAttentionNorm, pre_attention, visit);
        self.mixer.visit(visit);
        norm(LayerRole::PostAttentionNorm, post_attention, visit);
        norm(LayerRole::PreFeedForwardNorm, pre_feed_forward, visit);
        self.feed_forward.visit(visit);
        norm(LayerRole::PostFeedForwardNorm, post_feed_forward, visit);
        if let Some(scalar) = &self.output_scalar {
            visit(LayerRole::OutputScalar, &scalar.weight);
        }
    }

    /// Returns the weight with a role.
    pub fn weight(&self, role: LayerRole) -> Option<&Weight> {
        let mut found = None;
        self.visit(&mut |each, weight| {
            if each == role {
                found = Some(weight);
            }
        });
        found
    }

    /// The trained parameters of this layer: weights, biases and adapters.
    pub fn trained_params(&self) -> Vec<ParamRef> {
        let mut norms = Vec::new();
        self.visit(&mut |role, weight| {
            if !matches!(role, LayerRole::Weight(_) | LayerRole::Bias(_) | LayerRole::Experts(_)) {
                norms.extend(weight.trained());
            }
        });
        self.adaptable().flat_map(Adaptable::trained_params).chain(norms).collect()
    }

    /// Returns true if anything in here is trained.
    pub fn is_trained(&self) -> bool {
        !self.trained_params().is_empty()
    }

    /// The elements of its trained parameters, which lie one after another.
    pub fn trained_range(&self) -> Range<usize> {
        let ranges: Vec<Range<usize>> = self.trained_params().into_iter().map(ParamRef::range).collect();
        let (start, end) = (ranges.iter().map(|r| r.start).min(), ranges.iter().map(|r| r.end).max());
        let whole = start.unwrap_or(0)..end.unwrap_or(0);
        debug_assert_eq!(ranges.iter().map(Range::len).sum::<usize>(), whole.len(), "a layer lies in one piece");
        whole
    }

    /// Everything that adapters can be on, in the order of the forward pass.
    pub fn adaptable(&self) -> impl Iterator<Item = Adaptable<'_>> {
        self.mixer.groups().map(Adaptable::Linears).into_iter().chain(self.feed_forward.adaptable())
    }

    /// Returns the same as [`adaptable`](Self::adaptable), mutably.
    pub fn adaptable_mut(&mut self) -> impl Iterator<Item = AdaptableMut<'_>> {
        self.mixer.groups_mut().map(AdaptableMut::Linears).into_iter().chain(self.feed_forward.adaptable_mut())
    }

    /// Returns the weights of everything that adapters can be on, to be replaced by others of the same shape.
    pub(crate) fn weights_mut(&mut self) -> Vec<&mut Weight> {
        self.adaptable_mut().flat_map(AdaptableMut::weights_mut).collect()
    }

    /// Returns the block with all its weights: itself, or a copy with those of the next block of `pass`, if there is one.
    pub(crate) fn gathered(&self, pass: Option<&mut BlockPass>) -> Cow<'_, Self> {
        let Some(pass) = pass else { return Cow::Borrowed(self) };
        let mut block = self.clone();
        pass.place_next(block.weights_mut());
        Cow::Owned(block)
    }

    /// Columns that the gradient to the block's output should have room for.
    pub fn room(&self) -> usize {
        self.mixer.output().room().max(self.feed_forward.output_room())
    }

    /// Returns y for x.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, BlockSaved) {
        let (n, rstd) = self.attention_input(ctx, &x);
        let (delta, mixer) = self.mixer.forward(ctx, n);
        let Middle { post_attention, h, n, rstd: rstd2 } = self.middle(ctx, &x, rstd.as_ref(), delta);
        let (y, feed_forward, post_feed_forward) = self.feed_forward_onto(ctx, n, &h);
        let y = self.scaled_output(y);
        (y, BlockSaved { x, rstd, mixer, post_attention, h, rstd2, feed_forward, post_feed_forward })
    }

    /// Returns what the forward saved, from a checkpoint. y is not computed where enough was kept.
    pub fn resume(&self, ctx: Context<'_>, kept: Checkpointed) -> BlockSaved {
        let CheckpointParts { x, middle, feed_forward: kept, post_feed_forward: rstd4 } = kept.take();
        if kept.is_none() && rstd4.is_none() {
            return self.forward(ctx, x).1;
        }
        let (n, rstd) = self.attention_input(ctx, &x);
        let (mixer, middle) = match middle {
            Some((kept, Some(h))) => {
                let mixer = self.mixer.resume(ctx, n, kept);
                let (n, rstd) = self.feed_forward_input(ctx, &x, rstd.as_ref(), &h);
                (mixer, Middle { post_attention: None, h, n, rstd })
            }
            Some((kept, None)) => {
                let (delta, mixer) = self.mixer.resume_output(ctx, n, kept);
                (mixer, self.middle(ctx, &x, rstd.as_ref(), delta))
            }
            None => {
                let (delta, mixer) = self.mixer.forward(ctx, n);
                (mixer, self.middle(ctx, &x, rstd.as_ref(), delta))
            }
        };
        let Middle { post_attention, h, n, rstd: rstd2 } = middle;
        let (feed_forward, post_feed_forward) = match (rstd4, kept) {
            (Some(rstd), _) => {
                let (x, saved) = self.feed_forward.forward(ctx, n);
                (saved, Some(Normalized { x, rstd }))
            }
            (None, Some(kept)) => (self.feed_forward.resume(ctx, n, kept), None),
            (None, None) => unreachable!("returned above"),
        };
        BlockSaved { x, rstd, mixer, post_attention, h, rstd2, feed_forward, post_feed_forward }
    }

    /// Returns y for new tokens of sequences whose earlier tokens are in `state`.
    pub fn decode(&self, ctx: Context<'_>, x: Tensor<2>, state: &mut LayerState, batch: &DecodeBatch) -> Tensor<2> {
        let (n, rstd) = self.attention_input(ctx, &x);
        let delta = self.mixer.decode(ctx, n, state, batch);
        let Middle { h, n, .. } = self.middle(ctx, &x, rstd.as_ref(), delta);
        self.scaled_output(self.feed_forward_onto(ctx, n, &h).0)
    }

    /// Adds the gradients of what is trained; returns the gradient to x if `want_dx`.
    pub fn backward(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        saved: BlockSaved,
        dy: Tensor<2>,
        want_dx: bool,
    ) -> Option<Tensor<2>> {
        let params = ctx.params;
        let BlockSaved { x, rstd, mixer, post_attention, h, rstd2, feed_forward, post_feed_forward } = saved;
        let dy = self.scaled_output(dy);

        let room = self.feed_forward.output_room();
        let d_half = self.backward_half(params, grads, &self.norms.post_feed_forward, post_feed_forward, &dy, room);
        let pre = self.norms.pre_feed_forward.as_ref().zip(rstd2.as_ref());
        let recompute = || match pre {
            _ if self.parallel => self.shared_input(ctx, &x, rstd.as_ref()),
            Some((norm, rstd)) => norm.recompute(params, &h, rstd),
            None => in_compute_dtype(ctx, &h, 0),
        };
        let dn = self.feed_forward.backward(ctx, grads, feed_forward, d_half.as_ref().unwrap_or(&dy), recompute);
        drop(d_half);
        let (dh, beside) = match self.parallel {
            true => (dy, Some(dn)),
            false => (self.backward_input(params, grads, pre, &dn, &h, dy), None),
        };
        drop(h);

        let room = self.mixer.output().room();
        let d_half = self.backward_half(params, grads, &self.norms.post_attention, post_attention, &dh, room);
        let pending = self.mixer.backward_heads(ctx, grads, mixer, d_half.as_ref().unwrap_or(&dh));
        drop(d_half);
        let pre = self.norms.pre_attention.as_ref().zip(rstd.as_ref());
        let recompute =
            || pre.map_or_else(|| in_compute_dtype(ctx, &x, 0), |(norm, rstd)| norm.recompute(params, &x, rstd));
        let want_dn = want_dx || pre.is_some_and(|(norm, _)| norm.weight.trained().is_some());
        let dn = self.mixer.backward_projections(ctx, grads, pending, recompute, want_dn)?;
        let dn = match beside {
            Some(beside) => dn.plus(&beside),
            None => dn,
        };
        if !want_dx {
            if let Some((norm, rstd)) = pre {
                norm.backward_weight(grads, &dn, &x, rstd);
            }
            return None;
        }
        Some(self.backward_input(params, grads, pre, &dn, &x, dh))
    }

    /// N₁(x), which is x without N₁, and its rstd.
    fn attention_input(&self, ctx: Context<'_>, x: &Tensor<2>) -> (Tensor<2>, Option<Tensor<1>>) {
        normalized(ctx, &self.norms.pre_attention, x, self.mixer.inputs().room())
    }

    /// N₁(x) of a parallel layer for its second half, from the rstd. Each half has it in memory of its own, since both write
    /// behind its rows on CUDA.
    fn shared_input(&self, ctx: Context<'_>, x: &Tensor<2>, rstd: Option<&Tensor<1>>) -> Tensor<2> {
        match self.norms.pre_attention.as_ref().zip(rstd) {
            Some((norm, rstd)) => norm.recompute(ctx.params, x, rstd),
            None => in_compute_dtype(ctx, x, 0),
        }
    }

    /// N₃(h), which is h without N₃, and its rstd; N₁(x) in a parallel layer.
    fn feed_forward_input(
        &self,
        ctx: Context<'_>,
        x: &Tensor<2>,
        rstd: Option<&Tensor<1>>,
        h: &Tensor<2>,
    ) -> (Tensor<2>, Option<Tensor<1>>) {
        if self.parallel {
            return (self.shared_input(ctx, x, rstd), None);
        }
        normalized(ctx, &self.norms.pre_feed_forward, h, self.feed_forward.input_room())
    }

    /// h = x + m·N₂(delta), and N₃(h), or N₁(x) in a parallel layer; `rstd` is that of N₁.
    fn middle(&self, ctx: Context<'_>, x: &Tensor<2>, rstd: Option<&Tensor<1>>, delta: Tensor<2>) -> Middle {
        let (params, room) = (ctx.params, self.feed_forward.input_room());
        if self.parallel {
            let n = self.shared_input(ctx, x, rstd);
            return Middle { post_attention: None, h: delta.plus(x), n, rstd: None };
        }
        match (&self.norms.post_attention, &self.norms.pre_feed_forward) {
            (None, Some(pre)) => {
                let (h, n, rstd) = pre.add_forward(params, x, self.scaled(delta), room);
                Middle { post_attention: None, h, n, rstd: Some(rstd) }
            }
            (Some(post), Some(pre)) => {
                let (h, rstd2, n, rstd) = post.forward_add_forward(params, &delta, x, pre, room);
                Middle { post_attention: Some(Normalized { x: delta, rstd: rstd2 }), h, n, rstd: Some(rstd) }
            }
            (Some(post), None) => {
                let (h, rstd) = post.forward_add(params, &delta, x);
                let n = in_compute_dtype(ctx, &h, room);
                Middle { post_attention: Some(Normalized { x: delta, rstd }), n, h, rstd: None }
            }
            (None, None) => {
                let h = self.scaled(delta).plus(x);
                Middle { post_attention: None, n: in_compute_dtype(ctx, &h, room), h, rstd: None }
            }
        }
    }

    /// h + m·N₄(feed_forward(n)).
    fn feed_forward_onto(
        &self,
        ctx: Context<'_>,
        n: Tensor<2>,
        h: &Tensor<2>,
    ) -> (Tensor<2>, FeedForwardSaved, Option<Normalized>) {
        if let Some(post) = &self.norms.post_feed_forward {
            let (x, saved) = self.feed_forward.forward(ctx, n);
            let (y, rstd) = post.forward_add(ctx.params, &x, h);
            return (y, saved, Some(Normalized { x, rstd }));
        }
        let (y, saved) = match self.residual_multiplier {
            None => self.feed_forward.forward_onto(ctx, n, h),
            Some(m) => {
                let (delta, saved) = self.feed_forward.forward(ctx, n);
                (delta.scale(m).plus(h), saved)
            }
        };
        (y, saved, None)
    }

    /// The gradient to the result of a half in the compute dtype, for the gradient to the residual stream; `None` where it
    /// is the same.
    fn backward_half(
        &self,
        params: &Params,
        grads: &mut Grads,
        post: &Option<RmsNorm>,
        saved: Option<Normalized>,
        dy: &Tensor<2>,
        room: usize,
    ) -> Option<Tensor<2>> {
        let Some((norm, Normalized { x, rstd })) = post.as_ref().zip(saved) else {
            let scaled = self.residual_multiplier.map(|m| dy.clone().scale(m));
            if dy.dtype() == params.dtype() {
                return scaled;
            }
            return Some(scaled.unwrap_or_else(|| dy.clone()).cast_padded(params.dtype(), room));
        };
        norm.backward_weight(grads, dy, &x, &rstd);
        Some(norm.backward_input(params, dy, &x, &rstd, None, room))
    }

    /// The gradient to the residual stream before a half: `dn` through the norm before it, if there is one, and `dh` past
    /// the half.
    fn backward_input(
        &self,
        params: &Params,
        grads: &mut Grads,
        pre: Option<(&RmsNorm, &Tensor<1>)>,
        dn: &Tensor<2>,
        x: &Tensor<2>,
        dh: Tensor<2>,
    ) -> Tensor<2> {
        let Some((norm, rstd)) = pre else { return dh.plus(dn) };
        norm.backward_weight(grads, dn, x, rstd);
        let room = if dh.dtype() == params.dtype() { self.room() } else { 0 };
        norm.backward_input(params, dn, x, rstd, Some(dh), room)
    }

    /// s·y, and the gradient to y for that to s·y.
    fn scaled_output(&self, y: Tensor<2>) -> Tensor<2> {
        match &self.output_scalar {
            None => y,
            Some(scalar) => y.scale(scalar.value),
        }
    }

    /// m·delta.
    fn scaled(&self, delta: Tensor<2>) -> Tensor<2> {
        match self.residual_multiplier {
            None => delta,
            Some(m) => delta.scale(m),
        }
    }
}

impl OutputScalar {
    fn build(builder: &mut LayerBuilder<'_>) -> Result<Self, Error> {
        let weight = builder.weight(LayerRole::OutputScalar, &[1])?;
        let value = match &weight {
            Weight::Frozen(tensor) if !tensor.device().is_planned() => to_f32(tensor.clone())[0],
            _ => 0.0,
        };
        Ok(Self { weight, value })
    }
}

/// The residual stream as a half without a norm reads it; on CUDA with room for `room` more columns if it is converted.
fn in_compute_dtype(ctx: Context<'_>, x: &Tensor<2>, room: usize) -> Tensor<2> {
    x.clone().cast_padded(ctx.params.dtype(), room)
}

/// The norm of x with its rstd, or x itself.
fn normalized(ctx: Context<'_>, norm: &Option<RmsNorm>, x: &Tensor<2>, room: usize) -> (Tensor<2>, Option<Tensor<1>>) {
    let Some(norm) = norm else { return (in_compute_dtype(ctx, x, room), None) };
    let (n, rstd) = norm.forward(ctx.params, x, room);
    (n, Some(rstd))
}
