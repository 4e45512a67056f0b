//! Mixtures of experts.

use rekindle_kernels::expert_act::{self, ClampedSwiglu, ExpertActGrads, ExpertActivation};
use rekindle_kernels::grouped::GroupedRows;
use rekindle_kernels::routing::{self, Routing, RoutingForm};
use rekindle_kernels::{Grads, Params, Tensor, Weight, matmul, router_probabilities};
use rekindle_lora::{Adaptable, AdaptableMut, ExpertLinear, ExpertNames, ExpertSaved, LinearGroup, LinearSaved};

use super::attention::{single, visit_linears};
use super::shared_expert::{SharedExpert, SharedExpertSaved};
use super::{Context, LayerBuilder, VisitWeights};
use crate::parameters::{ExpertStack, LayerRole, LinearRole};
use crate::router_loss::RouterLoad;
use crate::spec::{Activation, MoeSpec};
use crate::{Error, RouterPass};

/// A mixture of experts: y = Σ_slot w·down_e(silu(gate_e(x)) ∘ up_e(x)) over the experts e that the router chooses for a
/// token, plus the expert that every token uses where there is one.
///
/// The router's weight w multiplies silu(gate) ∘ up, which is the same since down is linear: the results of down are then
/// summed as they are, and the gradient to w needs none of them.
///
/// gpt-oss has biases and a clamped activation in the place of silu(gate) ∘ up ([`ExpertActivation::ClampedSwiglu`]). Those
/// of down add Σ_slot w·b_e, which is the product of w, spread over all experts, and the matrix of biases.
///
/// # Shapes
/// x and the result `[tokens, hidden]`; the rows of experts `[tokens · top_k, …]` in the order of the experts.
///
/// # Gradients
/// To x, to what is trained, and through w and the auxiliary loss to the router. Saved: the routing, gate and up, and x·Aᵀ
/// of every adapter, and for the auxiliary loss the logits; silu(gate) ∘ up is recomputed. x is kept only where an adapter's
/// x·Aᵀ shares its memory.
///
/// Equal to transformers' `Qwen3MoeSparseMoeBlock`, `Qwen2MoeSparseMoeBlock`, `MixtralSparseMoeBlock` and `GptOssMLP` in
/// f32; in 16 bits those round w and multiply after down.
#[derive(Clone, Debug)]
pub struct Moe {
    /// The logits of the experts.
    pub router: LinearGroup,
    /// Gate and up of all experts.
    pub gate_up: ExpertLinear,
    /// Back from all experts.
    pub down: ExpertLinear,
    /// Biases and the clamped activation, for experts that have them.
    pub clamped: Option<ClampedExperts>,
    /// The expert that every token uses.
    pub shared: Option<SharedExpert>,
    /// Experts of each token.
    pub top_k: usize,
    /// The formula of the weights from the logits.
    pub form: RoutingForm,
}

/// The biases of experts, and the numbers of their clamped activation.
#[derive(Clone, Debug)]
pub struct ClampedExperts {
    /// Biases of gate and up, `[experts, 2 · intermediate]`.
    pub gate_up_bias: Weight,
    /// Biases of down, `[experts, hidden]`.
    pub down_bias: Weight,
    alpha: f32,
    limit: f32,
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
    /// The logits, for the auxiliary loss.
    logits: Option<Tensor<2>>,
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
    /// Adds the router's choice and its logits to the sums of the auxiliary loss, if the logits were saved.
    pub(super) fn add_to(&self, load: &mut RouterLoad) {
        if let Some(logits) = &self.routed.logits {
            load.add(logits, &self.routed.routing.dispatch);
        }
    }

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
        let Self { routed, down, shared } = self;
        let routed = Routed { router: routed.router.detached(), ..routed };
        Self { routed, down, shared: shared.map(LinearSaved::detached) }
    }
}

impl Moe {
    pub(crate) fn build(builder: &mut LayerBuilder<'_>, spec: &MoeSpec, hidden_size: usize) -> Result<Self, Error> {
        let router = builder.linears(&[spec.router(hidden_size)])?;
        let gate_up = builder.experts(spec, ExpertStack::GateUp, hidden_size)?;
        let gate_up_bias = builder.expert_bias(spec, ExpertStack::GateUp, hidden_size)?;
        let down = builder.experts(spec, ExpertStack::Down, hidden_size)?;
        let down_bias = builder.expert_bias(spec, ExpertStack::Down, hidden_size)?;
        let clamped = match (spec.activation, gate_up_bias, down_bias) {
            (Activation::ClampedSwiglu { alpha, limit }, Some(gate_up_bias), Some(down_bias)) => {
                Some(ClampedExperts { gate_up_bias, down_bias, alpha: alpha as f32, limit: limit as f32 })
            }
            _ => None,
        };
        let shared = spec.shared.map(|shared| SharedExpert::build(builder, &shared, hidden_size)).transpose()?;
        Ok(Self { router, gate_up, down, clamped, shared, top_k: spec.top_k, form: spec.routing })
    }

    /// Visits the weights.
    pub fn visit<'a>(&'a self, visit: VisitWeights<'_, 'a>) {
        visit_linears(&self.router, &[LinearRole::Router], visit);
        visit(LayerRole::Experts(ExpertStack::GateUp), &self.gate_up.weight);
        if let Some(clamped) = &self.clamped {
            visit(LayerRole::ExpertBias(ExpertStack::GateUp), &clamped.gate_up_bias);
        }
        visit(LayerRole::Experts(ExpertStack::Down), &self.down.weight);
        if let Some(clamped) = &self.clamped {
            visit(LayerRole::ExpertBias(ExpertStack::Down), &clamped.down_bias);
        }
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
        let kept = Some(&logits).filter(|_| ctx.router != RouterPass::Off).cloned();
        let routed = Routed { router, routing: routing::forward(logits, self.top_k, self.form), logits: kept };
        let dispatch = &routed.routing.dispatch;
        let (gate_up, gate_up_saved) = self.gate_up.forward(ctx.linear(), GroupedRows::Tokens(&x), dispatch);
        let bias = self.gate_up_bias(ctx.params);
        let act = expert_act::forward(&gate_up, &routed.routing.weights, dispatch, self.activation(bias.as_ref()));
        let (rows, down) = self.down.forward(ctx.linear(), GroupedRows::Sorted(&act), dispatch);
        drop(act);
        let mut y = routing::sum_slots(&rows, dispatch, onto);
        drop(rows);
        if let Some(ClampedExperts { down_bias, .. }) = &self.clamped {
            let w = routing::spread(&routed.routing.weights, dispatch, y.dtype()); // [tokens, experts]
            y = down_bias.nn(ctx.params, &w, Some(y));
        }
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
        let Routed { router, routing, logits } = routed;
        let (dispatch, dys) = (&routing.dispatch, GroupedRows::Tokens(dy));
        let (dact, pending) = self.down.backward_input(ctx.linear(), dys, dispatch);
        let bias = self.gate_up_bias(ctx.params);
        let ExpertActGrads { gate_up: dgate_up, act, weights: mut dweights } =
            expert_act::backward(dact, gate_up, &routing.weights, dispatch, self.activation(bias.as_ref()));
        if let Some(clamped) = &self.clamped {
            dweights = dweights.plus(&clamped.backward(ctx.params, grads, &routing, &dgate_up, dy));
        }
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

        let mut dlogits = routing::backward(&routing, &dweights);
        if let (RouterPass::Backward(coefficients), Some(logits)) = (ctx.router, logits) {
            dlogits = dlogits.plus(&router_probabilities::backward(&logits, coefficients));
        }
        let through_router =
            self.router.backward(ctx.linear(), grads, &x, &router, &[dlogits], true).expect("asked for");
        let dx = dx.plus(&through_router);
        match self.shared.as_ref().zip(shared) {
            None => dx,
            Some((shared, saved)) => dx.plus(&shared.backward(ctx, grads, saved, dy, &x)),
        }
    }

    fn gate_up_bias(&self, params: &Params) -> Option<Tensor<2>> {
        self.clamped.as_ref().map(|clamped| clamped.gate_up_bias.matrix(params))
    }

    fn activation<'a>(&self, bias: Option<&'a Tensor<2>>) -> ExpertActivation<'a> {
        match (&self.clamped, bias) {
            (&Some(ClampedExperts { alpha, limit, .. }), Some(bias)) => {
                ExpertActivation::ClampedSwiglu(ClampedSwiglu { alpha, limit, bias })
            }
            _ => ExpertActivation::Silu,
        }
    }

    fn keeps_input(&self) -> bool {
        self.router.keeps_input() || self.shared.as_ref().is_some_and(SharedExpert::keeps_input)
    }
}

impl ClampedExperts {
    /// Adds the gradients of biases that are trained, and returns that to the router's weights through those of down.
    fn backward(
        &self,
        params: &Params,
        grads: &mut Grads,
        routing: &Routing,
        dgate_up: &Tensor<2>,
        dy: &Tensor<2>,
    ) -> Tensor<2> {
        let Routing { weights, dispatch, .. } = routing;
        if let Some(at) = self.gate_up_bias.trained() {
            grads.add_expert_rows(at, dgate_up, dispatch);
        }
        if let Some(at) = self.down_bias.trained() {
            grads.add_tn(at, 1.0, &routing::spread(weights, dispatch, dy.dtype()), dy);
        }
        routing::pick(&matmul::nt(dy, &self.down_bias.matrix(params)), dispatch)
    }
}

impl LayerBuilder<'_> {
    /// The biases of a projection of all experts, if they have some.
    fn expert_bias(&mut self, spec: &MoeSpec, stack: ExpertStack, hidden: usize) -> Result<Option<Weight>, Error> {
        let shape = spec.expert_bias_shape(stack, hidden);
        spec.bias.then(|| self.weight(LayerRole::ExpertBias(stack), &shape)).transpose()
    }

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
    let outputs: Vec<_> = spec.roles(stack).iter().map(|&role| ((names.experts.linear)(role), out)).collect();
    let joined = match stack {
        ExpertStack::GateUp => names.experts.joined,
        ExpertStack::Down => outputs[0].0,
    };
    let parameter = names.tensor(crate::Role::Layer(layer, LayerRole::Experts(stack)));
    ExpertNames { module: names.experts(layer), outputs, joined, parameter }
}
