//! One decoder layer, forward and backward.

use core::ops::Range;

use rekindle_kernels::{Grads, ParamRef, Tensor, Weight};
use rekindle_lora::LinearGroup;

use super::{
    Attention, AttentionSaved, Checkpointed, Context, FeedForward, FeedForwardSaved, LayerBuilder, LayerKvCache,
    RmsNorm, VisitWeights,
};
use crate::Error;
use crate::parameters::LayerRole;
use crate::spec::LayerSpec;

/// A decoder layer on the residual stream: h = x + m·attention(norm₁(x)); y = h + m·feed_forward(norm₂(h)), with a
/// residual multiplier m of 1 unless the spec has one.
///
/// The residual stream stays in here, so that the fusions across its parts do: the first addition with norm₂, the second
/// with the last product.
///
/// # Shapes
/// x, h, y `[tokens, hidden]`.
///
/// # Gradients
/// To x and to what is trained. Saved: x, h, the norms' rstd, and what the parts save; normalized rows are recomputed
/// unless an adapter's x·Aᵀ shares their memory.
#[derive(Clone, Debug)]
pub struct Block {
    /// The norm before attention.
    pub input_norm: RmsNorm,
    /// The attention half.
    pub attention: Attention,
    /// The norm before the feed-forward half.
    pub feed_forward_norm: RmsNorm,
    /// The feed-forward half.
    pub feed_forward: FeedForward,
    /// m.
    pub residual_multiplier: Option<f32>,
}

/// Tensors that [`Block::forward`] saves for the backward.
#[derive(Debug)]
pub struct BlockSaved {
    /// `[tokens, hidden]`.
    pub(super) x: Tensor<2>,
    rstd: Tensor<1>,
    pub(super) attention: AttentionSaved,
    /// `[tokens, hidden]`.
    pub(super) h: Tensor<2>,
    rstd2: Tensor<1>,
    pub(super) feed_forward: FeedForwardSaved,
}

impl BlockSaved {
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
        layout: usize,
    ) -> Result<Self, Error> {
        let (Some(pre_attention), Some(pre_feed_forward)) = (&spec.norms.pre_attention, &spec.norms.pre_feed_forward)
        else {
            unreachable!("refused by `ModelSpec::unsupported`")
        };
        Ok(Self {
            input_norm: RmsNorm::build(builder, LayerRole::PreAttentionNorm, pre_attention, hidden_size)?,
            attention: Attention::build(builder, &spec.attention, hidden_size, layout)?,
            feed_forward_norm: RmsNorm::build(builder, LayerRole::PreFeedForwardNorm, pre_feed_forward, hidden_size)?,
            feed_forward: FeedForward::build(builder, &spec.feed_forward, hidden_size)?,
            residual_multiplier: spec.residual_multiplier.map(|m| m as f32),
        })
    }

    /// Visits the weights in the order in which they were built.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        visit(LayerRole::PreAttentionNorm, &self.input_norm.weight);
        self.attention.visit(visit);
        visit(LayerRole::PreFeedForwardNorm, &self.feed_forward_norm.weight);
        self.feed_forward.visit(visit);
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
            if !matches!(role, LayerRole::Weight(_) | LayerRole::Bias(_)) {
                norms.extend(weight.trained());
            }
        });
        self.groups().into_iter().flat_map(LinearGroup::trained_params).chain(norms).collect()
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

    /// The groups of linears in the order of the forward pass.
    pub fn groups(&self) -> [&LinearGroup; 4] {
        let [inputs, output] = self.feed_forward.groups();
        [&self.attention.qkv, &self.attention.o, inputs, output]
    }

    /// As [`groups`](Self::groups).
    pub fn groups_mut(&mut self) -> [&mut LinearGroup; 4] {
        let [inputs, output] = self.feed_forward.groups_mut();
        [&mut self.attention.qkv, &mut self.attention.o, inputs, output]
    }

    /// Columns that the gradient to the block's output should have room for.
    pub fn room(&self) -> usize {
        self.attention.o.room().max(self.feed_forward.output().room())
    }

    /// Returns y for x.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, BlockSaved) {
        let (n, rstd) = self.input_norm.forward(ctx.params, &x, self.attention.qkv.room());
        let (delta, attention) = self.attention.forward(ctx, n);
        let room = self.feed_forward.inputs().room();
        let (h, n2, rstd2) = self.feed_forward_norm.add_forward(ctx.params, &x, self.scaled(delta), room);
        let (y, feed_forward) = self.feed_forward_onto(ctx, n2, &h);
        (y, BlockSaved { x, rstd, attention, h, rstd2, feed_forward })
    }

    /// Returns what the forward saved, from a checkpoint. y is computed only where nothing was kept of the last linear.
    pub fn resume(&self, ctx: Context<'_>, kept: Checkpointed) -> BlockSaved {
        let (x, middle, down) = kept.take();
        let Some(down) = down else { return self.forward(ctx, x).1 };
        let (n, rstd) = self.input_norm.forward(ctx.params, &x, self.attention.qkv.room());
        let room = self.feed_forward.inputs().room();
        let (attention, h, n2, rstd2) = match middle {
            Some((kept, h)) => {
                let attention = self.attention.resume(ctx, n, kept);
                let (n2, rstd2) = self.feed_forward_norm.forward(ctx.params, &h, room);
                (attention, h, n2, rstd2)
            }
            None => {
                let (delta, attention) = self.attention.forward(ctx, n);
                let (h, n2, rstd2) = self.feed_forward_norm.add_forward(ctx.params, &x, self.scaled(delta), room);
                (attention, h, n2, rstd2)
            }
        };
        let feed_forward = self.feed_forward.resume(ctx, n2, down);
        BlockSaved { x, rstd, attention, h, rstd2, feed_forward }
    }

    /// Returns y for the next tokens of one document, whose earlier keys and values are in `cache`.
    pub fn decode(&self, ctx: Context<'_>, x: Tensor<2>, cache: &mut LayerKvCache) -> Tensor<2> {
        let (n, _) = self.input_norm.forward(ctx.params, &x, self.attention.qkv.room());
        let delta = self.attention.decode(ctx, n, cache);
        let room = self.feed_forward.inputs().room();
        let (h, n2, _) = self.feed_forward_norm.add_forward(ctx.params, &x, self.scaled(delta), room);
        self.feed_forward_onto(ctx, n2, &h).0
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
        let BlockSaved { x, rstd, attention, h, rstd2, feed_forward } = saved;

        let norm2 = &self.feed_forward_norm;
        let recompute = || norm2.recompute(params, &h, &rstd2);
        let dn2 = match self.residual_multiplier {
            None => self.feed_forward.backward(ctx, grads, feed_forward, &dy, recompute),
            Some(m) => self.feed_forward.backward(ctx, grads, feed_forward, &dy.clone().scale(m), recompute),
        };
        norm2.backward_weight(grads, &dn2, &h, &rstd2);
        let dh = norm2.backward_input(params, &dn2, &h, &rstd2, Some(dy), self.room());
        drop((dn2, h));

        let pending = match self.residual_multiplier {
            None => self.attention.backward_heads(ctx, grads, attention, &dh),
            Some(m) => self.attention.backward_heads(ctx, grads, attention, &dh.clone().scale(m)),
        };
        let norm1 = &self.input_norm;
        let want_dn = want_dx || norm1.weight.trained().is_some();
        let dn =
            self.attention.backward_projections(ctx, grads, pending, || norm1.recompute(params, &x, &rstd), want_dn)?;
        norm1.backward_weight(grads, &dn, &x, &rstd);
        want_dx.then(|| norm1.backward_input(params, &dn, &x, &rstd, Some(dh), self.room()))
    }

    /// h + m·feed_forward(n).
    fn feed_forward_onto(&self, ctx: Context<'_>, n: Tensor<2>, h: &Tensor<2>) -> (Tensor<2>, FeedForwardSaved) {
        match self.residual_multiplier {
            None => self.feed_forward.forward_onto(ctx, n, h),
            Some(m) => {
                let (delta, saved) = self.feed_forward.forward(ctx, n);
                (delta.scale(m).plus(h), saved)
            }
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
