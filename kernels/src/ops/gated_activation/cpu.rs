//! Gated activations over slices; the formulas stand in [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{Activation, GELU_BOUND, GELU_CUBE, GELU_SLOPE};
use crate::host::exp::{exp, sigmoid};
use crate::host::{CHUNK, View, from_vec, into_vec, simd};

/// `g·σ(z(g))`, the factor of up, with its derivative; and what up is before that product, with 0 or 1 for its own.
trait Gate: Copy + Sync {
    /// `(g, z(g), g·z′(g))`, g as it enters the product.
    fn gate(self, g: f32) -> (f32, f32, f32);

    /// 1 − σ, from e = e^−z and σ = 1 / (1 + e), without cancellation.
    #[inline(always)]
    fn complement(self, e: f32, sig: f32) -> f32 {
        e * sig
    }

    /// True if the gradient reaches g.
    #[inline(always)]
    fn passes(self, _g: f32) -> bool {
        true
    }

    /// Up as it enters the product, and the derivative of that.
    #[inline(always)]
    fn up(self, u: f32) -> (f32, f32) {
        (u, 1.0)
    }
}

#[derive(Clone, Copy)]
struct Silu;

#[derive(Clone, Copy)]
struct GeluTanh;

#[derive(Clone, Copy)]
struct Clamped {
    alpha: f32,
    limit: f32,
}

impl Gate for Silu {
    #[inline(always)]
    fn gate(self, g: f32) -> (f32, f32, f32) {
        (g, g, g)
    }

    /// The plain difference: it is added to 1 / g, and PyTorch computes it so.
    #[inline(always)]
    fn complement(self, _e: f32, sig: f32) -> f32 {
        1.0 - sig
    }
}

impl Gate for GeluTanh {
    #[inline(always)]
    fn gate(self, g: f32) -> (f32, f32, f32) {
        let b = g.clamp(-GELU_BOUND, GELU_BOUND);
        let square = b * b;
        (g, GELU_SLOPE * b * (1.0 + GELU_CUBE * square), GELU_SLOPE * b * (1.0 + 3.0 * GELU_CUBE * square))
    }
}

impl Gate for Clamped {
    #[inline(always)]
    fn gate(self, g: f32) -> (f32, f32, f32) {
        let g = g.min(self.limit);
        (g, self.alpha * g, self.alpha * g)
    }

    #[inline(always)]
    fn passes(self, g: f32) -> bool {
        g <= self.limit
    }

    #[inline(always)]
    fn up(self, u: f32) -> (f32, f32) {
        (u.clamp(-self.limit, self.limit) + 1.0, if u.abs() <= self.limit { 1.0 } else { 0.0 })
    }
}

pub(crate) fn forward(activation: Activation, gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    match activation {
        Activation::Silu => forward_with(Silu, gate, up),
        Activation::GeluTanh => forward_with(GeluTanh, gate, up),
        Activation::ClampedSwiglu { alpha, limit } => forward_with(Clamped { alpha, limit }, gate, up),
    }
}

pub(crate) fn backward(
    activation: Activation,
    dact: &Tensor<2>,
    gate: Tensor<2>,
    up: Tensor<2>,
) -> (Tensor<2>, Tensor<2>) {
    match activation {
        Activation::Silu => backward_with(Silu, dact, gate, up),
        Activation::GeluTanh => backward_with(GeluTanh, dact, gate, up),
        Activation::ClampedSwiglu { alpha, limit } => backward_with(Clamped { alpha, limit }, dact, gate, up),
    }
}

fn forward_with(by: impl Gate, gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    let shape = gate.dims();
    let (gate, up) = (View::of(gate), View::of(up));
    let (gate, up) = (gate.as_slice(), up.as_slice());
    let mut act = vec![0.0; gate.len()];
    act.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK))).for_each(|(act, (gate, up))| {
        simd(
            #[inline(always)]
            || {
                for ((a, &g), &u) in act.iter_mut().zip(gate).zip(up) {
                    let (g, z, _) = by.gate(g);
                    *a = g * sigmoid(z) * by.up(u).0;
                }
            },
        );
    });
    from_vec(act, shape)
}

fn backward_with(by: impl Gate, dact: &Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
    let shape = gate.dims();
    let dact = View::of(dact);
    let dact = dact.as_slice();
    let (mut gate, mut up) = (into_vec(gate), into_vec(up));
    gate.par_chunks_mut(CHUNK).zip(up.par_chunks_mut(CHUNK)).zip(dact.par_chunks(CHUNK)).for_each(
        |((gate, up), dact)| {
            simd(
                #[inline(always)]
                || {
                    for ((gate, up), &d) in gate.iter_mut().zip(up).zip(dact) {
                        let (g, z, along) = by.gate(*gate);
                        let (u, du) = by.up(*up);
                        let e = exp(-z);
                        let sig = 1.0 / (1.0 + e);
                        let dgate = d * u * sig * (1.0 + along * by.complement(e, sig));
                        *gate = if by.passes(*gate) { dgate } else { 0.0 };
                        *up = d * g * sig * du;
                    }
                },
            );
        },
    );
    (from_vec(gate, shape), from_vec(up, shape))
}
