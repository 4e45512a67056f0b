//! The parts of computing a module twice: its parameters outside of the graph, as leaves of a new one, and its random
//! numbers.

use burn::backend::DispatchTensor;
use burn::module::{Flag, Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Device, Distribution, Gradients, Tensor};

use crate::node::record_unread;

/// The place of a tensor in the graph of the program.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Origin {
    /// Without a gradient.
    Constant,
    /// A leaf, which may be without a gradient.
    Leaf,
    /// The result of an operation, whose backward expects a gradient.
    Computed,
}

impl Origin {
    pub(super) fn of<const D: usize>(tensor: &Tensor<D>) -> Self {
        match (tensor.is_tracked(), tensor.is_require_grad()) {
            (false, _) => Self::Constant,
            (true, true) => Self::Leaf,
            (true, false) => Self::Computed,
        }
    }
}

/// The float parameters of a module, in the order of visitors.
#[derive(Default)]
pub(super) struct Parameters {
    /// Those that get a gradient.
    pub(super) tracked: Vec<DispatchTensor>,
    pub(super) origins: Vec<Origin>,
    /// True if a flag such as that of dropout is enabled.
    pub(super) has_training_flag: bool,
}

impl Parameters {
    pub(super) fn of<M: Module>(module: &M) -> Self {
        let mut parameters = Self::default();
        module.visit(&mut parameters);
        parameters
    }
}

impl ModuleVisitor for Parameters {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let tensor = param.base();
        self.origins.push(Origin::of(&tensor));
        if tensor.is_tracked() {
            self.tracked.push(tensor.into_dispatch());
        }
    }

    fn visit_flag(&mut self, flag: &Param<Flag>) {
        self.has_training_flag |= flag.is_enabled();
    }
}

/// Returns the tensor as a constant of a graph of its own. A tensor without autodiff stays without.
pub(super) fn untracked<const D: usize>(tensor: Tensor<D>) -> Tensor<D> {
    match tensor.gradient_checkpointing_strategy() {
        Some(strategy) => tensor.without_autodiff().autodiff().with_gradient_checkpointing_strategy(strategy),
        None => tensor,
    }
}

/// Replaces parameters by [`untracked`] ones.
pub(super) struct Untracked;

impl ModuleMapper for Untracked {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        param.map(untracked)
    }
}

/// Replaces untracked tensors by leaves of a new graph, and remembers them.
pub(super) struct Leaves {
    origins: std::vec::IntoIter<Origin>,
    gradients: Vec<GradientOf>,
}

/// Returns the gradient of a leaf.
type GradientOf = Box<dyn FnOnce(Option<&mut Gradients>) -> Option<DispatchTensor>>;

impl Leaves {
    /// `origins` are those of the parameters that are mapped.
    pub(super) fn new(origins: Vec<Origin>) -> Self {
        Self { origins: origins.into_iter(), gradients: Vec::new() }
    }

    /// Returns the tensor as a leaf, unless it is a constant.
    pub(super) fn leaf<const D: usize>(&mut self, tensor: Tensor<D>, origin: Origin) -> Tensor<D> {
        if origin == Origin::Constant {
            return tensor;
        }
        let leaf = tensor.require_grad();
        let of = leaf.clone();
        self.gradients.push(Box::new(move |gradients| {
            let gradient = gradients.and_then(|gradients| of.grad_remove(gradients));
            let zeros = || Tensor::zeros(of.dims(), (&of.device().without_autodiff(), of.dtype()));
            gradient.or_else(|| (origin == Origin::Computed).then(zeros)).map(Tensor::into_dispatch)
        }));
        leaf
    }
}

impl ModuleMapper for Leaves {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let origin = self.origins.next().unwrap_or(Origin::Constant);
        param.map(|tensor| self.leaf(tensor, origin))
    }
}

/// Differentiates `result` from its gradient, and returns the gradients of the leaves.
pub(super) fn replay<const E: usize>(
    result: Tensor<E>,
    gradient: DispatchTensor,
    leaves: Leaves,
) -> Vec<Option<DispatchTensor>> {
    let mut gradients = result.is_tracked().then(|| {
        let device = result.device().without_autodiff();
        // A root whose backward hands on the gradient, so that no product with it is needed.
        let root = record_unread([Some(result.into_dispatch())], move |_, _| {
            (Tensor::<1>::zeros([1], &device).into_dispatch(), Box::new(move |_| [Some(gradient)]))
        });
        Tensor::<1>::from_dispatch(root).backward()
    });
    leaves.gradients.into_iter().map(|of| of(gradients.as_mut())).collect()
}

/// Random numbers that are drawn twice.
pub(super) struct Draws {
    device: Device,
    seed: u64,
}

impl Draws {
    /// Draws a seed.
    pub(super) fn new(device: &Device) -> Self {
        Self { device: device.clone(), seed: seed_from(device) }
    }

    /// Computes something that draws numbers, the same in every call, and leaves the device at numbers that nothing has
    /// drawn before.
    pub(super) fn repeat<R>(&self, compute: impl FnOnce() -> R) -> R {
        let after = seed_from(&self.device);
        self.device.seed(self.seed);
        let result = compute();
        self.device.seed(after);
        result
    }
}

/// A seed from the random numbers of a device, which `Device::seed` determines.
fn seed_from(device: &Device) -> u64 {
    let halves = Tensor::<1>::random([2], Distribution::Uniform(0.0, 1.0), &device.clone().without_autodiff());
    let halves: Vec<f32> = halves.into_data_as::<f32>().try_into_vec().expect("cast to f32 just before");
    // Each has 24 random bits.
    halves.iter().fold(0, |seed, half| seed << 24 | (half * (1u32 << 24) as f32) as u64)
}
