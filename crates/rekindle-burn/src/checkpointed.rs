//! A module whose activations are recomputed in the backward.

mod replay;

use core::ops::Deref;

use burn::module::{
    Content, Devices, DisplaySettings, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::tensor::{Device, Tensor};

use replay::{Draws, Leaves, Origin, Parameters, Untracked, replay, untracked};

use crate::node::{ManyPullback, record_any};

/// A module that recomputes its activations in the backward (Chen et al., arXiv:1604.06174).
///
/// The forward keeps its inputs and drops everything between them and the result. The backward computes the module again
/// and differentiates that computation. A network of such blocks needs memory for the inputs of all blocks and the
/// activations of one, and computes every block twice.
///
/// The wrapper is transparent: paths, records and [`num_params`](Module::num_params) are those of the module, so
/// [`wrap`](crate::wrap), [`quantize`](crate::quantize) and records of the network without it work.
///
/// # Gradients
/// To the tensors passed to [`forward`](Self::forward) and to the parameters of the module, of any type. Saved: those
/// tensors. The result is one node of Burn's graph; with more than 31 tracked inputs and parameters, there is one more
/// node for each further 31.
///
/// # Randomness
/// A module with an enabled training flag, such as `burn::nn::Dropout`, draws the same numbers in both computations. To
/// this end, the forward and the backward seed the device with numbers drawn from it. Burn's generator belongs to the
/// process: no other thread may draw random numbers while such a module computes. State that a module changes while it
/// computes, such as the running statistics of a batch norm, changes twice.
///
/// ```
/// use burn::module::Module;
/// use burn::nn::{Linear, LinearConfig};
/// use burn::tensor::{Device, Tensor, activation};
/// use rekindle_burn::Checkpointed;
///
/// #[derive(Module, Debug)]
/// struct Mlp {
///     up: Linear,
///     down: Linear,
/// }
///
/// impl Mlp {
///     fn forward(&self, x: Tensor<2>) -> Tensor<2> {
///         self.down.forward(activation::gelu(self.up.forward(x)))
///     }
/// }
///
/// let device = Device::flex().autodiff();
/// let mlp = Mlp { up: LinearConfig::new(8, 32).init(&device), down: LinearConfig::new(32, 8).init(&device) };
/// let mlp = Checkpointed::new(mlp);
/// let y = mlp.forward(Tensor::ones([3, 8], &device), Mlp::forward);
/// let grads = y.sum().backward();
/// assert!(mlp.up.weight.val().grad(&grads).is_some());
/// ```
#[derive(Clone, Debug)]
pub struct Checkpointed<M: Module> {
    module: M,
}

impl<M: Module> Checkpointed<M> {
    /// Wraps a module.
    pub fn new(module: M) -> Self {
        Self { module }
    }

    /// Returns the module.
    pub fn into_inner(self) -> M {
        self.module
    }

    /// Returns `forward` of the module and `x`.
    ///
    /// `forward` must compute the same result when it is called again. Tensors that it captures are constants; they must
    /// not be part of an autodiff graph, which is locked while the backward runs. Pass such tensors to
    /// [`forward_all`](Self::forward_all).
    pub fn forward<const D: usize, const E: usize>(
        &self,
        x: Tensor<D>,
        forward: impl Fn(&M, Tensor<D>) -> Tensor<E> + Send + 'static,
    ) -> Tensor<E>
    where
        M: 'static,
    {
        self.forward_all([x], move |module, [x]| forward(module, x))
    }

    /// Returns `forward` of the module and several tensors, as [`forward`](Self::forward) does for one.
    pub fn forward_all<const N: usize, const D: usize, const E: usize>(
        &self,
        inputs: [Tensor<D>; N],
        forward: impl Fn(&M, [Tensor<D>; N]) -> Tensor<E> + Send + 'static,
    ) -> Tensor<E>
    where
        M: 'static,
    {
        let parameters = Parameters::of(&self.module);
        let of_inputs = inputs.iter().filter(|input| input.is_tracked()).map(|input| input.clone().into_dispatch());
        let parents: Vec<_> = of_inputs.chain(parameters.tracked.clone()).collect();
        if parents.is_empty() {
            return forward(&self.module, inputs);
        }
        let origins = inputs.each_ref().map(Origin::of);
        let inputs = inputs.map(untracked);
        let module = self.module.clone().map(&mut Untracked);
        let device = inputs.first().map(Tensor::device).or_else(|| module.devices().into_iter().next());
        let draws = device.filter(|_| parameters.has_training_flag).map(|device| Draws::new(&device));

        let forward = move || {
            let run = move |module: &M, inputs: [Tensor<D>; N], draws: &Option<Draws>| match draws {
                Some(draws) => draws.repeat(|| forward(module, inputs)),
                None => forward(module, inputs),
            };
            let result = run(&module, inputs.clone(), &draws).without_autodiff().into_dispatch();
            let pullback = move |gradient| {
                let mut leaves = Leaves::new(parameters.origins);
                let mut origins = origins.into_iter();
                let inputs = inputs.map(|input| leaves.leaf(input, origins.next().unwrap_or(Origin::Constant)));
                let module = module.map(&mut leaves);
                replay(run(&module, inputs, &draws), gradient, leaves)
            };
            let pullback: ManyPullback = Box::new(pullback);
            (result, pullback)
        };
        Tensor::from_dispatch(record_any(parents, Box::new(forward)))
    }
}

impl<M: Module> Deref for Checkpointed<M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.module
    }
}

impl<M: Module> Module for Checkpointed<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.module.collect_devices(devices)
    }

    fn fork(self, device: &Device) -> Self {
        Self::new(self.module.fork(device))
    }

    fn to_device(self, device: &Device) -> Self {
        Self::new(self.module.to_device(device))
    }

    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        self.module.visit(visitor);
    }

    fn map<P: ModuleMapper>(self, mapper: &mut P) -> Self {
        Self::new(self.module.map(mapper))
    }

    fn train(self) -> Self {
        Self::new(self.module.train())
    }

    fn valid(&self) -> Self {
        Self::new(self.module.valid())
    }

    fn materialize(self) -> Self {
        Self::new(self.module.materialize())
    }
}

impl<M: Module + ModuleDisplay> ModuleDisplayDefault for Checkpointed<M> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add("module", &self.module).optional()
    }
}

impl<M: Module + ModuleDisplay> ModuleDisplay for Checkpointed<M> {
    fn custom_settings(&self) -> Option<DisplaySettings> {
        self.module.custom_settings()
    }
}
