//! SwiGLU over slices; the formulas stand in [`super`].

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::host::exp::sigmoid;
use crate::host::{CHUNK, View, from_vec, into_vec, simd};

pub(crate) fn forward(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    let shape = gate.dims();
    let (gate, up) = (View::of(gate), View::of(up));
    let (gate, up) = (gate.as_slice(), up.as_slice());
    let mut act = vec![0.0; gate.len()];
    act.par_chunks_mut(CHUNK).zip(gate.par_chunks(CHUNK).zip(up.par_chunks(CHUNK))).for_each(|(act, (gate, up))| {
        simd(
            #[inline(always)]
            || {
                for ((a, &g), &u) in act.iter_mut().zip(gate).zip(up) {
                    *a = g * sigmoid(g) * u;
                }
            },
        );
    });
    from_vec(act, shape)
}

pub(crate) fn backward(dact: &Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> (Tensor<2>, Tensor<2>) {
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
                        let (g, u, sig) = (*gate, *up, sigmoid(*gate));
                        *gate = d * u * sig * (1.0 + g * (1.0 - sig));
                        *up = d * g * sig;
                    }
                },
            );
        },
    );
    (from_vec(gate, shape), from_vec(up, shape))
}
