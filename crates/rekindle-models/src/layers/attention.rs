//! Attention with its projections.

use rekindle_kernels::attention::{self, AttentionGrads, Heads};
use rekindle_kernels::paged_attention;
use rekindle_kernels::rope::{self, HeadNorm, Rotation};
use rekindle_kernels::{Grads, Params, Tensor, Weight, output_gate};
use rekindle_lora::{Linear, LinearGroup, LinearSaved};

use super::{Context, LayerBuilder, LayerState, MixerCheckpoint, RmsNorm, VisitWeights};
use crate::parameters::{LayerRole, LinearRole};
use crate::spec::{AttentionMask, AttentionSpec, LinearSpec, RopeId, RotarySpec};
use crate::{DecodeBatch, Error};

/// Causal grouped-query attention: o_proj(attention(rope(norm(q)), rope(norm(k)), v)) with q, k, v = projections of x.
///
/// The norms of q and k and the rotation are optional; [`QkNormPlace`] says where the norms are. `heads` has the factor of
/// the scores, their softcap and the window ([`rekindle_kernels::attention`]).
///
/// # Shapes
/// x and the result `[tokens, hidden]`, q `[tokens, heads · head_dim]`, k and v `[tokens, kv_heads · head_dim]`.
///
/// # Dtypes
/// Scores, softmax and sums in f32, everything else in the compute dtype.
///
/// # Gradients
/// To x and to what is trained, the sinks included. Saved: q, k, v, the result of attention and the logarithm of each softmax's denominator;
/// with norms also q and k before them. x is kept only where an adapter's x·Aᵀ shares its memory; otherwise the backward
/// asks for it again.
#[derive(Clone, Debug)]
pub struct Attention {
    /// The projections of q, k and v: one fused linear, three, or those of q and k where values are keys before their norm.
    pub qkv: LinearGroup,
    /// True if `q_proj` makes, for each head, its query and then the logits of a gate on its result (Qwen3-Next).
    pub output_gate: bool,
    /// Norms of queries and keys.
    pub qk_norm: Option<[RmsNorm; 2]>,
    /// The place of the query and key norms.
    pub qk_norm_place: QkNormPlace,
    /// The norm of each head of the values, whose factor is 1 (Gemma 4).
    pub value_norm: Option<HeadNorm>,
    /// A logit for each head that takes part in the softmax without a value, `[heads]` (gpt-oss).
    pub sinks: Option<Weight>,
    /// The projection of the result.
    pub o: LinearGroup,
    /// The heads.
    pub heads: Heads,
    /// The rotation; `None` for a layer without positions.
    pub rope: Option<RotarySpec>,
    /// The rotation of queries where their length grows with the position: the same angles, with scaled cosines and sines.
    pub query_rope: Option<RopeId>,
    /// Index into the model's head layouts; the documents in the context have the same index.
    pub layout: usize,
}

/// The place of the norms of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNormPlace {
    /// Each head, before the rotation.
    BeforeRope,
    /// Each head, after the rotation.
    AfterRope,
    /// All heads together, before the rotation.
    FullWidth,
}

/// Tensors that [`Attention::forward`] saves for the backward.
#[derive(Debug)]
pub struct AttentionSaved {
    x: Option<Tensor<2>>,
    qkv: LinearSaved,
    /// q and k before their norms, with the norms' rstd.
    qk: Option<[(Tensor<2>, Tensor<1>); 2]>,
    /// v before its norm, with the norm's rstd.
    value: Option<(Tensor<2>, Tensor<1>)>,
    /// Queries and logits of the gate as `q_proj` made them, with a gate.
    qg: Option<Tensor<2>>,
    heads: attention::Saved,
    /// The gated result, where an adapter's x·Aᵀ shares its memory.
    y: Option<Tensor<2>>,
    o: LinearSaved,
}

/// Gradients to q, k and v, from the first half of the backward.
#[derive(Debug)]
pub struct AttentionPending {
    x: Option<Tensor<2>>,
    qkv: LinearSaved,
    dqkv: Vec<Tensor<2>>,
}

impl AttentionSaved {
    /// The part that makes attention and its output projection unnecessary in a recomputation.
    pub(super) fn into_checkpoint(self) -> MixerCheckpoint<Tensor<2>> {
        let attention::Saved { o, lse, .. } = self.heads;
        MixerCheckpoint { o, lse: Some(lse), saved_o: self.o }
    }
}

/// q, k and v, ready for attention.
struct Projected {
    x: Option<Tensor<2>>,
    q: Tensor<2>,
    k: Tensor<2>,
    v: Tensor<2>,
    qkv: LinearSaved,
    qk: Option<[(Tensor<2>, Tensor<1>); 2]>,
    value: Option<(Tensor<2>, Tensor<1>)>,
    qg: Option<Tensor<2>>,
}

impl Attention {
    pub(crate) fn build(
        builder: &mut LayerBuilder<'_>,
        spec: &AttentionSpec,
        hidden_size: usize,
        layout: usize,
    ) -> Result<Self, Error> {
        let qkv = builder.linears(&spec.inputs(hidden_size))?;
        let (mut qk_norm, mut qk_norm_place) = (None, QkNormPlace::BeforeRope);
        if let Some(qk) = &spec.qk_norm {
            let [q, k] = spec.qk_norm_widths();
            let q = RmsNorm::build(builder, LayerRole::QueryNorm, &qk.norm, q)?;
            qk_norm = Some([q, RmsNorm::build(builder, LayerRole::KeyNorm, &qk.norm, k)?]);
            qk_norm_place = match (qk.full_width, qk.after_rope) {
                (true, _) => QkNormPlace::FullWidth,
                (false, true) => QkNormPlace::AfterRope,
                (false, false) => QkNormPlace::BeforeRope,
            };
        }
        let sinks = spec.sinks.then(|| builder.weight(LayerRole::Sinks, &[spec.heads])).transpose()?;
        let o = builder.linears(&[spec.output(hidden_size)])?;
        Ok(Self {
            qkv,
            output_gate: spec.output_gate.is_some(),
            qk_norm,
            qk_norm_place,
            value_norm: spec.value_norm.map(|norm| builder.source.ones(spec.head_dim, norm.eps)),
            sinks,
            o,
            heads: spec.layout(),
            rope: spec.rope,
            query_rope: None,
            layout,
        })
    }

    /// Visits the weights of the projections, the norms and the sinks.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        let roles: &[LinearRole] = match self.qkv.linears() {
            [_] => &[LinearRole::Qkv],
            [_, _] => &[LinearRole::Query, LinearRole::Key],
            _ => &[LinearRole::Query, LinearRole::Key, LinearRole::Value],
        };
        visit_linears(&self.qkv, roles, visit);
        if let Some([q, k]) = &self.qk_norm {
            visit(LayerRole::QueryNorm, &q.weight);
            visit(LayerRole::KeyNorm, &k.weight);
        }
        if let Some(sinks) = &self.sinks {
            visit(LayerRole::Sinks, sinks);
        }
        visit_linears(&self.o, &[LinearRole::Output], visit);
    }

    /// Returns the result for a whole batch, `[tokens, hidden]`.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, AttentionSaved) {
        let Projected { x, q, k, v, qkv, qk, value, qg } = self.project(ctx, x);
        let documents = ctx.documents(self.layout);
        let sinks = self.sinks.as_ref().map(|sinks| sinks.vector(ctx.params));
        let room = if self.output_gate { 0 } else { self.o.room() };
        let (o, lse) = attention::forward(&q, &k, &v, sinks.as_ref(), self.heads, documents, room);
        let (result, y, saved) = self.project_output(ctx, &o, qg.as_ref());
        (result, AttentionSaved { x, qkv, qk, value, qg, heads: attention::Saved { q, k, v, o, lse }, y, o: saved })
    }

    /// Returns what [`forward`](Self::forward) saved, from the part that was kept.
    pub fn resume(&self, ctx: Context<'_>, x: Tensor<2>, kept: MixerCheckpoint<Tensor<2>>) -> AttentionSaved {
        let Projected { x, q, k, v, qkv, qk, value, qg } = self.project(ctx, x);
        let MixerCheckpoint { o, lse, saved_o } = kept;
        let lse = lse.expect("attention keeps it");
        AttentionSaved { x, qkv, qk, value, qg, heads: attention::Saved { q, k, v, o, lse }, y: None, o: saved_o }
    }

    /// [`resume`](Self::resume) with the result, from the kept result of attention.
    pub fn resume_output(
        &self,
        ctx: Context<'_>,
        x: Tensor<2>,
        kept: MixerCheckpoint<Tensor<2>>,
    ) -> (Tensor<2>, AttentionSaved) {
        let Projected { x, q, k, v, qkv, qk, value, qg } = self.project(ctx, x);
        let MixerCheckpoint { o, lse, .. } = kept;
        let lse = lse.expect("attention keeps it");
        let (result, y, saved) = self.project_output(ctx, &o, qg.as_ref());
        (result, AttentionSaved { x, qkv, qk, value, qg, heads: attention::Saved { q, k, v, o, lse }, y, o: saved })
    }

    /// Returns the result for new tokens of sequences whose earlier keys and values are in `state`.
    pub fn decode(&self, ctx: Context<'_>, x: Tensor<2>, state: &mut LayerState, batch: &DecodeBatch) -> Tensor<2> {
        let Projected { q, k, v, qg, .. } = self.project(ctx, x);
        let sinks = self.sinks.as_ref().map(|sinks| sinks.vector(ctx.params));
        let LayerState::Pages(pages) = state else { unreachable!("the states of a layer are made for its kind") };
        let room = if self.output_gate { 0 } else { self.o.room() };
        let o = paged_attention::forward([&q, &k, &v], sinks.as_ref(), self.heads, pages, &batch.pages, room);
        self.project_output(ctx, &o, qg.as_ref()).0
    }

    /// The result for that of attention; the gated one, where it is needed again; and what the linear saves.
    fn project_output(
        &self,
        ctx: Context<'_>,
        o: &Tensor<2>,
        qg: Option<&Tensor<2>>,
    ) -> (Tensor<2>, Option<Tensor<2>>, LinearSaved) {
        let gated = qg.map(|qg| output_gate::forward(o, qg, self.heads.head_dim, self.o.room()));
        let (result, saved) = single(self.o.forward(ctx.linear(), gated.as_ref().unwrap_or(o)));
        (result, gated.filter(|_| self.o.keeps_input()), saved)
    }

    /// The first half of the backward: adds the gradients of `o`, the norms and the sinks, and returns those to q, k and v.
    pub fn backward_heads(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        saved: AttentionSaved,
        dy: &Tensor<2>,
    ) -> AttentionPending {
        let AttentionSaved { x, qkv, qk, value, qg, heads, y, o } = saved;
        let dys = core::slice::from_ref(dy);
        let head_dim = self.heads.head_dim;
        let gated = qg.as_ref().map(|qg| y.unwrap_or_else(|| output_gate::forward(&heads.o, qg, head_dim, 0)));
        let input = gated.as_ref().unwrap_or(&heads.o);
        let dy = self.o.backward(ctx.linear(), grads, input, &o, dys, true).expect("asked for");
        drop((o, gated));
        let (d_o, gate) = match qg {
            None => (dy, None),
            Some(qg) => (output_gate::backward(&dy, &qg, head_dim), Some((dy, heads.o.clone(), qg))),
        };
        let documents = ctx.documents(self.layout);
        let trained_sinks = self.sinks.as_ref().and_then(|sinks| Some((sinks.trained()?, sinks.vector(ctx.params))));
        let sinks = trained_sinks.as_ref().map(|(_, sinks)| sinks);
        let AttentionGrads { q: dq, k: dk, v: dv, sinks: dsinks } =
            attention::backward(&d_o, &heads, sinks, self.heads, documents, self.qkv.room());
        drop((heads, d_o));
        if let (Some((at, _)), Some(dsinks)) = (trained_sinks, dsinks) {
            grads.add(at, dsinks.as_row());
        }
        let dv = match (&self.value_norm, value) {
            (Some(norm), Some((v, rstd))) => rope::backward(dv, head_dim, Some((norm, v, &rstd)), None, false).0,
            _ => dv,
        };
        let (mut dq, dk) = self.rotate_backward(ctx, [dq, dk], &dv, qk, grads);
        if let Some((dy, o, qg)) = gate {
            dq = output_gate::join(&dq, &dy, &o, &qg, head_dim);
        }
        let dqkv = match self.values_are_keys() {
            true => vec![dq, dk.plus(&dv)],
            false => vec![dq, dk, dv],
        };
        AttentionPending { x, qkv, dqkv }
    }

    /// The second half of the backward: adds the gradients of the projections, and returns that to x if `want_dx`. `x`
    /// makes the forward's x where it was not kept.
    pub fn backward_projections(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        pending: AttentionPending,
        x: impl FnOnce() -> Tensor<2>,
        want_dx: bool,
    ) -> Option<Tensor<2>> {
        let AttentionPending { x: kept, qkv, dqkv } = pending;
        let x = kept.unwrap_or_else(x);
        self.qkv.backward(ctx.linear(), grads, &x, &qkv, &dqkv, want_dx)
    }

    /// q, k and v of x, with q and k normalized and rotated.
    fn project(&self, ctx: Context<'_>, x: Tensor<2>) -> Projected {
        let (ys, qkv) = self.qkv.forward(ctx.linear(), &x);
        let x = Some(x).filter(|_| self.qkv.keeps_input());
        let mut ys = ys.into_iter();
        let mut next = || ys.next().expect("the projections are those of q, k and v");
        let (mut q, k) = (next(), next());
        let v = if self.values_are_keys() { k.clone() } else { next() };
        let (v, value) = self.normalize_values(v);
        let mut qg = None;
        if self.output_gate {
            let both = q;
            q = output_gate::queries(&both, self.heads.head_dim);
            qg = Some(both);
        }
        let (head_dim, rotation) = (self.heads.head_dim, self.rotation(ctx));
        let rotate = |q, k| {
            let [(q, _), (k, _)] = match (rotation, self.query_rotation(ctx)) {
                (None, _) => [(q, None), (k, None)],
                (Some(_), None) => rope::forward_qk(q, k, &v, head_dim, None, rotation),
                (Some(_), of_q) => [rope::forward(q, head_dim, None, of_q), rope::forward(k, head_dim, None, rotation)],
            };
            (q, k)
        };
        let Some(layers) = &self.qk_norm else {
            let (q, k) = rotate(q, k);
            return Projected { x, q, k, v, qkv, qk: None, value, qg };
        };
        if self.qk_norm_place == QkNormPlace::FullWidth {
            let before = (q, k);
            let (q, rstd_q) = layers[0].forward(ctx.params, &before.0, 0);
            let (k, rstd_k) = layers[1].forward(ctx.params, &before.1, 0);
            let (q, k) = rotate(q, k);
            return Projected { x, q, k, v, qkv, qk: Some([(before.0, rstd_q), (before.1, rstd_k)]), value, qg };
        }
        let norms = self.norms(ctx.params);
        let (before, rotation) = match self.qk_norm_place {
            QkNormPlace::AfterRope => (rotate(q, k), None),
            _ => ((q, k), rotation),
        };
        let (q, k) = (before.0.clone(), before.1.clone());
        let [(q, rstd_q), (k, rstd_k)] = rope::forward_qk(q, k, &v, head_dim, norms.as_ref(), rotation);
        let saved = |x, rstd: Option<Tensor<1>>| (x, rstd.expect("a norm leaves its rstd"));
        Projected { x, q, k, v, qkv, qk: Some([saved(before.0, rstd_q), saved(before.1, rstd_k)]), value, qg }
    }

    /// True if there is no projection of values, which are keys before their norm.
    fn values_are_keys(&self) -> bool {
        self.qkv.linears().len() == 2
    }

    /// Values after their norm, with those before it and its rstd.
    fn normalize_values(&self, v: Tensor<2>) -> (Tensor<2>, Option<(Tensor<2>, Tensor<1>)>) {
        let Some(norm) = &self.value_norm else { return (v, None) };
        let (normalized, rstd) = rope::forward(v.clone(), self.heads.head_dim, Some(norm), None);
        (normalized, Some((v, rstd.expect("a norm leaves its rstd"))))
    }

    /// The gradients to q and k as the linears made them.
    fn rotate_backward(
        &self,
        ctx: Context<'_>,
        dqk: [Tensor<2>; 2],
        dv: &Tensor<2>,
        qk: Option<[(Tensor<2>, Tensor<1>); 2]>,
        grads: &mut Grads,
    ) -> (Tensor<2>, Tensor<2>) {
        let (head_dim, rotation) = (self.heads.head_dim, self.rotation(ctx));
        let rotate = |dqk: [Tensor<2>; 2]| match (rotation, self.query_rotation(ctx)) {
            (None, _) => dqk,
            (Some(_), None) => rope::backward_qk(dqk, dv, head_dim, None, rotation, false).map(|(d, _)| d),
            (Some(_), of_q) => {
                let [dq, dk] = dqk;
                let dq = rope::backward(dq, head_dim, None, of_q, false).0;
                [dq, rope::backward(dk, head_dim, None, rotation, false).0]
            }
        };
        let (Some(norms), Some([q, k]), Some(layers)) = (self.norms(ctx.params), qk, &self.qk_norm) else {
            let [dq, dk] = rotate(dqk);
            return (dq, dk);
        };
        if self.qk_norm_place == QkNormPlace::FullWidth {
            let [dq, dk] = rotate(dqk);
            let through = |norm: &RmsNorm, d: Tensor<2>, (x, rstd): &(Tensor<2>, Tensor<1>), grads: &mut Grads| {
                norm.backward_weight(grads, &d, x, rstd);
                norm.backward_input(ctx.params, &d, x, rstd, None, 0)
            };
            let dq = through(&layers[0], dq, &q, grads);
            return (dq, through(&layers[1], dk, &k, grads));
        }
        let (rotation, after) = match self.qk_norm_place {
            QkNormPlace::AfterRope => (None, true),
            _ => (rotation, false),
        };
        let trained = layers.each_ref().map(|norm| norm.weight.trained());
        let saved = [(&norms[0], q.0, &q.1), (&norms[1], k.0, &k.1)];
        let wanted = trained.iter().any(Option::is_some);
        let [(dq, dw_q), (dk, dw_k)] = rope::backward_qk(dqk, dv, head_dim, Some(saved), rotation, wanted);
        for (at, dw) in trained.into_iter().zip([dw_q, dw_k]) {
            if let (Some(at), Some(dw)) = (at, dw) {
                grads.add(at, dw.as_row());
            }
        }
        let [dq, dk] = if after { rotate([dq, dk]) } else { [dq, dk] };
        (dq, dk)
    }

    /// The rotation of queries, where it is another than that of keys.
    fn query_rotation<'a>(&self, ctx: Context<'a>) -> Option<Rotation<'a>> {
        let (rope, id) = self.rope.zip(self.query_rope)?;
        Some(Rotation { angles: ctx.angles(id), interleaved: rope.interleaved })
    }

    /// The rotation of this layer's heads.
    fn rotation<'a>(&self, ctx: Context<'a>) -> Option<Rotation<'a>> {
        self.rope.map(|rope| Rotation { angles: ctx.angles(rope.id), interleaved: rope.interleaved })
    }

    fn norms(&self, params: &Params) -> Option<[HeadNorm; 2]> {
        let norm = |norm: &RmsNorm| HeadNorm { gain: norm.gain(params), eps: norm.eps };
        self.qk_norm.as_ref().map(|norms| norms.each_ref().map(norm))
    }
}

impl AttentionSpec {
    /// The widths of the norms of queries and keys.
    pub(crate) fn qk_norm_widths(&self) -> [usize; 2] {
        let full_width = self.qk_norm.is_some_and(|qk| qk.full_width);
        [self.heads, self.kv_heads].map(|heads| if full_width { heads * self.head_dim } else { self.head_dim })
    }

    /// The heads as the operation takes them.
    pub(crate) fn layout(&self) -> Heads {
        let window = match self.mask {
            AttentionMask::Sliding(window) => Some(window),
            // A model whose chunks are shorter than a document is refused by `ModelSpec::unsupported`.
            AttentionMask::Full | AttentionMask::Chunked(_) => None,
        };
        let softcap = self.softcap.map(|softcap| softcap as f32);
        let Self { heads, kv_heads, head_dim, scale, .. } = *self;
        Heads { heads, kv_heads, head_dim, scale, window, softcap }
    }
}

impl LayerBuilder<'_> {
    /// Linears that read the same input.
    pub(super) fn linears(&mut self, specs: &[LinearSpec]) -> Result<LinearGroup, Error> {
        let linear = |spec: &LinearSpec| {
            let weight = self.weight(LayerRole::Weight(spec.role), &spec.shape)?;
            let bias = spec.bias.then(|| self.weight(LayerRole::Bias(spec.role), &spec.shape[..1])).transpose()?;
            let name = self.names.module(crate::Role::Layer(self.layer, LayerRole::Weight(spec.role)));
            Ok(match spec.outputs.as_slice() {
                [] => Linear::new(name, weight, bias),
                outputs => Linear::fused(name, weight, bias, outputs.to_vec()),
            })
        };
        Ok(LinearGroup::new(specs.iter().map(linear).collect::<Result<_, Error>>()?))
    }
}

/// Visits weights and biases of linears with these roles.
pub(super) fn visit_linears<'a>(group: &'a LinearGroup, roles: &[LinearRole], visit: VisitWeights<'_, 'a>) {
    for (linear, &role) in group.linears().iter().zip(roles) {
        visit(LayerRole::Weight(role), &linear.weight);
        if let Some(bias) = &linear.bias {
            visit(LayerRole::Bias(role), bias);
        }
    }
}

/// The one output of a group.
pub(super) fn single((ys, saved): (Vec<Tensor<2>>, LinearSaved)) -> (Tensor<2>, LinearSaved) {
    let [y] = ys.try_into().expect("a group with one output");
    (y, saved)
}
