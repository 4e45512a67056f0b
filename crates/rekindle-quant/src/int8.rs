//! LLM.int8() weights: 8-bit integers that share one f32 scale per row.
//!
//! With w rounded to f16 first:
//!
//! SCB = max |w| of the row; code = rint(w · (127 · 1/SCB)); w ≈ (code · SCB) · f32(1/127).
//!
//! # Dtypes
//! f16 input, i8 codes, f32 scale and arithmetic. 1/SCB is the hardware's approximate reciprocal. The decoded product
//! is rounded after each factor, then once to the output type.
//!
//! # Edge cases
//! Rows of zeros, NaN elements and ±∞ (which an f32 weight above 65,504 becomes) get code 0. A row with an infinity has
//! an infinite scale and decodes to NaN and infinities. The scale of a row of NaN is −0.
//!
//! # Products
//! Training multiplies by the decoded weight. [`Int8Tensor::matmul`] is the product for inference, which also quantizes
//! the activations.
//!
//! Source: bitsandbytes 0.50 `kInt8VectorQuant`, `int8_vectorwise_dequant` (arXiv:2208.07339); tested by
//! `goldens/int8.safetensors`. Its training backward scales by `SCB · f32(1/127)` instead, which differs by an ulp.

mod activations;
mod matmul;

pub use activations::QuantizedActivations;
use rayon::prelude::*;

use crate::absmax::largest_magnitude;
use crate::element::not_a_float;
use crate::little_endian::{le_bf16_to_f32, le_f16_to_f32, le_f32_to_f32};
use crate::reciprocal::reciprocal;
use crate::simd::dispatch;
use crate::{Dtype, Element, Error};

/// A weight `[out, in]` in the format of LLM.int8().
#[derive(Debug, Clone, PartialEq)]
pub struct Int8Tensor {
    shape: [usize; 2],
    codes: Vec<i8>,
    scb: Vec<f32>,
}

impl Int8Tensor {
    /// Quantizes a row-major weight of `shape` `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Empty`], or [`Error::Length`] if `values` does not match `shape`.
    pub fn quantize<T: Element>(values: &[T], shape: [usize; 2]) -> Result<Self, Error> {
        check(shape, "elements", element_count(shape)?, values.len())?;
        Ok(Self::encode(values, T::to_f32_slice, shape))
    }

    /// Quantizes a weight as stored in a file: little-endian elements of `dtype` at any alignment. Each thread copies
    /// one row at a time from the dense weight.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Length`] if `bytes` does not match `shape`, or [`Error::Dtype`].
    pub fn quantize_le_bytes(bytes: &[u8], dtype: Dtype, shape: [usize; 2]) -> Result<Self, Error> {
        check(shape, "bytes", element_count(shape)?.saturating_mul(dtype.size()), bytes.len())?;
        Ok(match dtype {
            Dtype::F32 => Self::encode(bytes.as_chunks().0, le_f32_to_f32, shape),
            Dtype::F16 => Self::encode(bytes.as_chunks().0, le_f16_to_f32, shape),
            Dtype::BF16 => Self::encode(bytes.as_chunks().0, le_bf16_to_f32, shape),
            other => return Err(not_a_float(other)),
        })
    }

    fn encode<T: Sync>(values: &[T], to_f32: impl Fn(&[T], &mut [f32]) + Sync, shape: [usize; 2]) -> Self {
        let mut codes = vec![0; values.len()];
        let mut scb = vec![0.0; shape[0]];
        values.par_chunks(shape[1]).zip(codes.par_chunks_mut(shape[1])).zip(&mut scb).for_each_init(
            || vec![0.0; shape[1]],
            |row, ((values, codes), scb)| {
                dispatch(
                    #[inline(always)]
                    || {
                        to_f32(values, row);
                        row.iter_mut().for_each(|x| *x = round_to_f16(*x));
                        *scb = encode_row(row, codes);
                    },
                );
            },
        );
        Self { shape, codes, scb }
    }

    /// Creates a weight read from a file: `codes` `[out · in]`, `scb` `[out]`.
    ///
    /// # Errors
    /// [`Error::Empty`], or [`Error::Length`] if `codes` or `scb` does not match `shape`.
    pub fn from_parts(shape: [usize; 2], codes: Vec<i8>, scb: Vec<f32>) -> Result<Self, Error> {
        check(shape, "codes", element_count(shape)?, codes.len())?;
        check(shape, "SCB values", shape[0], scb.len())?;
        Ok(Self { shape, codes, scb })
    }

    /// Returns the dense weight, row-major.
    pub fn dequantize<T: Element>(&self) -> Vec<T> {
        let mut out = vec![T::default(); self.codes.len()];
        self.dequantize_into(&mut out);
        out
    }

    /// Writes the dense weight to `out`.
    ///
    /// # Panics
    /// If the length of `out` is not the weight's number of elements.
    pub fn dequantize_into<T: Element>(&self, out: &mut [T]) {
        assert_eq!(out.len(), self.codes.len(), "output of a weight of shape {:?}", self.shape);
        let columns = self.shape[1];
        out.par_chunks_mut(columns).zip(self.codes.par_chunks(columns)).zip(&self.scb).for_each(
            |((out, codes), &scb)| {
                dispatch(
                    #[inline(always)]
                    || out.iter_mut().zip(codes).for_each(|(out, &code)| *out = T::from_f32(decoded(code, scb))),
                );
            },
        );
    }

    /// Returns the shape `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Returns the codes, row-major.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// Returns the scale of each row.
    pub fn scb(&self) -> &[f32] {
        &self.scb
    }

    /// Returns the codes and scales.
    pub fn into_parts(self) -> (Vec<i8>, Vec<f32>) {
        (self.codes, self.scb)
    }

    /// Returns the bytes of codes and scales.
    pub fn byte_len(&self) -> usize {
        self.codes.len() + 4 * self.scb.len()
    }
}

#[inline(always)]
fn decoded(code: i8, scb: f32) -> f32 {
    f32::from(code) * scb * (1.0 / 127.0)
}

/// Quantizes a row of f16 values and returns its scale.
#[inline(always)]
fn encode_row(row: &[f32], codes: &mut [i8]) -> f32 {
    let scb = match largest_magnitude(row, 0.0) {
        0.0 if row.iter().all(|x| x.is_nan()) => -0.0,
        max => max,
    };
    let scale = 127.0 * reciprocal(scb);
    for (code, &x) in codes.iter_mut().zip(row) {
        *code = (x * scale).round_ties_even() as i8; // NaN becomes 0
    }
    scb
}

/// Rounds to the nearest f16 value, ties to even, in vectorizable f32 operations.
#[inline(always)]
fn round_to_f16(x: f32) -> f32 {
    let (bits, magnitude) = (x.to_bits(), x.abs());
    // f16 has 10 of f32's 23 mantissa bits; below its normal range its step is 2⁻²⁴, the ulp of 1/2.
    let normal = f32::from_bits(bits.wrapping_add(0xfff + (bits >> 13 & 1)) & !0x1fff);
    let subnormal = (magnitude + 0.5 - 0.5).copysign(x);
    let rounded = if magnitude < F16_MIN_NORMAL { subnormal } else { normal };
    let finite = if magnitude >= F16_OVERFLOW { f32::INFINITY.copysign(x) } else { rounded };
    if x.is_nan() { x } else { finite }
}

const F16_MIN_NORMAL: f32 = 1.0 / (1 << 14) as f32;

/// The midpoint between the largest f16 and the next power of two.
const F16_OVERFLOW: f32 = 65_520.0;

fn element_count(shape: [usize; 2]) -> Result<usize, Error> {
    match shape[0].checked_mul(shape[1]) {
        Some(0) => Err(Error::Empty { shape: shape.to_vec() }),
        // If the product overflows, no slice has that length, so the length check reports it.
        count => Ok(count.unwrap_or(usize::MAX)),
    }
}

fn check(shape: [usize; 2], part: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Length { shape: shape.to_vec(), rule: "int8 rows".to_owned(), part, expected, got })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_by_hand() {
        // Row 0: 127 · 0.5 = 63.5 and 127 · 1.5/2 = 95.25; ties go to even. Row 1 is all zeros.
        let weight = [2.0f32, -1.0, 1.5, 0.0, 0.0, -0.0];
        let int8 = Int8Tensor::quantize(&weight, [2, 3]).expect("two rows of three");
        assert_eq!((int8.codes(), int8.scb()), (&[127, -64, 95, 0, 0, 0][..], &[2.0, 0.0][..]));
        let decoded: Vec<f32> = int8.dequantize();
        assert_eq!(decoded, [254.0 * (1.0 / 127.0), -128.0 * (1.0 / 127.0), 190.0 * (1.0 / 127.0), 0.0, 0.0, 0.0]);
    }

    #[test]
    fn the_constant_equals_bitsandbytes() {
        assert_eq!((1.0f32 / 127.0).to_bits(), (7.874_015_748_698_502e-3_f64 as f32).to_bits());
    }

    #[test]
    fn rounding_equals_f16() {
        for half in 0..=u16::MAX {
            let x = half::f16::from_bits(half).to_f32();
            for x in [x, x.next_up(), x.next_down(), x * 1.000_244_1, x * 1.000_244_2, x + 0.5 / (1 << 24) as f32] {
                let (ours, theirs) = (round_to_f16(x), half::f16::from_f32(x).to_f32());
                assert!(ours.to_bits() == theirs.to_bits() || x.is_nan() && ours.is_nan(), "{x}: {ours}, not {theirs}");
            }
        }
    }

    #[test]
    fn unaligned_bytes_quantize_like_their_values() {
        let values: Vec<half::bf16> = (0..5 * 131).map(|i| half::bf16::from_f32((i as f32 * 0.7).sin())).collect();
        let file: Vec<u8> = [7].into_iter().chain(values.iter().flat_map(|v| v.to_le_bytes())).collect();
        let ours = Int8Tensor::quantize_le_bytes(&file[1..], Dtype::BF16, [5, 131]);
        assert_eq!(ours, Int8Tensor::quantize(&values, [5, 131]));
        assert!(Int8Tensor::quantize_le_bytes(&file[1..], Dtype::F32, [5, 131]).is_err());
        assert!(Int8Tensor::quantize_le_bytes(&file[1..], Dtype::BF16, [usize::MAX, 1]).is_err());
    }

    #[test]
    fn f16_overflow_gets_code_zero() {
        let int8 = Int8Tensor::quantize(&[1e30f32, 5.0], [1, 2]).expect("one row");
        assert_eq!((int8.codes(), int8.scb()), (&[0, 0][..], &[f32::INFINITY][..]));
    }

    #[test]
    fn lengths_must_match_the_shape() {
        let error = Int8Tensor::from_parts([2, 3], vec![0; 6], vec![1.0; 3]).expect_err("three scales, two rows");
        assert_eq!(
            error.to_string(),
            "shape [2, 3] with int8 rows needs 2 SCB values, got 3; the tensor is damaged or of another shape"
        );
        assert!(Int8Tensor::from_parts([usize::MAX, 2], vec![0; 6], vec![]).is_err());
        assert_eq!(Int8Tensor::quantize::<f32>(&[], [0, 3]), Err(Error::Empty { shape: vec![0, 3] }));
    }
}
