//! Products with codes on the CPU: rows of the weight are decoded into one scratch and multiplied from there.

use core::ops::Range;

use burn::tensor::Tensor;
use rayon::prelude::*;

use super::matmul::{Mat, into_strided};
use super::{View, from_vec, into_vec, simd};
use crate::packed::{Absmax, Codes, Format};

/// Elements of W decoded at a time: 2 MiB of `f32`, which stays in the cache until the product has read it.
const SCRATCH: usize = 512 * 1024;

/// `x · Wᵀ + bias`.
pub(crate) fn nt(codes: &Codes, x: &Tensor<2>, bias: Option<&Tensor<1>>) -> Tensor<2> {
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
pub(crate) fn nn(codes: &Codes, dy: &Tensor<2>, dx: Option<Tensor<2>>) -> Tensor<2> {
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

/// Calls `f(rows, values)` for all rows, a scratch at a time.
fn chunks(codes: &Codes, mut f: impl FnMut(Range<usize>, &[f32])) {
    let [out, input] = codes.dims;
    let rows = (SCRATCH / input.max(1)).clamp(1, out.max(1));
    let mut scratch = vec![0.0; rows * input];
    for first in (0..out).step_by(rows) {
        let rows = first..out.min(first + rows);
        let values = &mut scratch[..rows.len() * input];
        decode_rows(codes, rows.clone(), values);
        f(rows, values);
    }
}

/// Decodes some rows of the matrix.
pub(crate) fn decode_rows(codes: &Codes, rows: Range<usize>, out: &mut [f32]) {
    let input = codes.dims[1];
    match &codes.format {
        Format::FourBit { codes, table, blocksize, absmax } => {
            // Tasks begin where blocks begin; all but the first are whole numbers of blocks.
            let (start, step) = (rows.start * input, (*blocksize).max(4096));
            let lead = (start.next_multiple_of(step) - start).min(out.len());
            let (head, rest) = out.split_at_mut(lead);
            let task = |first: usize, out: &mut [f32]| {
                simd(
                    #[inline(always)]
                    || four_bit(codes, table, *blocksize, absmax, first, out),
                );
            };
            task(start, head);
            rest.par_chunks_mut(step).enumerate().for_each(|(i, out)| task(start + lead + i * step, out));
        }
        Format::Int8 { codes, scales, factor } => {
            let codes = &codes[rows.start * input..rows.end * input];
            out.par_chunks_mut(input).zip(codes.par_chunks(input)).zip(&scales[rows]).for_each(
                |((out, codes), &scale)| {
                    simd(
                        #[inline(always)]
                        || {
                            for (out, &code) in out.iter_mut().zip(codes) {
                                *out = f32::from(code) * scale * factor;
                            }
                        },
                    );
                },
            );
        }
    }
}

/// Decodes the elements from `at` on.
#[inline(always)]
fn four_bit(codes: &[u8], table: &[f32; 16], blocksize: usize, absmax: &Absmax, mut at: usize, mut out: &mut [f32]) {
    while !out.is_empty() {
        let block = at / blocksize;
        let left = (block + 1) * blocksize - at;
        let (part, rest) = out.split_at_mut(left.min(out.len()));
        let scale = flush(absmax.at(block));
        unpack(codes, &table.map(|value| flush(value * scale)), at, part);
        at += part.len();
        out = rest;
    }
}

/// Looks up the codes from element `at` on. Only the first row of a weight's scratch can begin within a byte.
#[inline(always)]
fn unpack(codes: &[u8], values: &[f32; 16], at: usize, out: &mut [f32]) {
    let low = |byte: u8| values[usize::from(byte & 15)];
    let high = |byte: u8| values[usize::from(byte >> 4)];
    let (first, out) = out.split_at_mut(at % 2);
    if let [first] = first {
        *first = low(codes[at / 2]);
    }
    let codes = &codes[at.div_ceil(2)..];
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, &byte) in pairs.iter_mut().zip(codes) {
        *pair = [high(byte), low(byte)];
    }
    if let [last] = last {
        *last = high(codes[pairs.len()]);
    }
}

impl Absmax {
    /// The scale of a block.
    #[inline(always)]
    fn at(&self, block: usize) -> f32 {
        match self {
            Self::Single(absmax) => absmax[block],
            Self::Double { codes, map, nested, blocksize, offset } => {
                let product = flush(map[usize::from(codes[block])] * flush(nested[block / blocksize]));
                flush(product + offset)
            }
        }
    }
}

/// A subnormal number as a zero of its sign.
#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}
