//! Gated activations in Burn ops; the formulas stand in [`super`].

use burn::tensor::activation::sigmoid;
use burn::tensor::{DType, Tensor};

use super::{Activation, GELU_BOUND, GELU_CUBE, GELU_SLOPE};

pub(crate) fn forward(activation: Activation, gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    if activation == Activation::Silu {
        return gate.clone() * sigmoid(gate.clone()) * up.clone();
    }
    let dtype = gate.dtype();
    let Product { gate, up, z, .. } =
        Product::of(activation, gate.clone().cast(DType::F32), up.clone().cast(DType::F32));
    let share = match activation {
        // σ(z), in the form whose derivative has the smaller error in autodiff.
        Activation::GeluTanh => ((z * 0.5).tanh() + 1.0) * 0.5,
        Activation::Silu | Activation::ClampedSwiglu { .. } => sigmoid(z),
    };
    (gate * share * up).cast(dtype)
}

pub(crate) fn backward(
    activation: Activation,
    dact: &Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
) -> (Tensor<2>, Tensor<2>) {
    if activation == Activation::Silu {
        return gradients(dact.clone(), Product::silu(gate, up), Complement::Difference);
    }
    let dtype = gate.dtype();
    let (gate, up) = (gate.cast(DType::F32), up.cast(DType::F32));
    let product = Product::of(activation, gate.clone(), up.clone());
    let (mut dgate, mut dup) = gradients(dact.clone().cast(DType::F32), product, Complement::Sigmoid);
    if let Activation::ClampedSwiglu { limit, .. } = activation {
        dgate = dgate.mask_fill(gate.greater_elem(limit), 0.0);
        dup = dup.mask_fill(up.abs().greater_elem(limit), 0.0);
    }
    (dgate.cast(dtype), dup.cast(dtype))
}

/// g·σ(z) ∘ u.
struct Product {
    gate: Tensor<2>,
    up: Tensor<2>,
    z: Tensor<2>,
    /// g·z′(g).
    along: Tensor<2>,
}

impl Product {
    fn of(activation: Activation, gate: Tensor<2>, up: Tensor<2>) -> Self {
        match activation {
            Activation::Silu => Self::silu(gate, up),
            Activation::GeluTanh => {
                let bounded = gate.clone().clamp(-GELU_BOUND, GELU_BOUND);
                let square = bounded.clone().powi_scalar(2) * GELU_CUBE;
                let along = bounded.clone() * (square.clone() * 3.0 + 1.0) * GELU_SLOPE;
                Self { gate, up, z: bounded * (square + 1.0) * GELU_SLOPE, along }
            }
            Activation::ClampedSwiglu { alpha, limit } => {
                let gate = gate.clamp_max(limit);
                let z = gate.clone() * alpha;
                Self { gate, up: up.clamp(-limit, limit) + 1.0, z: z.clone(), along: z }
            }
        }
    }

    fn silu(gate: Tensor<2>, up: Tensor<2>) -> Self {
        Self { z: gate.clone(), along: gate.clone(), gate, up }
    }
}

/// The computation of 1 − σ(z).
#[derive(Clone, Copy)]
enum Complement {
    /// As PyTorch computes it for SiLU.
    Difference,
    /// σ(−z), without cancellation.
    Sigmoid,
}

/// The gradients to g and u.
fn gradients(
    dact: Tensor<2>,
    Product { gate, up, z, along }: Product,
    complement: Complement,
) -> (Tensor<2>, Tensor<2>) {
    let sig = sigmoid(z.clone());
    let rest = match complement {
        Complement::Difference => sig.clone().neg() + 1.0,
        Complement::Sigmoid => sigmoid(z.neg()),
    };
    let act = gate * sig.clone();
    let slope = sig * (along * rest + 1.0);
    (dact.clone() * up * slope, dact * act)
}
