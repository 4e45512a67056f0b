//! Kernels on wgpu; the formulas stand in [`super`]. Everything is `f32`.
//!
//! A unit computes one element. Bytes an element: forward 3 × 4, backward 6 × 4, each in one launch, where Burn's operations
//! take 8 and 23 launches for SwiGLU and write every factor.

use cubecl::prelude::*;

use super::{Activation, GELU_BOUND, GELU_CUBE, GELU_SLOPE};
use crate::Tensor;
use crate::tensor::wgpu::{arg, buffer, cubes, empty, result};

/// Units of a workgroup.
const UNITS: u32 = 256;

/// [`super::forward`].
pub(super) fn forward(activation: Activation, gate: &Tensor<2>, up: &Tensor<2>) -> Option<Tensor<2>> {
    let shape = gate.dims();
    let elements = shape[0] * shape[1];
    let (gate, up) = (buffer(gate)?, buffer(up)?);
    let act = empty(&gate, shape);
    let (alpha, limit, form) = Form::of(activation);
    // SAFETY: the kernel reads and writes elements below `elements` alone.
    #[allow(unsafe_code)]
    unsafe {
        forward_kernel::launch_unchecked(
            &gate.client,
            cubes(elements.div_ceil(UNITS as usize)),
            CubeDim::new_1d(UNITS),
            arg(&gate),
            arg(&up),
            arg(&act),
            elements as u32,
            alpha,
            limit,
            form,
        );
    }
    Some(result(act))
}

/// [`super::backward`].
pub(super) fn backward(
    activation: Activation,
    dact: &Tensor<2>,
    gate: &Tensor<2>,
    up: &Tensor<2>,
) -> Option<(Tensor<2>, Tensor<2>, Tensor<2>)> {
    let shape = gate.dims();
    let elements = shape[0] * shape[1];
    let (dact, gate, up) = (buffer(dact)?, buffer(gate)?, buffer(up)?);
    let [dgate, dup, act] = [(); 3].map(|()| empty(&gate, shape));
    let (alpha, limit, form) = Form::of(activation);
    // SAFETY: as above.
    #[allow(unsafe_code)]
    unsafe {
        backward_kernel::launch_unchecked(
            &gate.client,
            cubes(elements.div_ceil(UNITS as usize)),
            CubeDim::new_1d(UNITS),
            arg(&dact),
            arg(&gate),
            arg(&up),
            arg(&dgate),
            arg(&dup),
            arg(&act),
            elements as u32,
            alpha,
            limit,
            form,
        );
    }
    Some((result(dgate), result(dup), result(act)))
}

/// [`Activation`] without its numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Form {
    Silu,
    GeluTanh,
    ClampedSwiglu,
}

impl Form {
    fn of(activation: Activation) -> (f32, f32, Self) {
        match activation {
            Activation::Silu => (1.0, 0.0, Self::Silu),
            Activation::GeluTanh => (1.0, 0.0, Self::GeluTanh),
            Activation::ClampedSwiglu { alpha, limit } => (alpha, limit, Self::ClampedSwiglu),
        }
    }
}

#[cube(launch_unchecked)]
fn forward_kernel(
    gate: &[f32],
    up: &[f32],
    act: &mut [f32],
    elements: u32,
    alpha: f32,
    limit: f32,
    #[comptime] form: Form,
) {
    let i = CUBE_POS * UNITS as usize + UNIT_POS as usize;
    if i < elements as usize {
        let g = bounded_gate(gate[i], limit, form);
        let z = exponent(g, alpha, form);
        act[i] = g * sigmoid(z) * factor(up[i], limit, form);
    }
}

#[cube(launch_unchecked)]
fn backward_kernel(
    dact: &[f32],
    gate: &[f32],
    up: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
    act: &mut [f32],
    elements: u32,
    alpha: f32,
    limit: f32,
    #[comptime] form: Form,
) {
    let i = CUBE_POS * UNITS as usize + UNIT_POS as usize;
    if i < elements as usize {
        let g = bounded_gate(gate[i], limit, form);
        let u = factor(up[i], limit, form);
        let z = exponent(g, alpha, form);
        let share = sigmoid(z);
        let slope = share * (1.0 + along(g, alpha, form) * sigmoid(-z));
        let mut to_gate = dact[i] * u * slope;
        let mut to_up = dact[i] * (g * share);
        if comptime!(form == Form::ClampedSwiglu) {
            to_gate = select(gate[i] > limit, 0.0, to_gate);
            to_up = select(up[i].abs() > limit, 0.0, to_up);
        }
        dgate[i] = to_gate;
        dup[i] = to_up;
        act[i] = g * share * u;
    }
}

/// The gate, clamped where its activation does that.
#[cube]
fn bounded_gate(gate: f32, limit: f32, #[comptime] form: Form) -> f32 {
    if comptime!(form == Form::ClampedSwiglu) { gate.min(limit) } else { gate }
}

/// The factor on the activated gate.
#[cube]
fn factor(up: f32, limit: f32, #[comptime] form: Form) -> f32 {
    if comptime!(form == Form::ClampedSwiglu) { up.max(-limit).min(limit) + 1.0 } else { up }
}

/// z(g).
#[cube]
fn exponent(gate: f32, alpha: f32, #[comptime] form: Form) -> f32 {
    if comptime!(form == Form::GeluTanh) {
        let g = gate.clamp(-GELU_BOUND, GELU_BOUND);
        g * (g * g * GELU_CUBE + 1.0) * GELU_SLOPE
    } else {
        gate * alpha
    }
}

/// g·z′(g).
#[cube]
fn along(gate: f32, alpha: f32, #[comptime] form: Form) -> f32 {
    if comptime!(form == Form::GeluTanh) {
        let g = gate.clamp(-GELU_BOUND, GELU_BOUND);
        g * (g * g * GELU_CUBE * 3.0 + 1.0) * GELU_SLOPE
    } else {
        gate * alpha
    }
}

#[cube]
fn sigmoid(z: f32) -> f32 {
    1.0 / (1.0 + (-z).exp())
}
