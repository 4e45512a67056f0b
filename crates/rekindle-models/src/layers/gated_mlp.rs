//! The gated feed-forward half.

use rekindle_kernels::gated_activation::{self, Activation};
use rekindle_kernels::{Grads, Tensor};
use rekindle_lora::{LinearGroup, LinearSaved};

use super::attention::{single, visit_linears};
use super::{Context, LayerBuilder, VisitWeights};
use crate::Error;
use crate::parameters::LinearRole;
use crate::spec::{self, GatedSpec};

/// down(act(gate(x)) ∘ up(x)) (Shazeer, arXiv:2002.05202), with an [`Activation`].
///
/// # Shapes
/// x and the result `[tokens, hidden]`; gate and up `[tokens, intermediate]`.
///
/// # Gradients
/// To x and to what is trained. Saved: gate and up; the product of both is recomputed between the halves of the
/// backward of `down`. x is kept only where an adapter's x·Aᵀ shares its memory; otherwise the backward asks for it again.
#[derive(Clone, Debug)]
pub struct GatedMlp {
    /// The projections of gate and up, one fused linear or two.
    pub gate_up: LinearGroup,
    /// The nonlinearity on gate, and how it meets up.
    pub activation: Activation,
    /// The projection of the result.
    pub down: LinearGroup,
}

/// Tensors that [`GatedMlp::forward`] saves for the backward.
#[derive(Debug)]
pub struct GatedMlpSaved {
    inputs: GatedInputs,
    down: LinearSaved,
}

/// Everything before `down`.
#[derive(Debug)]
struct GatedInputs {
    x: Option<Tensor<2>>,
    gate_up: LinearSaved,
    /// `[tokens, intermediate]`.
    gate: Tensor<2>,
    /// `[tokens, intermediate]`.
    up: Tensor<2>,
}

impl GatedMlpSaved {
    /// The part that makes `down` unnecessary in a recomputation.
    pub(super) fn into_checkpoint(self) -> LinearSaved {
        self.down
    }

    /// The same without a reference to the memory of act.
    pub(super) fn detached(self) -> Self {
        Self { down: self.down.detached(), ..self }
    }
}

impl GatedMlp {
    pub(crate) fn build(builder: &mut LayerBuilder<'_>, spec: &GatedSpec, hidden_size: usize) -> Result<Self, Error> {
        let gate_up = builder.linears(&spec.inputs(hidden_size))?;
        let activation = spec.activation.operation();
        Ok(Self { gate_up, activation, down: builder.linears(&[spec.output(hidden_size)])? })
    }

    /// Visits the weights of the projections.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        let roles: &[LinearRole] = match self.gate_up.linears() {
            [_] => &[LinearRole::GateUp],
            _ => &[LinearRole::Gate, LinearRole::Up],
        };
        visit_linears(&self.gate_up, roles, visit);
        visit_linears(&self.down, &[LinearRole::Down], visit);
    }

    /// Returns the result for x.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>) -> (Tensor<2>, GatedMlpSaved) {
        let inputs = self.inputs(ctx, x);
        let (y, down) = single(self.down.forward(ctx.linear(), &self.act(&inputs)));
        (y, GatedMlpSaved { inputs, down })
    }

    /// Returns the result for x, added to `onto` in the product itself.
    pub fn forward_onto(&self, ctx: Context<'_>, x: Tensor<2>, onto: &Tensor<2>) -> (Tensor<2>, GatedMlpSaved) {
        let inputs = self.inputs(ctx, x);
        let (y, down) = self.down.forward_onto(ctx.linear(), &self.act(&inputs), onto);
        (y, GatedMlpSaved { inputs, down })
    }

    /// Returns what [`forward`](Self::forward) saved, from the part that was kept.
    pub fn resume(&self, ctx: Context<'_>, x: Tensor<2>, down: LinearSaved) -> GatedMlpSaved {
        GatedMlpSaved { inputs: self.inputs(ctx, x), down }
    }

    /// Adds the gradients of what is trained and returns that to x. `x` makes the forward's x where it was not kept,
    /// after the larger intermediates are gone.
    pub fn backward(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        saved: GatedMlpSaved,
        dy: &Tensor<2>,
        x: impl FnOnce() -> Tensor<2>,
    ) -> Tensor<2> {
        let GatedMlpSaved { inputs, down } = saved;
        let GatedInputs { x: kept, gate_up, gate, up } = inputs;
        let dys = core::slice::from_ref(dy);
        let (d_act, pending) = self.down.backward_input(ctx.linear(), grads, &down, dys, true);
        let (d_gate, d_up, act) = gated_activation::backward(self.activation, d_act.expect("asked for"), gate, up);
        self.down.backward_params(ctx.linear(), grads, &act, &down, dys, pending);
        drop((act, down));
        let x = kept.unwrap_or_else(x);
        self.gate_up.backward(ctx.linear(), grads, &x, &gate_up, &[d_gate, d_up], true).expect("asked for")
    }

    fn inputs(&self, ctx: Context<'_>, x: Tensor<2>) -> GatedInputs {
        let (ys, gate_up) = self.gate_up.forward(ctx.linear(), &x);
        let x = Some(x).filter(|_| self.gate_up.keeps_input());
        let [gate, up] = ys.try_into().expect("the projections are those of gate and up");
        GatedInputs { x, gate_up, gate, up }
    }

    fn act(&self, inputs: &GatedInputs) -> Tensor<2> {
        let GatedInputs { gate, up, .. } = inputs;
        match self.down.fp8() {
            None => gated_activation::forward(self.activation, gate, up, self.down.room()),
            Some(_) => gated_activation::forward_with_codes(self.activation, gate, up, self.down.room()),
        }
    }
}

impl spec::Activation {
    /// The activation as the operation takes it.
    pub(super) fn operation(self) -> Activation {
        match self {
            Self::Silu => Activation::Silu,
            Self::GeluTanh => Activation::GeluTanh,
            Self::ClampedSwiglu { alpha, limit } => {
                Activation::ClampedSwiglu { alpha: alpha as f32, limit: limit as f32 }
            }
            Self::Xielu => unreachable!("refused by `ModelSpec::unsupported`"),
        }
    }
}
