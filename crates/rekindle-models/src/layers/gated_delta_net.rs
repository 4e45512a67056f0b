//! Linear attention by the gated delta rule, with its projections.

use rekindle_kernels::gated_delta::{self, DeltaGrads, DeltaHeads, DeltaInputs};
use rekindle_kernels::{Grads, Params, Tensor, Weight, causal_conv, gated_norm};
use rekindle_lora::{LinearGroup, LinearSaved};

use super::attention::{single, visit_linears};
use super::{Context, LayerBuilder, LayerState, MixerCheckpoint, VisitWeights};
use crate::decoder::SequenceRows;
use crate::parameters::{LayerRole, LinearRole};
use crate::spec::GatedDeltaSpec;
use crate::{DecodeBatch, Error};

/// A gated delta layer (Qwen3-Next, Qwen3.5): out_proj(gated_norm(rule(silu(conv(in_proj_qkv x)), in_proj_b x, in_proj_a x),
/// in_proj_z x)), with the [causal convolution](rekindle_kernels::causal_conv), the
/// [gated delta rule](rekindle_kernels::gated_delta) and the [gated norm](rekindle_kernels::gated_norm). Convolution and state
/// restart at every document.
///
/// # Shapes
/// x and the result `[tokens, hidden]`; q and k `[tokens, key_heads · key_dim]`, v, z and o `[tokens, value_heads · value_dim]`,
/// a and b `[tokens, value_heads]`.
///
/// # Dtypes
/// The rule's gates, states and sums in f32, everything else in the compute dtype.
///
/// # Gradients
/// To x and to what is trained. Saved: q, k, v before the convolution, z, a, b and o. The backward recomputes the convolution,
/// the states and the gated norm, whose result is kept only where an adapter's x·Aᵀ shares its memory.
#[derive(Clone, Debug)]
pub struct GatedDeltaNet {
    /// The projections of q, k and v together, z, b and a.
    pub inputs: LinearGroup,
    /// The weight of the convolution, `[channels, width]`.
    pub conv: Weight,
    /// The logarithm of the decays' rates, `[value_heads]`.
    pub a_log: Weight,
    /// Added to a, `[value_heads]`.
    pub dt_bias: Weight,
    /// The weight of the gated norm, `[value_dim]`.
    pub norm: Weight,
    /// Added to the norm's mean square.
    pub eps: f64,
    /// The projection of the result.
    pub output: LinearGroup,
    /// The heads.
    pub heads: DeltaHeads,
    /// Taps of the convolution.
    pub conv_width: usize,
}

/// Tensors that [`GatedDeltaNet::forward`] saves for the backward.
#[derive(Debug)]
pub struct GatedDeltaNetSaved {
    x: Option<Tensor<2>>,
    projected: Projected,
    o: Tensor<2>,
    y: Option<Tensor<2>>,
    output: LinearSaved,
}

/// Gradients to the results of the projections, from the first half of the backward.
#[derive(Debug)]
pub struct GatedDeltaNetPending {
    x: Option<Tensor<2>>,
    inputs: LinearSaved,
    grads: [Tensor<2>; 4],
}

impl GatedDeltaNetSaved {
    /// The part that makes the rule and the output projection unnecessary in a recomputation.
    pub(super) fn into_checkpoint(self) -> MixerCheckpoint<Tensor<2>> {
        MixerCheckpoint { o: self.o, lse: None, saved_o: self.output }
    }
}

/// The results of the projections.
#[derive(Debug)]
struct Projected {
    inputs: LinearSaved,
    qkv: Tensor<2>,
    z: Tensor<2>,
    b: Tensor<2>,
    a: Tensor<2>,
}

impl GatedDeltaNet {
    pub(crate) fn build(
        builder: &mut LayerBuilder<'_>,
        spec: &GatedDeltaSpec,
        hidden_size: usize,
    ) -> Result<Self, Error> {
        let inputs = builder.linears(&spec.inputs(hidden_size))?;
        let mut weight = |role| builder.weight(role, &spec.shape(role));
        let conv = weight(LayerRole::ShortConv)?;
        let (a_log, dt_bias) = (weight(LayerRole::DecayRate)?, weight(LayerRole::DecayBias)?);
        let norm = weight(LayerRole::GatedNorm)?;
        let output = builder.linears(&[spec.output(hidden_size)])?;
        let (heads, eps, conv_width) = (spec.heads(), spec.eps, spec.conv_width);
        Ok(Self { inputs, conv, a_log, dt_bias, norm, eps, output, heads, conv_width })
    }

    /// Visits the weights in the order in which they were built.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        visit_linears(&self.inputs, &LinearRole::DELTA_INPUTS, visit);
        visit(LayerRole::ShortConv, &self.conv);
        visit(LayerRole::DecayRate, &self.a_log);
        visit(LayerRole::DecayBias, &self.dt_bias);
        visit(LayerRole::GatedNorm, &self.norm);
        visit_linears(&self.output, &[LinearRole::DeltaOutput], visit);
    }

    /// Returns the result for a whole batch, `[tokens, hidden]`.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, GatedDeltaNetSaved) {
        let (x, projected) = self.project(ctx, x);
        let qkv = causal_conv::forward(&projected.qkv, &self.conv.matrix(ctx.params), ctx.sequences());
        let o = gated_delta::forward(&self.rule(ctx.params, &projected, qkv), self.heads, ctx.sequences());
        let y = self.normalized(ctx.params, &o, &projected.z);
        let (result, output) = single(self.output.forward(ctx.linear(), &y));
        let y = Some(y).filter(|_| self.output.keeps_input());
        (result, GatedDeltaNetSaved { x, projected, o, y, output })
    }

    /// Returns what [`forward`](Self::forward) saved, from the part that was kept.
    pub fn resume(&self, ctx: Context<'_>, x: Tensor<2>, kept: MixerCheckpoint<Tensor<2>>) -> GatedDeltaNetSaved {
        let (x, projected) = self.project(ctx, x);
        GatedDeltaNetSaved { x, projected, o: kept.o, y: None, output: kept.saved_o }
    }

    /// [`resume`](Self::resume) with the result, from the kept result of the rule.
    pub fn resume_output(
        &self,
        ctx: Context<'_>,
        x: Tensor<2>,
        kept: MixerCheckpoint<Tensor<2>>,
    ) -> (Tensor<2>, GatedDeltaNetSaved) {
        let (x, projected) = self.project(ctx, x);
        let y = self.normalized(ctx.params, &kept.o, &projected.z);
        let (result, output) = single(self.output.forward(ctx.linear(), &y));
        let y = Some(y).filter(|_| self.output.keeps_input());
        (result, GatedDeltaNetSaved { x, projected, o: kept.o, y, output })
    }

    /// Returns the result for new tokens of sequences, whose states and last inputs of the convolution are in `state`.
    pub fn decode(&self, ctx: Context<'_>, x: Tensor<2>, state: &mut LayerState, batch: &DecodeBatch) -> Tensor<2> {
        let LayerState::Recurrent(states) = state else { unreachable!("the states of a layer are made for its kind") };
        let (_, projected) = self.project(ctx, x);
        let conv = self.conv.matrix(ctx.params);
        let of_sequence = |rows: &SequenceRows| {
            let &SequenceRows { sequence, first, count, past } = rows;
            let new = projected.qkv.rows(first, count);
            let (last, state) = states.take(sequence, past == 0, self.conv_width - 1, &new);
            let qkv = causal_conv::forward_cached(&new, &conv, &last);
            let mut inputs = self.rule(ctx.params, &projected, qkv);
            inputs.b = inputs.b.rows(first, count);
            inputs.a = inputs.a.rows(first, count);
            let (o, state) = gated_delta::forward_cached(&inputs, self.heads, state);
            states.put(sequence, last, &new, state);
            o
        };
        let o = Tensor::cat_rows(batch.sequences().iter().map(of_sequence).collect());
        let y = self.normalized(ctx.params, &o, &projected.z);
        single(self.output.forward(ctx.linear(), &y)).0
    }

    /// The first half of the backward: adds the gradients of the output projection, the norm, the rule and the convolution,
    /// and returns those to the results of the projections.
    pub fn backward_heads(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        saved: GatedDeltaNetSaved,
        dy: &Tensor<2>,
    ) -> GatedDeltaNetPending {
        let GatedDeltaNetSaved { x, projected, o, y, output } = saved;
        let params = ctx.params;
        let norm = self.norm.vector(params);
        let y = y.unwrap_or_else(|| gated_norm::forward(&o, &projected.z, &norm, self.eps, 0));
        let dys = core::slice::from_ref(dy);
        let dy = self.output.backward(ctx.linear(), grads, &y, &output, dys, true).expect("asked for");
        drop((y, output));
        if let Some(at) = self.norm.trained() {
            grads.add(at, gated_norm::weight_grad(&dy, &o, &projected.z, &norm, self.eps).as_row());
        }
        let (d_o, dz) = gated_norm::backward(&dy, &o, &projected.z, &norm, self.eps);
        drop((dy, o));
        let conv = self.conv.matrix(params);
        let qkv = causal_conv::forward(&projected.qkv, &conv, ctx.sequences());
        let rule = self.rule(params, &projected, qkv);
        let DeltaGrads { qkv: dqkv, b: db, a: da, a_log, dt_bias } =
            gated_delta::backward(&d_o, &rule, self.heads, ctx.sequences());
        drop((d_o, rule));
        for (weight, grad) in [(&self.a_log, a_log), (&self.dt_bias, dt_bias)] {
            if let Some(at) = weight.trained() {
                grads.add(at, grad.as_row());
            }
        }
        let trained = self.conv.trained();
        let (dqkv, d_conv) = causal_conv::backward(&dqkv, &projected.qkv, &conv, ctx.sequences(), trained.is_some());
        if let (Some(at), Some(d_conv)) = (trained, d_conv) {
            grads.add(at, d_conv);
        }
        GatedDeltaNetPending { x, inputs: projected.inputs, grads: [dqkv, dz, db, da] }
    }

    /// The second half of the backward: adds the gradients of the projections, and returns that to x if `want_dx`. `x`
    /// makes the forward's x where it was not kept.
    pub fn backward_projections(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        pending: GatedDeltaNetPending,
        x: impl FnOnce() -> Tensor<2>,
        want_dx: bool,
    ) -> Option<Tensor<2>> {
        let GatedDeltaNetPending { x: kept, inputs, grads: projected } = pending;
        let x = kept.unwrap_or_else(x);
        self.inputs.backward(ctx.linear(), grads, &x, &inputs, &projected, want_dx)
    }

    fn project(&self, ctx: Context<'_>, x: Tensor<2>) -> (Option<Tensor<2>>, Projected) {
        let (ys, inputs) = self.inputs.forward(ctx.linear(), &x);
        let x = Some(x).filter(|_| self.inputs.keeps_input());
        let [qkv, z, b, a] = ys.try_into().expect("the projections are those of q, k, v; z; b; a");
        (x, Projected { inputs, qkv, z, b, a })
    }

    /// The rule's operands, with the result of the convolution.
    fn rule(&self, params: &Params, projected: &Projected, qkv: Tensor<2>) -> DeltaInputs {
        let Projected { b, a, .. } = projected;
        let (a_log, dt_bias) = (self.a_log.vector(params), self.dt_bias.vector(params));
        DeltaInputs { qkv, b: b.clone(), a: a.clone(), a_log, dt_bias }
    }

    fn normalized(&self, params: &Params, o: &Tensor<2>, z: &Tensor<2>) -> Tensor<2> {
        gated_norm::forward(o, z, &self.norm.vector(params), self.eps, self.output.room())
    }
}
