//! NF4 and FP4 blocks: 4-bit codes that share one f32 scale.
//!
//! For a block b of x, in f32:
//!
//! absmax = max |x|; code = c(x · 1/absmax); decoded = value(code) · absmax, rounded once to the output type.
//!
//! c picks the nearest value by fixed thresholds; a value on a threshold goes to the smaller magnitude for FP4 and to
//! the smaller value for NF4. Codes are packed row-major with the **even element in the high nibble**. Blocks run over
//! the flattened tensor, and the last may be short. If the number of elements is odd, the last low nibble holds the
//! code of zero.
//!
//! # Dtypes
//! Input is f32, f16 or bf16, converted to f32 exactly. Scale and arithmetic are f32 with subnormals flushed to zero
//! and the hardware's approximate reciprocal, as in the kernels `kQuantizeBlockwise` and `kDequantizeBlockwise`.
//!
//! # Edge cases, as in those kernels
//! - A block of zeros (or subnormals) has absmax 0. 0 · ∞ is NaN, which fails every comparison, so all codes are 0.
//!   They decode to −1 · 0 = −0 for NF4 and to 0 for FP4.
//! - If absmax is above 2¹²⁶, its reciprocal flushes to 0, so every element gets the code of zero.
//! - An infinite element makes absmax infinite: infinite elements get code 0, finite ones the code of zero, and the
//!   block decodes to infinities and NaN.
//! - NaN elements get code 0 and do not affect absmax; a full block of NaN has absmax −f32::MAX.
//!
//! Source: bitsandbytes 0.50 `csrc/kernels.cu`; tested by `goldens/four_bit.safetensors`.

mod codebook;
mod pack;

use rayon::prelude::*;

use crate::reciprocal::{flush, flush_signed};
use crate::simd::dispatch;
use crate::{Blocksize, Element, QuantType};

/// Number of elements per task of the thread pool: four times the largest block size.
const TASK: usize = 16_384;

/// Quantizes `values` to packed codes `[⌈n/2⌉]` and absmax `[⌈n/blocksize⌉]`.
pub fn encode<T: Element>(values: &[T], quant_type: QuantType, blocksize: Blocksize) -> (Vec<u8>, Vec<f32>) {
    encode_with(values, T::to_f32_slice, quant_type, blocksize)
}

/// Works as [`encode`], for any type that `to_f32` converts to f32.
pub(crate) fn encode_with<T: Sync>(
    values: &[T],
    to_f32: impl Fn(&[T], &mut [f32]) + Copy + Sync,
    quant_type: QuantType,
    blocksize: Blocksize,
) -> (Vec<u8>, Vec<f32>) {
    let mut codes = vec![0; values.len().div_ceil(2)];
    let mut absmax = vec![0.0; blocksize.blocks(values.len())];
    let tasks =
        values.par_chunks(TASK).zip(codes.par_chunks_mut(TASK / 2)).zip(absmax.par_chunks_mut(TASK / blocksize.get()));
    match quant_type {
        QuantType::Nf4 => tasks.for_each(|((values, codes), absmax)| {
            dispatch(
                #[inline(always)]
                || pack::encode::<T, codebook::Nf4>(values, to_f32, blocksize, codes, absmax),
            )
        }),
        QuantType::Fp4 => tasks.for_each(|((values, codes), absmax)| {
            dispatch(
                #[inline(always)]
                || pack::encode::<T, codebook::Fp4>(values, to_f32, blocksize, codes, absmax),
            )
        }),
    }
    (codes, absmax)
}

/// Writes the decoded values of `codes` to `out`, whose length is the dense tensor's number of elements.
///
/// # Panics
/// If `codes` is not `[⌈n/2⌉]` or `absmax` is not `[⌈n/blocksize⌉]` for the n elements of `out`.
pub fn decode<T: Element>(codes: &[u8], absmax: &[f32], quant_type: QuantType, blocksize: Blocksize, out: &mut [T]) {
    assert_eq!(codes.len(), out.len().div_ceil(2), "packed codes of {} elements", out.len());
    assert_eq!(absmax.len(), blocksize.blocks(out.len()), "absmax of {} elements", out.len());
    let values = values(quant_type);
    out.par_chunks_mut(TASK).zip(codes.par_chunks(TASK / 2)).zip(absmax.par_chunks(TASK / blocksize.get())).for_each(
        |((out, codes), absmax)| {
            let blocks = out.chunks_mut(blocksize.get()).zip(codes.chunks(blocksize.get() / 2)).zip(absmax);
            for ((out, codes), &absmax) in blocks {
                let scale = flush(absmax);
                pack::decode(codes, &values.map(|value| T::from_f32(flush_signed(value * scale))), out);
            }
        },
    );
}

/// Returns the 16 values of `quant_type` by code.
///
/// The zero of FP4's code 8 is negative here, as in bitsandbytes' kernel; `quant_map` in a checkpoint has a positive
/// zero.
pub fn values(quant_type: QuantType) -> [f32; 16] {
    match quant_type {
        QuantType::Nf4 => codebook::NF4_VALUES,
        QuantType::Fp4 => codebook::FP4_VALUES,
    }
}

#[cfg(test)]
mod tests;
