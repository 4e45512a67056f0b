//! The activation of experts over slices; the formulas stand in [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::host::exp::sigmoid;
use crate::host::{ROWS, View, for_rows, from_vec, into_vec, simd};
use crate::ops::routing::HostDispatch;

pub(super) fn forward(gate_up: &Tensor<2>, weights: &Tensor<2>, dispatch: &HostDispatch) -> Tensor<2> {
    let [rows, both] = gate_up.dims();
    let width = both / 2;
    let (gate_up, weights) = (View::of(gate_up), View::of(weights));
    let (gate_up, weights) = (gate_up.as_slice(), weights.as_slice());
    let mut act = vec![0.0; rows * width];
    for_rows(
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
    );
    from_vec(act, [rows, width])
}

/// The gradients to gate and up, act, and the gradient to w.
pub(super) fn backward(
    dact: Tensor<2>,
    gate_up: Tensor<2>,
    weights: &Tensor<2>,
    dispatch: &HostDispatch,
) -> (Tensor<2>, Tensor<2>, Tensor<2>) {
    let (shape, [rows, width]) = (gate_up.dims(), dact.dims());
    let slots = weights.dims();
    let weights = View::of(weights);
    let weights = weights.as_slice();
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
                    let (gate, up) = gate_up.split_at_mut(width);
                    *dw = backward_row(w, gate, up, dact);
                }
            },
        );
    });
    let dw: Vec<f32> = dispatch.rows.iter().map(|&row| by_row[row as usize]).collect();
    (from_vec(gate_up, shape), from_vec(dact, [rows, width]), from_vec(dw, slots))
}

/// Replaces gate and up by their gradients and dact by act; returns dw.
#[inline(always)]
fn backward_row(w: f32, gate: &mut [f32], up: &mut [f32], dact: &mut [f32]) -> f32 {
    const LANES: usize = 16;
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
