//! Decoding on the CPU.

use core::ops::Range;

use rayon::prelude::*;

use super::{Absmax, QuantizedData, QuantizedFormat, fp8};
use crate::host::simd;

/// Decodes some rows of the matrix.
pub(crate) fn decode_rows(codes: &QuantizedData, rows: Range<usize>, out: &mut [f32]) {
    let input = codes.dims[1];
    match &codes.format {
        QuantizedFormat::FourBit { codes, table, blocksize, absmax } => {
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
        QuantizedFormat::Blocks { bytes, codec } => {
            let width = input / codec.elements * codec.bytes;
            // Enough rows for a task.
            let step = 4096_usize.div_ceil(input.max(1));
            let bytes = bytes[rows.start * width..rows.end * width].par_chunks((step * width).max(1));
            out.par_chunks_mut((step * input).max(1)).zip(bytes).for_each(|(out, bytes)| (codec.decode)(bytes, out));
        }
        QuantizedFormat::Fp8 { codes, scales, scaling, section } => {
            let (per_row, width) = (scaling.grid([1, input])[1], scaling.columns(input));
            let codes = codes[rows.start * input..rows.end * input].par_chunks(input);
            out.par_chunks_mut(input).zip(codes).zip(rows.into_par_iter()).for_each(|((out, codes), row)| {
                let scales = &scales[scaling.scale_row(*section, row) * per_row..][..per_row];
                fp8::decode_row(codes, scales, width, out);
            });
        }
        QuantizedFormat::Int8 { codes, scales, factor } => {
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
    pub(super) fn at(&self, block: usize) -> f32 {
        match self {
            Self::Single(absmax) => absmax[block],
            Self::Double { codes, map, nested, blocksize, offsets } => {
                let product = flush(map[usize::from(codes[block])] * flush(nested[block / blocksize]));
                flush(product + offsets[block / (codes.len() / offsets.len())])
            }
        }
    }
}

/// A subnormal number as a zero of its sign.
#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}
