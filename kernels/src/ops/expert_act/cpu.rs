//! The activation of experts over slices; the formulas stand in [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::{ClampedSwiglu, ExpertActivation};
use crate::host::exp::sigmoid;
use crate::host::{ROWS, View, for_rows, from_vec, into_vec, simd};
use crate::ops::routing::HostDispatch;

pub(super) fn forward(
    gate_up: &Tensor<2>,
    weights: &Tensor<2>,
    dispatch: &HostDispatch,
    activation: ExpertActivation<'_>,
) -> Tensor<2> {
    let [rows, both] = gate_up.dims();
    let width = both / 2;
    let (gate_up, weights) = (View::of(gate_up), View::of(weights));
    let (gate_up, weights) = (gate_up.as_slice(), weights.as_slice());
    let mut act = vec![0.0; rows * width];
    match activation {
        ExpertActivation::Silu => for_rows(
            &mut act,
            width,
            #[inline(always)]
            |first, out| {
                for (row, act) in (first..).zip(out.chunks_exact_mut(width)) {
                    let w = weights[dispatch.sorted[row] as usize];
                    let (gate, up) = gate_up[row * both..][..both].split_at(width);
                    for ((a, &g), &u) in act.iter_mut().zip(gate).zip(up) {
                        *a = w * (g * sigmoid(g) * u);
                    }
                }
            },
        ),
        ExpertActivation::ClampedSwiglu(form) => {
            let bias = View::of(form.bias.burn());
            let bias = bias.as_slice();
            for_rows(
                &mut act,
                width,
                #[inline(always)]
                |first, out| {
                    for (row, act) in (first..).zip(out.chunks_exact_mut(width)) {
                        let w = weights[dispatch.sorted[row] as usize];
                        let pairs = gate_up[row * both..][..both].as_chunks::<2>().0;
                        let bias = bias[dispatch.expert(row) * both..][..both].as_chunks::<2>().0;
                        for ((a, pair), bias) in act.iter_mut().zip(pairs).zip(bias) {
                            let Clamped { g, u, sig, .. } = form.clamped(pair, bias);
                            *a = w * (g * sig * (u + 1.0));
                        }
                    }
                },
            );
        }
    }
    from_vec(act, [rows, width])
}

/// The gradients to gate and up, act, and the gradient to w.
pub(super) fn backward(
    dact: Tensor<2>,
    gate_up: Tensor<2>,
    weights: &Tensor<2>,
    dispatch: &HostDispatch,
    activation: ExpertActivation<'_>,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let (shape, [rows, width]) = (gate_up.dims(), dact.dims());
    let slots = weights.dims();
    let weights = View::of(weights);
    let weights = weights.as_slice();
    let bias = match activation {
        ExpertActivation::Silu => None,
        ExpertActivation::ClampedSwiglu(form) => Some((form, View::of(form.bias.burn()))),
    };
    let bias = bias.as_ref().map(|(form, view)| (form, view.as_slice()));
    let (mut gate_up, mut dact) = (into_vec(gate_up), into_vec(dact));
    let mut by_row = vec![0.0_f32; rows];
    let blocks = gate_up.par_chunks_mut(ROWS * 2 * width).zip(dact.par_chunks_mut(ROWS * width));
    blocks.zip(by_row.par_chunks_mut(ROWS)).enumerate().for_each(|(block, ((gate_up, dact), dw))| {
        simd(
            #[inline(always)]
            || {
                let rows = gate_up.chunks_exact_mut(2 * width).zip(dact.chunks_exact_mut(width)).zip(dw);
                for (row, ((gate_up, dact), dw)) in (block * ROWS..).zip(rows) {
                    let w = weights[dispatch.sorted[row] as usize];
                    *dw = match bias {
                        None => {
                            let (gate, up) = gate_up.split_at_mut(width);
                            backward_row(w, gate, up, dact)
                        }
                        Some((form, bias)) => {
                            let bias = &bias[dispatch.expert(row) * 2 * width..][..2 * width];
                            form.backward_row(w, gate_up, bias, dact)
                        }
                    };
                }
            },
        );
    });
    let dw: Vec<f32> = dispatch.rows.iter().map(|&row| by_row[row as usize]).collect();
    (from_vec(gate_up, shape), from_vec(dact, [rows, width]), from_vec(dw, slots))
}

const LANES: usize = 16;

/// Replaces gate and up by their gradients and dact by act; returns dw.
#[inline(always)]
fn backward_row(w: f32, gate: &mut [f32], up: &mut [f32], dact: &mut [f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    for ((gate, up), dact) in gate.chunks_mut(LANES).zip(up.chunks_mut(LANES)).zip(dact.chunks_mut(LANES)) {
        for (((gate, up), dact), sum) in gate.iter_mut().zip(up).zip(dact).zip(&mut sums) {
            let (g, u, d, sig) = (*gate, *up, *dact, sigmoid(*gate));
            let silu = g * sig;
            *sum += d * (silu * u);
            *gate = d * w * u * sig * (1.0 + g * (1.0 - sig));
            *up = d * w * silu;
            *dact = w * (silu * u);
        }
    }
    sums.iter().sum()
}

/// A gate and an up with their bias, clamped.
struct Clamped {
    g: f32,
    u: f32,
    /// σ(alpha·g).
    sig: f32,
    /// 1 for a gate and an up that the clamp left as they were, otherwise 0.
    kept: [f32; 2],
}

impl ClampedSwiglu<'_> {
    /// A NaN stays one.
    #[inline(always)]
    fn clamped(&self, pair: &[f32; 2], bias: &[f32; 2]) -> Clamped {
        let (gate, up, limit) = (pair[0] + bias[0], pair[1] + bias[1], self.limit);
        let g = if gate > limit { limit } else { gate };
        let u = if up > limit { limit } else { up };
        let u = if u < -limit { -limit } else { u };
        let kept = |is: bool| if is { 1.0 } else { 0.0 };
        Clamped { g, u, sig: sigmoid(self.alpha * g), kept: [kept(gate <= limit), kept(up >= -limit && up <= limit)] }
    }

    /// As the function of that name for SiLU, with pairs of gate and up.
    #[inline(always)]
    fn backward_row(&self, w: f32, gate_up: &mut [f32], bias: &[f32], dact: &mut [f32]) -> f32 {
        let mut sums = [0.0_f32; LANES];
        let parts = gate_up.chunks_mut(2 * LANES).zip(bias.chunks(2 * LANES)).zip(dact.chunks_mut(LANES));
        for ((pairs, bias), dact) in parts {
            let pairs = pairs.as_chunks_mut::<2>().0.iter_mut().zip(bias.as_chunks::<2>().0);
            for (((pair, bias), dact), sum) in pairs.zip(dact).zip(&mut sums) {
                let Clamped { g, u, sig, kept } = self.clamped(pair, bias);
                let (d, glu) = (*dact, g * sig);
                let act = glu * (u + 1.0);
                *sum += d * act;
                pair[0] = d * w * (u + 1.0) * sig * (1.0 + self.alpha * g * (1.0 - sig)) * kept[0];
                pair[1] = d * w * glu * kept[1];
                *dact = w * act;
            }
        }
        sums.iter().sum()
    }
}
