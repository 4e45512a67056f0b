//! Dynamic 8-bit blocks: 8-bit codes that share one f32 scale, the format of 8-bit optimizer states.
//!
//! absmax = max |x| of the block; code = nearest value of the [`DynamicMap`] to x · 1/absmax, with ties to the even
//! code; decoded = value(code) · absmax, rounded once to the output type.
//!
//! Blocks run over the flattened tensor, and the last may be short. Arithmetic, subnormals and non-finite values behave
//! as in [`four_bit`](crate::four_bit): a block of zeros gets code 0, which decodes to −0 or 0. bitsandbytes supports
//! block sizes from 64 and uses 256 for optimizer states and scales.
//!
//! Source: bitsandbytes 0.50 `dQuantize<0>` in `csrc/kernels.cu`; tested by `goldens/dynamic.safetensors`.

use rayon::prelude::*;

use crate::absmax::largest_magnitude;
use crate::reciprocal::{flush, flush_signed, reciprocal};
use crate::simd::dispatch;
use crate::{Blocksize, DynamicMap, Element};

/// Number of elements per task of the thread pool: four times the largest block size.
const TASK: usize = 16_384;

/// Quantizes `values` to codes `[n]` and absmax `[⌈n/blocksize⌉]`.
pub fn encode<T: Element>(values: &[T], map: &DynamicMap, blocksize: Blocksize) -> (Vec<u8>, Vec<f32>) {
    encode_with(values, T::to_f32_slice, map, blocksize)
}

/// Works as [`encode`], for any type that `to_f32` converts to f32.
pub(crate) fn encode_with<T: Sync>(
    values: &[T],
    to_f32: impl Fn(&[T], &mut [f32]) + Copy + Sync,
    map: &DynamicMap,
    blocksize: Blocksize,
) -> (Vec<u8>, Vec<f32>) {
    match map.look_up() {
        Some(code) => encode_by(values, to_f32, code, blocksize),
        None => encode_by(values, to_f32, |x| map.code(x), blocksize),
    }
}

/// Writes the decoded values of `codes` to `out`.
///
/// # Panics
/// If `codes` is not as long as `out`, or `absmax` is not `[⌈n/blocksize⌉]`.
pub fn decode<T: Element>(codes: &[u8], absmax: &[f32], map: &DynamicMap, blocksize: Blocksize, out: &mut [T]) {
    assert_eq!(codes.len(), out.len(), "codes of {} elements", out.len());
    assert_eq!(absmax.len(), blocksize.blocks(out.len()), "absmax of {} elements", out.len());
    let size = blocksize.get();
    out.par_chunks_mut(size).zip(codes.par_chunks(size)).zip(absmax).with_min_len(TASK / size).for_each(
        |((out, codes), &absmax)| {
            let scale = flush(absmax);
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = T::from_f32(flush_signed(map.values()[usize::from(code)] * scale));
            }
        },
    );
}

fn encode_by<T: Sync>(
    values: &[T],
    to_f32: impl Fn(&[T], &mut [f32]) + Copy + Sync,
    code: impl Fn(f32) -> u8 + Copy + Sync,
    blocksize: Blocksize,
) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; values.len()];
    let mut absmax = vec![0.0; blocksize.blocks(values.len())];
    values
        .par_chunks(TASK)
        .zip(codes.par_chunks_mut(TASK))
        .zip(absmax.par_chunks_mut(TASK / blocksize.get()))
        .for_each(|((values, codes), absmax)| {
            dispatch(
                #[inline(always)]
                || encode_blocks(values, to_f32, code, blocksize, codes, absmax),
            )
        });
    (codes, absmax)
}

#[inline(always)]
fn encode_blocks<T>(
    values: &[T],
    to_f32: impl Fn(&[T], &mut [f32]),
    code_of: impl Fn(f32) -> u8,
    blocksize: Blocksize,
    codes: &mut [u8],
    absmax: &mut [f32],
) {
    let mut wide = [0.0; 4096];
    let blocks = values.chunks(blocksize.get()).zip(codes.chunks_mut(blocksize.get())).zip(absmax);
    for ((values, codes), absmax) in blocks {
        let block = &mut wide[..values.len()];
        to_f32(values, block);
        let floor = if block.len() == blocksize.get() { -f32::MAX } else { 0.0 };
        *absmax = largest_magnitude(block, floor);
        let inverse = reciprocal(*absmax);
        // Two loops, because the first is arithmetic that vectorizes and the second is table lookups.
        block.iter_mut().for_each(|x| *x = flush(*x) * inverse);
        for (code, &x) in codes.iter_mut().zip(&*block) {
            *code = code_of(x);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decoded_codes_encode_to_themselves() {
        let map = DynamicMap::signed();
        // Contains every code, and 1 in each block so that absmax is the scale.
        let codes: Vec<u8> = (0..=255).chain((0..255).rev()).chain([255, 3, 200]).collect();
        let absmax = [0.37, 5.5, 2e-5];
        let mut values = vec![0.0f32; codes.len()];
        decode(&codes, &absmax, &map, Blocksize::B256, &mut values);
        values[511] = 5.5;
        let (again, absmax_again) = encode(&values, &map, Blocksize::B256);
        assert_eq!(absmax_again[..2], absmax[..2]);
        assert_eq!(again[..511], codes[..511]);
    }

    #[test]
    fn the_error_is_within_half_the_widest_gap() {
        let map = DynamicMap::unsigned();
        let widest = map.values().windows(2).map(|w| w[1] - w[0]).fold(0.0, f32::max);
        let values: Vec<f32> = (0..1000).map(|i| ((i * 7919) % 1000) as f32 * 1e-4).collect();
        let (codes, absmax) = encode(&values, &map, Blocksize::B64);
        let mut decoded = vec![0.0f32; values.len()];
        decode(&codes, &absmax, &map, Blocksize::B64, &mut decoded);
        for (i, (x, y)) in values.iter().zip(&decoded).enumerate() {
            // Half the gap plus two roundings of f32.
            let bound = absmax[i / 64] * (widest / 2.0 + 2.0 * f32::EPSILON);
            assert!((x - y).abs() <= bound, "element {i}: {x} became {y}");
        }
    }

    #[test]
    fn zeros_get_code_zero() {
        let (codes, absmax) = encode(&[0.0f32; 70], &DynamicMap::signed(), Blocksize::B64);
        assert_eq!((codes, absmax), (vec![0; 70], vec![0.0; 2]));
    }
}
