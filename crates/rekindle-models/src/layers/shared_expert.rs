//! The expert of a mixture that every token uses.

use rekindle_kernels::expert_act::{self, ExpertActGrads, ExpertActivation};
use rekindle_kernels::gated_activation::Activation;
use rekindle_kernels::routing::{self, Routing, RoutingForm};
use rekindle_kernels::{Grads, Tensor};
use rekindle_lora::{LinearGroup, LinearSaved};

use super::attention::{single, visit_linears};
use super::{Context, GatedMlp, GatedMlpSaved, LayerBuilder, VisitWeights};
use crate::Error;
use crate::parameters::LinearRole;
use crate::spec::SharedExpertSpec;

/// The expert that every token uses: y = σ(g)·down(silu(gate(x)) ∘ up(x)) with a logit g = x·w_gᵀ for each token, or
/// without the factor σ(g).
///
/// With it this is a mixture of one expert whose router takes sigmoids, and computed as one: σ(g) multiplies
/// silu(gate) ∘ up.
#[derive(Clone, Debug)]
pub struct SharedExpert {
    /// The projections.
    pub mlp: GatedMlp,
    /// w_g, where there is one.
    pub gate: Option<LinearGroup>,
}

/// Tensors that [`SharedExpert::forward_onto`] saves for the backward.
#[derive(Debug)]
pub struct SharedExpertSaved(Saved);

#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "one for each layer")]
enum Saved {
    Plain(Box<GatedMlpSaved>),
    Gated {
        gate: LinearSaved,
        routing: Box<Routing>,
        inputs: LinearSaved,
        /// Gate and up side by side.
        gate_up: Tensor<2>,
        down: LinearSaved,
    },
}

impl SharedExpertSaved {
    /// The part that makes `down` unnecessary in a recomputation.
    pub(super) fn into_checkpoint(self) -> LinearSaved {
        match self.0 {
            Saved::Plain(saved) => saved.into_checkpoint(),
            Saved::Gated { down, .. } => down,
        }
    }

    /// The same without a reference to the memory of the last linear's input.
    pub(super) fn detached(self) -> Self {
        Self(match self.0 {
            Saved::Plain(saved) => Saved::Plain(Box::new(saved.detached())),
            Saved::Gated { gate, routing, inputs, gate_up, down } => {
                Saved::Gated { gate, routing, inputs, gate_up, down: down.detached() }
            }
        })
    }
}

impl SharedExpert {
    pub(super) fn build(
        builder: &mut LayerBuilder<'_>,
        spec: &SharedExpertSpec,
        hidden_size: usize,
    ) -> Result<Self, Error> {
        let gate_up = builder.linears(&spec.inputs(hidden_size))?;
        let down = builder.linears(&[spec.output(hidden_size)])?;
        let gate = spec.gate(hidden_size).map(|gate| builder.linears(&[gate])).transpose()?;
        Ok(Self { mlp: GatedMlp { gate_up, activation: Activation::Silu, down }, gate })
    }

    /// Visits the weights.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        visit_linears(&self.mlp.gate_up, &[LinearRole::SharedGate, LinearRole::SharedUp], visit);
        visit_linears(&self.mlp.down, &[LinearRole::SharedDown], visit);
        if let Some(gate) = &self.gate {
            visit_linears(gate, &[LinearRole::SharedExpertGate], visit);
        }
    }

    /// The groups of linears in the order of the forward pass.
    pub fn groups(&self) -> impl Iterator<Item = &LinearGroup> {
        [&self.mlp.gate_up, &self.mlp.down].into_iter().chain(&self.gate)
    }

    /// Returns the same as [`groups`](Self::groups), mutably.
    pub fn groups_mut(&mut self) -> impl Iterator<Item = &mut LinearGroup> {
        [&mut self.mlp.gate_up, &mut self.mlp.down].into_iter().chain(&mut self.gate)
    }

    pub(super) fn input_room(&self) -> usize {
        self.mlp.gate_up.room()
    }

    pub(super) fn output_room(&self) -> usize {
        self.mlp.down.room()
    }

    /// Returns true if what the forward keeps lies beside x.
    pub(super) fn keeps_input(&self) -> bool {
        self.mlp.gate_up.keeps_input() || self.gate.as_ref().is_some_and(LinearGroup::keeps_input)
    }

    /// Returns the result for x, added to `onto`.
    pub fn forward_onto(&self, ctx: Context<'_>, x: &Tensor<2>, onto: &Tensor<2>) -> (Tensor<2>, SharedExpertSaved) {
        let Some(gate) = &self.gate else {
            let (y, saved) = self.mlp.forward_onto(ctx, x.clone(), onto);
            return (y, SharedExpertSaved(Saved::Plain(Box::new(saved))));
        };
        let Inputs { gate, routing, inputs, gate_up } = self.inputs(ctx, gate, x);
        let act = expert_act::forward(&gate_up, &routing.weights, &routing.dispatch, ExpertActivation::Silu);
        let (y, down) = self.mlp.down.forward_onto(ctx.linear(), &act, onto);
        (y, SharedExpertSaved(Saved::Gated { gate, routing, inputs, gate_up, down }))
    }

    /// Returns what the forward saved, from the part that was kept.
    pub(super) fn resume(&self, ctx: Context<'_>, x: &Tensor<2>, down: LinearSaved) -> SharedExpertSaved {
        SharedExpertSaved(match &self.gate {
            None => Saved::Plain(Box::new(self.mlp.resume(ctx, x.clone(), down))),
            Some(gate) => {
                let Inputs { gate, routing, inputs, gate_up } = self.inputs(ctx, gate, x);
                Saved::Gated { gate, routing, inputs, gate_up, down }
            }
        })
    }

    /// Adds the gradients of what is trained and returns that to x.
    pub fn backward(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        saved: SharedExpertSaved,
        dy: &Tensor<2>,
        x: &Tensor<2>,
    ) -> Tensor<2> {
        let (gate_linear, (gate, routing, inputs, gate_up, down)) = match (&self.gate, saved.0) {
            (None, Saved::Plain(saved)) => return self.mlp.backward(ctx, grads, *saved, dy, || x.clone()),
            (Some(linear), Saved::Gated { gate, routing, inputs, gate_up, down }) => {
                (linear, (gate, routing, inputs, gate_up, down))
            }
            _ => unreachable!("what was saved is of this expert"),
        };
        let dys = core::slice::from_ref(dy);
        let (dact, pending) = self.mlp.down.backward_input(ctx.linear(), grads, &down, dys, true);
        let (dact, Routing { weights, dispatch, .. }) = (dact.expect("asked for"), routing.as_ref());
        let ExpertActGrads { gate_up: dgate_up, act, weights: dweights } =
            expert_act::backward(dact, gate_up, weights, dispatch, ExpertActivation::Silu);
        self.mlp.down.backward_params(ctx.linear(), grads, &act, &down, dys, pending);
        drop((act, down));
        let width = dgate_up.dims()[1] / 2;
        let halves = [0, width].map(|first| dgate_up.columns(first, width));
        let dx = self.mlp.gate_up.backward(ctx.linear(), grads, x, &inputs, &halves, true).expect("asked for");
        let dlogits = routing::backward(&routing, &dweights);
        let through_gate = gate_linear.backward(ctx.linear(), grads, x, &gate, &[dlogits], true).expect("asked for");
        dx.plus(&through_gate)
    }

    fn inputs(&self, ctx: Context<'_>, gate: &LinearGroup, x: &Tensor<2>) -> Inputs {
        let (logits, gate) = single(gate.forward(ctx.linear(), x));
        let routing = Box::new(routing::forward(logits, 1, RoutingForm::Sigmoid));
        let (halves, inputs) = self.mlp.gate_up.forward(ctx.linear(), x);
        Inputs { gate, routing, inputs, gate_up: Tensor::cat_columns(halves) }
    }
}

/// Everything before silu(gate) ∘ up.
struct Inputs {
    gate: LinearSaved,
    routing: Box<Routing>,
    inputs: LinearSaved,
    gate_up: Tensor<2>,
}
