//! The gated activation SwiGLU.

use burn::config::Config;
use burn::module::Module;
use burn::tensor::Tensor;
use rekindle_kernels::gated_activation::{self, Activation};

use crate::device::{rows, unrows};
use crate::node::record;

/// Configuration of [`SwiGlu`], which has no options.
#[derive(Config, Debug)]
pub struct SwiGluConfig {}

impl SwiGluConfig {
    /// Creates the activation.
    pub fn init(&self) -> SwiGlu {
        SwiGlu {}
    }
}

/// The gated activation of a feed-forward block (Shazeer, arXiv:2002.05202): y = gate · σ(gate) ∘ up.
///
/// The three linears around it are the caller's; `burn::nn::SwiGlu` has two of them inside.
///
/// # Shapes
/// gate, up, y: one shape, any number of axes.
///
/// # Dtypes
/// Computed in `f32` on the CPU, rounded once.
///
/// # Gradients
/// To gate and up. Saved: gate and up, without σ(gate) and the product.
#[derive(Module, Debug)]
pub struct SwiGlu {}

impl SwiGlu {
    /// Returns y.
    ///
    /// # Panics
    /// If the shapes differ.
    pub fn forward<const D: usize>(&self, gate: Tensor<D>, up: Tensor<D>) -> Tensor<D> {
        let shape = gate.dims();
        assert_eq!(shape, up.dims(), "gate and up have one shape");
        Tensor::from_dispatch(record(
            [Some(gate.into_dispatch()), Some(up.into_dispatch())],
            move |inputs, [want_gate, want_up]| {
                let [Some(gate), Some(up)] = inputs else { unreachable!("both inputs were given") };
                let (gate, up) = (rows::<D>(gate), rows::<D>(up));
                let y = gated_activation::forward(Activation::Silu, &gate, &up, 0);
                let pullback = move |dy| {
                    let (dgate, dup, _) = gated_activation::backward(Activation::Silu, rows::<D>(dy), gate, up);
                    [want_gate.then(|| unrows(dgate, shape)), want_up.then(|| unrows(dup, shape))]
                };
                (unrows(y, shape), Box::new(pullback))
            },
        ))
    }
}
