//! Stochastic rounding over slices; the rules stand in [`super`].

use rayon::prelude::*;

use super::{RoundingRng, Sorted};
use crate::host::{CHUNK, simd};

/// Blocks of 4-bit codes that a task takes at least.
const BLOCKS: usize = 64;

/// `values` in bf16.
pub(crate) fn bf16(values: &[f32], out: &mut [u16], rng: RoundingRng) {
    out.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK)).enumerate().for_each(|(i, (out, values))| {
        simd(
            #[inline(always)]
            || {
                for (k, (out, values)) in out.chunks_mut(4).zip(values.chunks(4)).enumerate() {
                    let words = rng.words(i * (CHUNK / 4) + k);
                    for ((out, &value), word) in out.iter_mut().zip(values).zip(words) {
                        *out = super::bf16(value, word);
                    }
                }
            },
        );
    });
}

/// `values` in 4-bit codes, the even element in the high nibble, and the scale of every block.
pub(crate) fn four_bit(
    values: &[f32],
    codes: &mut [u8],
    absmax: &mut [f32],
    table: &Sorted,
    blocksize: usize,
    rng: RoundingRng,
) {
    let blocks = codes.par_chunks_mut(blocksize / 2).zip(absmax).zip(values.par_chunks(blocksize));
    blocks.enumerate().with_min_len(BLOCKS).for_each(|(block, ((codes, absmax), values))| {
        simd(
            #[inline(always)]
            || {
                *absmax = max(values);
                let scale = |value: f32| if *absmax > 0.0 { value / *absmax } else { 0.0 };
                let first = block * blocksize / 4;
                for (k, (codes, values)) in codes.chunks_mut(2).zip(values.chunks(4)).enumerate() {
                    let words = rng.words(first + k);
                    for ((byte, pair), words) in codes.iter_mut().zip(values.chunks(2)).zip(words.chunks(2)) {
                        let high = table.code(scale(pair[0]), words[0]);
                        // Behind an odd number of elements stands a zero.
                        let low = table.code(pair.get(1).map_or(0.0, |&value| scale(value)), words[1]);
                        *byte = high << 4 | low;
                    }
                }
            },
        );
    });
}

/// `values` in 8-bit codes, and the scale of every row.
pub(crate) fn int8(values: &[f32], codes: &mut [i8], scales: &mut [f32], cols: usize, rng: RoundingRng) {
    let rows = codes.par_chunks_mut(cols).zip(scales).zip(values.par_chunks(cols));
    rows.enumerate().for_each(|(row, ((codes, scale), values))| {
        simd(
            #[inline(always)]
            || {
                *scale = max(values);
                let factor = if *scale > 0.0 { 127.0 / *scale } else { 0.0 };
                let first = row * cols;
                let (mut four, mut words) = (usize::MAX, [0; 4]);
                for (k, (code, &value)) in codes.iter_mut().zip(values).enumerate() {
                    let at = first + k;
                    if at / 4 != four {
                        four = at / 4;
                        words = rng.words(four);
                    }
                    *code = super::integer(value * factor, words[at % 4]);
                }
            },
        );
    });
}

#[inline(always)]
fn max(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, value| max.max(value.abs()))
}
