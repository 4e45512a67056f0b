//! An operation as one node of Burn's autodiff graph.

use core::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use burn::backend::autodiff::checkpoint::base::Checkpointer;
use burn::backend::autodiff::checkpoint::strategy::{BalancedCheckpointing, CheckpointStrategy, NoCheckpointing};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, NodeGuard, Ops, OpsKind};
use burn::backend::tensor::FloatTensor;
use burn::backend::{
    Autodiff, AutodiffBackend, Backend, BackendTensor, DispatchAutodiffContext, DispatchKindConversion, DispatchTensor,
    DispatchTensorKind, Flex,
};
use burn::tensor::{GradientCheckpointingStrategy, Tensor as BurnTensor};

/// The backward of an operation with `N` inputs: from the gradient of the result to the gradients of the inputs. It runs
/// at most once.
pub(crate) type Pullback<const N: usize> = Box<dyn FnOnce(DispatchTensor) -> Inputs<N> + Send>;

/// The inputs of an operation; `None` for one that it does not have, such as a bias.
pub(crate) type Inputs<const N: usize> = [Option<DispatchTensor>; N];

/// Runs `forward` on the plain tensors of `inputs` and records its result as one node. The second argument of `forward`
/// says which inputs get a gradient; without any, the backward is dropped.
///
/// The closures see no autodiff tensors: the node's backward runs while the graph is locked.
///
/// # Panics
/// If the inputs are not floats of one device, or their autodiff contexts differ.
pub(crate) fn record<const N: usize>(
    inputs: Inputs<N>,
    forward: impl FnOnce(Inputs<N>, [bool; N]) -> (DispatchTensor, Pullback<N>),
) -> DispatchTensor {
    record_unread(inputs, |inputs, wanted| {
        #[cfg(feature = "burn-cuda")]
        let _prepared = crate::device::prepare(inputs.iter().flatten());
        forward(inputs, wanted)
    })
}

/// [`record`] for a `forward` that does not read the inputs.
pub(crate) fn record_unread<const N: usize>(
    inputs: Inputs<N>,
    forward: impl FnOnce(Inputs<N>, [bool; N]) -> (DispatchTensor, Pullback<N>),
) -> DispatchTensor {
    let context = inputs.iter().flatten().fold(DispatchAutodiffContext::Disabled, |all, t| all.merge(t.autodiff));
    let DispatchAutodiffContext::Enabled(strategy) = context else { return forward(inputs, [false; N]).0 };
    let kind = inputs.iter().flatten().find_map(|tensor| match &tensor.kind {
        DispatchTensorKind::Autodiff(inner) => Some(&**inner),
        _ => None,
    });
    #[allow(unreachable_patterns, reason = "Burn has more backends with more of its features")]
    match kind.expect("a context with autodiff comes from a tensor with a graph") {
        DispatchTensorKind::Flex(_) => on_backend::<Flex, N>(strategy, inputs, forward),
        #[cfg(any(feature = "wgpu", feature = "burn-cuda"))]
        DispatchTensorKind::Cube(_) => on_backend::<burn::backend::Cube, N>(strategy, inputs, forward),
        _ => panic!(
            "rekindle-burn has no autodiff on this backend; use the device flex, or turn on the feature `wgpu` or \
             `burn-cuda` of rekindle-burn for wgpu or CUDA"
        ),
    }
}

/// The backward of [`record_any`]: the gradients of all inputs.
pub(crate) type ManyPullback = Box<dyn FnOnce(DispatchTensor) -> Vec<Option<DispatchTensor>> + Send>;

/// The inputs of a node of [`record_any`]. The last one stands for the inputs beyond.
const SLOTS: usize = 32;

/// Records `forward` as a function of any number of inputs, which it has already. The backward is called if any of them
/// gets a gradient.
///
/// Burn's nodes have a fixed number of inputs. Those beyond it are inputs of a further node, which takes their gradients
/// from where the backward has put them.
pub(crate) fn record_any(
    mut inputs: Vec<DispatchTensor>,
    forward: Box<dyn FnOnce() -> (DispatchTensor, ManyPullback)>,
) -> DispatchTensor {
    let further = (inputs.len() > SLOTS).then(|| inputs.split_off(SLOTS - 1));
    let direct = inputs.len();
    let gradients = Arc::new(Mutex::new(Vec::new()));
    let (further, token) = further
        .map(|further| {
            let device = BurnTensor::<1>::from_dispatch(further[0].clone()).device().without_autodiff();
            let token = BurnTensor::<1>::zeros([1], &device).into_dispatch();
            let (like, gradients) = (token.clone(), Arc::clone(&gradients));
            let pullback: ManyPullback = Box::new(move |_| core::mem::take(&mut *lock(&gradients)));
            let node = record_any(further, Box::new(move || (like, pullback)));
            (node, token)
        })
        .unzip();
    let mut inputs = inputs.into_iter().chain(further);
    record_unread::<SLOTS>(core::array::from_fn(|_| inputs.next()), move |_, _| {
        let (result, pullback) = forward();
        let pullback = move |gradient: DispatchTensor| {
            let mut all = pullback(gradient).into_iter();
            let mut own: Inputs<SLOTS> =
                core::array::from_fn(|slot| (slot < direct).then(|| all.next()).flatten().flatten());
            if let Some(token) = token {
                *lock(&gradients) = all.collect();
                own[direct] = Some(token);
            }
            own
        };
        (result, Box::new(pullback))
    })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn on_backend<B: Backend, const N: usize>(
    strategy: GradientCheckpointingStrategy,
    inputs: Inputs<N>,
    forward: impl FnOnce(Inputs<N>, [bool; N]) -> (DispatchTensor, Pullback<N>),
) -> DispatchTensor
where
    DispatchTensor: DispatchKindConversion<B>
        + DispatchKindConversion<Autodiff<B, NoCheckpointing>>
        + DispatchKindConversion<Autodiff<B, BalancedCheckpointing>>,
{
    match strategy {
        GradientCheckpointingStrategy::Disabled => record_on::<B, NoCheckpointing, N>(inputs, forward),
        GradientCheckpointingStrategy::Balanced => record_on::<B, BalancedCheckpointing, N>(inputs, forward),
    }
}

fn record_on<B, C, const N: usize>(
    inputs: Inputs<N>,
    forward: impl FnOnce(Inputs<N>, [bool; N]) -> (DispatchTensor, Pullback<N>),
) -> DispatchTensor
where
    B: Backend,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B, C>>,
{
    let parts = inputs.map(|input| input.map(parts::<B, C>));
    let some = parts.iter().flatten().next().expect("an operation has an input").0.clone();
    let mut guards: Vec<NodeGuard> = Vec::with_capacity(N);
    let mut is_tracked = [false; N];
    let mut tracked = is_tracked.iter_mut();
    let values = parts.map(|part| {
        // Burn wants a node for each input; a missing one is a constant.
        let (value, node) = match part {
            Some((value, guard, is_tracked)) => (Some(value), (guard, is_tracked)),
            None => (None, (Autodiff::<B, C>::from_inner(some.clone()).into_parts().1, false)),
        };
        guards.push(node.0);
        *tracked.next().expect("one flag for each input") = node.1;
        value.map(wrap::<B>)
    });
    let Ok(guards) = <[NodeGuard; N]>::try_from(guards) else { unreachable!("a guard for each input") };
    let result = match Backward::<B, N>::prepare::<C>(Pair, guards).compute_bound().stateful() {
        OpsKind::Tracked(node) => {
            let (result, pullback) = forward(values, is_tracked);
            node.finish(OnceState(Arc::new(Mutex::new(Some(pullback)))), unwrap::<B>(result))
        }
        OpsKind::UnTracked(node) => node.finish(unwrap::<B>(forward(values, is_tracked).0)),
    };
    <DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::from_backend(BackendTensor::Float(result))
}

/// The backward step of every operation of this crate.
#[derive(Debug)]
struct Pair;

/// A pullback behind the `Clone` that Burn asks of a state.
struct OnceState<const N: usize>(Arc<Mutex<Option<Pullback<N>>>>);

impl<const N: usize> Clone for OnceState<N> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<const N: usize> fmt::Debug for OnceState<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OnceState({N} inputs)")
    }
}

impl<B, const N: usize> Backward<B, N> for Pair
where
    B: Backend,
    DispatchTensor: DispatchKindConversion<B>,
{
    type State = OnceState<N>;

    fn backward(self, ops: Ops<Self::State, N>, grads: &mut Gradients, _: &mut Checkpointer) {
        let gradient = wrap::<B>(grads.consume::<B>(&ops.node));
        let pullback = lock(&ops.state.0).take();
        let pullback = pullback.expect("Burn takes a step from its graph when it runs it");
        for (parent, gradient) in ops.parents.into_iter().zip(pullback(gradient)) {
            if let (Some(parent), Some(gradient)) = (parent, gradient) {
                grads.register::<B>(parent.id, unwrap::<B>(gradient));
            }
        }
    }
}

/// The plain tensor, its place in the graph, and whether it gets a gradient; a tensor without a graph is a constant.
fn parts<B, C>(tensor: DispatchTensor) -> (FloatTensor<B>, NodeGuard, bool)
where
    B: Backend,
    C: CheckpointStrategy,
    DispatchTensor: DispatchKindConversion<B> + DispatchKindConversion<Autodiff<B, C>>,
{
    if tensor.autodiff == DispatchAutodiffContext::Disabled {
        let (value, guard) = Autodiff::<B, C>::from_inner(unwrap::<B>(tensor)).into_parts();
        return (value, guard, false);
    }
    match <DispatchTensor as DispatchKindConversion<Autodiff<B, C>>>::try_into_backend(tensor) {
        Ok(BackendTensor::Float(tensor)) => {
            let is_tracked = tensor.is_tracked();
            let (value, guard) = tensor.into_parts();
            (value, guard, is_tracked)
        }
        Ok(other) => panic!("an operation of rekindle-burn takes float tensors, not {}", other.name()),
        Err(reason) => panic!("the tensors of an operation must be on the same device: {reason}"),
    }
}

fn wrap<B: Backend>(tensor: FloatTensor<B>) -> DispatchTensor
where
    DispatchTensor: DispatchKindConversion<B>,
{
    <DispatchTensor as DispatchKindConversion<B>>::from_backend(BackendTensor::Float(tensor))
}

fn unwrap<B: Backend>(tensor: DispatchTensor) -> FloatTensor<B>
where
    DispatchTensor: DispatchKindConversion<B>,
{
    match <DispatchTensor as DispatchKindConversion<B>>::try_into_backend(tensor) {
        Ok(BackendTensor::Float(tensor)) => tensor,
        Ok(other) => panic!("an operation of rekindle-burn takes float tensors, not {}", other.name()),
        Err(reason) => panic!("the tensors of an operation must be on the same device: {reason}"),
    }
}
