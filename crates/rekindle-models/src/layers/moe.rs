//! Mixtures of experts.

use rekindle_kernels::expert_act::{self, ExpertActGrads};
use rekindle_kernels::grouped::GroupedRows;
use rekindle_kernels::routing::{self, Routing, RoutingForm};
use rekindle_kernels::{Grads, Tensor};
use rekindle_lora::{Adaptable, AdaptableMut, ExpertLinear, ExpertNames, ExpertSaved, LinearGroup, LinearSaved};

use super::attention::{single, visit_linears};
use super::shared_expert::{SharedExpert, SharedExpertSaved};
use super::{Context, LayerBuilder, VisitWeights};
use crate::Error;
use crate::parameters::{ExpertStack, LayerRole, LinearRole};
use crate::spec::MoeSpec;

/// A mixture of experts: y = Σ_slot w·down_e(silu(gate_e(x)) ∘ up_e(x)) over the experts e that the router chooses for a
/// token, plus the expert that every token uses where there is one.
///
/// The router's weight w multiplies silu(gate) ∘ up, which is the same since down is linear: the results of down are then
/// summed as they are, and the gradient to w needs none of them.
///
/// # Shapes
/// x and the result `[tokens, hidden]`; the rows of experts `[tokens · top_k, …]` in the order of the experts.
///
/// # Gradients
/// To x, to what is trained, and through w to the router. Saved: the routing, gate and up, and x·Aᵀ of every adapter;
/// silu(gate) ∘ up is recomputed. x is kept only where an adapter's x·Aᵀ shares its memory.
///
/// Equal to transformers' `Qwen3MoeSparseMoeBlock`, `Qwen2MoeSparseMoeBlock` and `MixtralSparseMoeBlock` in f32; in 16 bits
/// those round w and multiply after down.
#[derive(Clone, Debug)]
pub struct Moe {
    /// The logits of the experts.
    pub router: LinearGroup,
    /// Gate and up of all experts.
    pub gate_up: ExpertLinear,
    /// Back from all experts.
    pub down: ExpertLinear,
    /// The expert that every token uses.
    pub shared: Option<SharedExpert>,
    /// Experts of each token.
    pub top_k: usize,
    /// The formula of the weights from the logits.
    pub form: RoutingForm,
}

/// Tensors that [`Moe::forward`] saves for the backward.
#[derive(Debug)]
pub struct MoeSaved {
    x: Option<Tensor<2>>,
    routed: Routed,
    gate_up_saved: ExpertSaved,
    /// Gate and up, `[tokens · top_k, 2 · intermediate]`.
    gate_up: Tensor<2>,
    down: ExpertSaved,
    shared: Option<SharedExpertSaved>,
}

/// The router's choice and what its own backward needs.
#[derive(Clone, Debug)]
struct Routed {
    router: LinearSaved,
    routing: Routing,
}

/// The part of a mixture that is kept where the rest is recomputed: with it neither the router nor a last product runs
/// again. The choice in particular is made once.
#[derive(Debug)]
pub(super) struct MoeCheckpoint {
    routed: Routed,
    down: ExpertSaved,
    shared: Option<LinearSaved>,
}

impl MoeSaved {
    /// The part that is kept in a checkpoint.
    pub(super) fn into_checkpoint(self) -> MoeCheckpoint {
        let Self { routed, down, shared, .. } = self;
        MoeCheckpoint { routed, down, shared: shared.map(SharedExpertSaved::into_checkpoint) }
    }

    /// The same without references to the memory of the last linears' inputs.
    pub(super) fn detached(self) -> Self {
        Self { shared: self.shared.map(SharedExpertSaved::detached), ..self }
    }
}

impl MoeCheckpoint {
    pub(super) fn is_small(&self) -> bool {
        self.routed.router.is_small() && self.shared.as_ref().is_none_or(LinearSaved::is_small)
    }

    pub(super) fn detached(self) -> Self {
        let Self { routed: Routed { router, routing }, down, shared } = self;
        let routed = Routed { router: router.detached(), routing };
        Self { routed, down, shared: shared.map(LinearSaved::detached) }
    }
}

impl Moe {
    pub(crate) fn build(builder: &mut LayerBuilder<'_>, spec: &MoeSpec, hidden_size: usize) -> Result<Self, Error> {
        let router = builder.linears(&[spec.router(hidden_size)])?;
        let gate_up = builder.experts(spec, ExpertStack::GateUp, hidden_size)?;
        let down = builder.experts(spec, ExpertStack::Down, hidden_size)?;
        let shared = spec.shared.map(|shared| SharedExpert::build(builder, &shared, hidden_size)).transpose()?;
        Ok(Self { router, gate_up, down, shared, top_k: spec.top_k, form: spec.routing })
    }

    /// Visits the weights.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        visit_linears(&self.router, &[LinearRole::Router], visit);
        visit(LayerRole::Experts(ExpertStack::GateUp), &self.gate_up.weight);
        visit(LayerRole::Experts(ExpertStack::Down), &self.down.weight);
        if let Some(shared) = &self.shared {
            shared.visit(visit);
        }
    }

    /// Everything that adapters can be on, in the order of the forward pass.
    pub fn adaptable(&self) -> Vec<Adaptable<'_>> {
        let experts = [&self.gate_up, &self.down].map(Adaptable::Experts);
        let shared = self.shared.iter().flat_map(SharedExpert::groups).map(Adaptable::Linears);
        [Adaptable::Linears(&self.router)].into_iter().chain(experts).chain(shared).collect()
    }

    /// Returns the same as [`adaptable`](Self::adaptable), mutably.
    pub fn adaptable_mut(&mut self) -> Vec<AdaptableMut<'_>> {
        let experts = [&mut self.gate_up, &mut self.down].map(AdaptableMut::Experts);
        let shared = self.shared.iter_mut().flat_map(SharedExpert::groups_mut).map(AdaptableMut::Linears);
        [AdaptableMut::Linears(&mut self.router)].into_iter().chain(experts).chain(shared).collect()
    }

    /// Columns that x should have room for.
    pub(super) fn input_room(&self) -> usize {
        self.router.room().max(self.shared.as_ref().map_or(0, SharedExpert::input_room))
    }

    /// Columns that the gradient to the result should have room for.
    pub(super) fn output_room(&self) -> usize {
        self.shared.as_ref().map_or(0, SharedExpert::output_room)
    }

    /// Returns the result for x, added to `onto` if there is one.
    pub fn forward(&self, ctx: Context<'_>, x: Tensor<2>, onto: Option<&Tensor<2>>) -> (Tensor<2>, MoeSaved) {
        let (logits, router) = single(self.router.forward(ctx.linear(), &x));
        let routed = Routed { router, routing: routing::forward(logits, self.top_k, self.form) };
        let dispatch = &routed.routing.dispatch;
        let (gate_up, gate_up_saved) = self.gate_up.forward(ctx.linear(), GroupedRows::Tokens(&x), dispatch);
        let act = expert_act::forward(&gate_up, &routed.routing.weights, dispatch);
        let (rows, down) = self.down.forward(ctx.linear(), GroupedRows::Sorted(&act), dispatch);
        drop(act);
        let y = routing::sum_slots(&rows, dispatch, onto);
        drop(rows);
        let (y, shared) = match &self.shared {
            None => (y, None),
            Some(shared) => {
                let (y, saved) = shared.forward_onto(ctx, &x, &y);
                (y, Some(saved))
            }
        };
        let x = Some(x).filter(|_| self.keeps_input());
        (y, MoeSaved { x, routed, gate_up_saved, gate_up, down, shared })
    }

    /// Returns what [`forward`](Self::forward) saved, from the part that was kept.
    pub(super) fn resume(&self, ctx: Context<'_>, x: Tensor<2>, kept: MoeCheckpoint) -> MoeSaved {
        let MoeCheckpoint { routed, down, shared: kept } = kept;
        let dispatch = &routed.routing.dispatch;
        let (gate_up, gate_up_saved) = self.gate_up.forward(ctx.linear(), GroupedRows::Tokens(&x), dispatch);
        let shared = self.shared.as_ref().zip(kept).map(|(shared, kept)| shared.resume(ctx, &x, kept));
        let x = Some(x).filter(|_| self.keeps_input());
        MoeSaved { x, routed, gate_up_saved, gate_up, down, shared }
    }

    /// Adds the gradients of what is trained and returns that to x, which `x` makes where it was not kept.
    pub fn backward(
        &self,
        ctx: Context<'_>,
        grads: &mut Grads,
        saved: MoeSaved,
        dy: &Tensor<2>,
        x: impl FnOnce() -> Tensor<2>,
    ) -> Tensor<2> {
        let MoeSaved { x: kept, routed, gate_up_saved, gate_up, down, shared } = saved;
        let Routed { router, routing } = routed;
        let (dispatch, dys) = (&routing.dispatch, GroupedRows::Tokens(dy));
        let (dact, pending) = self.down.backward_input(ctx.linear(), dys, dispatch);
        let ExpertActGrads { gate_up: dgate_up, act, weights: dweights } =
            expert_act::backward(dact, gate_up, &routing.weights, dispatch);
        self.down.backward_params(grads, GroupedRows::Sorted(&act), &down, dys, &pending, dispatch);
        drop((act, down, pending));

        let x = kept.unwrap_or_else(x);
        let dgate_up = GroupedRows::Sorted(&dgate_up);
        let (drows, pending) = self.gate_up.backward_input(ctx.linear(), dgate_up, dispatch);
        let rows = GroupedRows::Tokens(&x);
        self.gate_up.backward_params(grads, rows, &gate_up_saved, dgate_up, &pending, dispatch);
        drop((gate_up_saved, pending));
        let dx = routing::sum_slots(&drows, dispatch, None);
        drop(drows);

        let dlogits = routing::backward(&routing, &dweights);
        let through_router =
            self.router.backward(ctx.linear(), grads, &x, &router, &[dlogits], true).expect("asked for");
        let dx = dx.plus(&through_router);
        match self.shared.as_ref().zip(shared) {
            None => dx,
            Some((shared, saved)) => dx.plus(&shared.backward(ctx, grads, saved, dy, &x)),
        }
    }

    fn keeps_input(&self) -> bool {
        self.router.keeps_input() || self.shared.as_ref().is_some_and(SharedExpert::keeps_input)
    }
}

impl LayerBuilder<'_> {
    /// A projection of all experts.
    fn experts(&mut self, spec: &MoeSpec, stack: ExpertStack, hidden_size: usize) -> Result<ExpertLinear, Error> {
        let weight = self.stacked(spec, stack, hidden_size)?;
        Ok(ExpertLinear::new(expert_names(self.names, self.layer, spec, stack, hidden_size), spec.experts, weight))
    }
}

/// The names of a projection of the experts of a layer.
pub(crate) fn expert_names(
    names: &crate::families::TensorNames,
    layer: usize,
    spec: &MoeSpec,
    stack: ExpertStack,
    hidden_size: usize,
) -> ExpertNames {
    let [out, _] = spec.expert_shape(stack, hidden_size);
    let outputs: Vec<_> = stack.roles().iter().map(|&role| ((names.experts.linear)(role), out)).collect();
    let joined = match stack {
        ExpertStack::GateUp => "gate_up_proj",
        ExpertStack::Down => outputs[0].0,
    };
    let parameter = names.tensor(crate::Role::Layer(layer, LayerRole::Experts(stack)));
    ExpertNames { module: names.experts(layer), outputs, joined, parameter }
}
