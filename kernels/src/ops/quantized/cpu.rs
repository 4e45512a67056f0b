//! Products on the CPU: rows of the weight are decoded into one scratch buffer and multiplied from there.

use core::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use crate::host::{View, from_vec, into_vec};
use crate::ops::matmul::cpu::{Mat, into_strided};
use crate::ops::matmul::{self, Form};
use crate::params::quantized::QuantizedData;
use crate::params::quantized::cpu::decode_rows;

/// Elements of W decoded at a time: 2 MiB of `f32`, which stays in the cache until the product has read it.
const SCRATCH: usize = 512 * 1024;

/// `x · Wᵀ + bias`.
pub(crate) fn nt(codes: &QuantizedData, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
    let ([tokens, input], [out, _]) = (x.dims(), codes.dims);
    let mut y = vec![0.0; tokens * out];
    if let Some(bias) = bias {
        let bias = View::of(bias);
        let bias = bias.as_slice();
        y.par_chunks_mut(out).for_each(|row| row.copy_from_slice(bias));
    }
    let beta = if bias.is_some() { 1.0 } else { 0.0 };
    let view = View::strided(x);
    let (data, row_stride, col_stride) = view.matrix();
    let x = Mat { data, row_stride, col_stride };
    chunks(codes, |rows, w| {
        let sizes = (tokens, rows.len(), input);
        into_strided(&mut y[rows.start..], out, sizes, beta, 1.0, x, Mat::rows(w, input).t());
    });
    from_vec(y, [tokens, out])
}

/// `dy · W`, added to `dx` if there is one.
pub(crate) fn nn(codes: &QuantizedData, dy: &Tensor<2>, dx: Option<Tensor<2>>) -> Tensor<2> {
    let ([tokens, _], [_, input]) = (dy.dims(), codes.dims);
    let mut beta = if dx.is_some() { 1.0 } else { 0.0 };
    let mut sum = dx.map_or_else(|| vec![0.0; tokens * input], into_vec);
    let view = View::strided(dy);
    let (data, row_stride, col_stride) = view.matrix();
    chunks(codes, |rows, w| {
        let part = Mat { data: &data[rows.start * col_stride as usize..], row_stride, col_stride };
        into_strided(&mut sum, input, (tokens, input, rows.len()), beta, 1.0, part, Mat::rows(w, input));
        beta = 1.0;
    });
    from_vec(sum, [tokens, input])
}

/// Bytes of scratch memory that a product takes: decoded rows, and what the product of some rows takes.
pub(super) fn scratch(dims @ [_, input]: [usize; 2], tokens: usize, form: Form) -> usize {
    let rows = chunk_rows(dims);
    let sizes = if form == Form::Nt { (tokens, rows, input) } else { (tokens, input, rows) };
    size_of::<f32>() * rows * input + matmul::cpu::scratch(sizes, form)
}

/// Rows that are decoded at a time.
fn chunk_rows([out, input]: [usize; 2]) -> usize {
    (SCRATCH / input.max(1)).clamp(1, out.max(1))
}

/// Calls `f(rows, values)` for all rows, a scratch at a time.
fn chunks(codes: &QuantizedData, mut f: impl FnMut(Range<usize>, &[f32])) {
    let [out, input] = codes.dims;
    let rows = chunk_rows(codes.dims);
    let mut scratch = vec![0.0; rows * input];
    for first in (0..out).step_by(rows) {
        let rows = first..out.min(first + rows);
        let values = &mut scratch[..rows.len() * input];
        decode_rows(codes, rows.clone(), values);
        f(rows, values);
    }
}
