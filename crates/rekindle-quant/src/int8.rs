//! LLM.int8() weights: 8-bit integers that share one f32 scale a row.
//!
//! With w rounded to f16 first:
//!
//! SCB = max |w| of the row; code = rint(w · (127 · 1/SCB)); w ≈ (code · SCB) · f32(1/127).
//!
//! # Dtypes
//! f16 in, i8 codes, f32 scale and arithmetic; 1/SCB is the hardware's approximate reciprocal, and the decoded
//! product is rounded after each factor, then once to the output type.
//!
//! # Edges
//! Rows of zeros, NaN elements, and ±∞ (which an f32 weight above 65,504 becomes) get code 0; a row with an
//! infinity has an infinite scale and decodes to NaN and infinities; the scale of a row of nothing but NaN is −0.
//!
//! Source: bitsandbytes 0.50 `kInt8VectorQuant`, `int8_vectorwise_dequant` (arXiv:2208.07339); held by
//! `goldens/int8.safetensors`. Its training backward scales by `SCB · f32(1/127)` instead, which differs by an ulp.

use half::f16;
use rayon::prelude::*;

use crate::absmax::largest_magnitude;
use crate::reciprocal::reciprocal;
use crate::{Element, Error};

/// A weight `[out, in]` as LLM.int8() stores it.
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
    /// [`Error::Empty`], or [`Error::Length`] when `values` does not fill `shape`.
    pub fn quantize<T: Element>(values: &[T], shape: [usize; 2]) -> Result<Self, Error> {
        check(shape, "elements", element_count(shape)?, values.len())?;
        let mut codes = vec![0; values.len()];
        let mut scb = vec![0.0; shape[0]];
        values
            .par_chunks(shape[1])
            .zip(codes.par_chunks_mut(shape[1]))
            .zip(&mut scb)
            .for_each_init(Vec::new, |row, ((values, codes), scb)| *scb = encode_row(values, row, codes));
        Ok(Self { shape, codes, scb })
    }

    /// A weight read from a file: `codes` `[out · in]`, `scb` `[out]`.
    ///
    /// # Errors
    /// [`Error::Empty`], or [`Error::Length`] when a part does not match `shape`.
    pub fn from_parts(shape: [usize; 2], codes: Vec<i8>, scb: Vec<f32>) -> Result<Self, Error> {
        check(shape, "codes", element_count(shape)?, codes.len())?;
        check(shape, "SCB values", shape[0], scb.len())?;
        Ok(Self { shape, codes, scb })
    }

    /// The dense weight, row-major.
    pub fn dequantize<T: Element>(&self) -> Vec<T> {
        let mut out = vec![T::default(); self.codes.len()];
        self.dequantize_into(&mut out);
        out
    }

    /// Writes the dense weight to `out`.
    ///
    /// # Panics
    /// When `out` has not the weight's number of elements.
    pub fn dequantize_into<T: Element>(&self, out: &mut [T]) {
        assert_eq!(out.len(), self.codes.len(), "output of a weight of shape {:?}", self.shape);
        let columns = self.shape[1];
        out.par_chunks_mut(columns).zip(self.codes.par_chunks(columns)).zip(&self.scb).for_each(
            |((out, codes), &scb)| {
                for (out, &code) in out.iter_mut().zip(codes) {
                    *out = T::from_f32(f32::from(code) * scb * (1.0 / 127.0));
                }
            },
        );
    }

    /// `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// The codes, row-major.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// The scale of each row.
    pub fn scb(&self) -> &[f32] {
        &self.scb
    }

    /// Bytes of codes and scales.
    pub fn byte_len(&self) -> usize {
        self.codes.len() + 4 * self.scb.len()
    }
}

/// Rounds `values` to f16 in `row`, codes them and returns the scale.
fn encode_row<T: Element>(values: &[T], row: &mut Vec<f32>, codes: &mut [i8]) -> f32 {
    row.resize(values.len(), 0.0);
    T::widen(values, row);
    row.iter_mut().for_each(|x| *x = f16::from_f32(*x).to_f32());
    let scb = match largest_magnitude(row, 0.0) {
        0.0 if row.iter().all(|x| x.is_nan()) => -0.0,
        max => max,
    };
    let scale = 127.0 * reciprocal(scb);
    for (code, x) in codes.iter_mut().zip(row) {
        *code = (*x * scale).round_ties_even() as i8; // NaN becomes 0
    }
    scb
}

fn element_count(shape: [usize; 2]) -> Result<usize, Error> {
    match shape[0].checked_mul(shape[1]) {
        Some(0) => Err(Error::Empty { shape: shape.to_vec() }),
        // No slice is that long: the length check reports it.
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
    fn constant_is_the_one_of_bitsandbytes() {
        assert_eq!((1.0f32 / 127.0).to_bits(), (7.874_015_748_698_502e-3_f64 as f32).to_bits());
    }

    #[test]
    fn overflow_of_f16_takes_code_zero() {
        let int8 = Int8Tensor::quantize(&[1e30f32, 5.0], [1, 2]).expect("one row");
        assert_eq!((int8.codes(), int8.scb()), (&[0, 0][..], &[f32::INFINITY][..]));
    }

    #[test]
    fn parts_must_match_the_shape() {
        let error = Int8Tensor::from_parts([2, 3], vec![0; 6], vec![1.0; 3]).expect_err("three scales, two rows");
        assert_eq!(
            error.to_string(),
            "shape [2, 3] with int8 rows needs 2 SCB values, got 3; the tensor is damaged or of another shape"
        );
        assert!(Int8Tensor::from_parts([usize::MAX, 2], vec![0; 6], vec![]).is_err());
        assert_eq!(Int8Tensor::quantize::<f32>(&[], [0, 3]), Err(Error::Empty { shape: vec![0, 3] }));
    }
}
