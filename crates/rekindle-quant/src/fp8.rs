//! fp8 weights: 8-bit floats (E4M3) with one scale for the weight, for each row, or for each block of 128 × 128.
//!
//! decoded = code · scale, in f32, then one rounding to the output type. Encoding divides by the scale, rounds to nearest
//! (ties to even) and saturates at ±448, the largest code:
//!
//! scale = max |w| / 448 of the elements that share it; code = e4m3(w / scale).
//!
//! The scale of elements that are all zero is 1, and no scale is below the smallest normal f32, so that none is 0.
//!
//! | method in `quantization_config` | key of the scales | their shape |
//! |---|---|---|
//! | `fp8`, `weight_block_size = [128, 128]` | `weight_scale_inv` | `[⌈out / 128⌉, ⌈in / 128⌉]` |
//! | `fp8`, `weight_block_size = null` | `weight_scale_inv` | `[]` |
//! | `fbgemm_fp8` | `weight_scale` | `[out, 1]` |
//! | `compressed-tensors`, `float-quantized` | `weight_scale` | `[1]`, `[out, 1]` or by block |
//!
//! Scales are stored in f32, bf16 or f16, or as powers of two in one byte (E8M0, `scale_fmt = "ue8m0"`); all of them are
//! factors to decode by, despite the name `weight_scale_inv`. [`Fp8Weight`] keeps how they were stored.
//!
//! # Dtypes
//! f32, f16 or bf16 input, u8 codes, f32 scales and arithmetic.
//!
//! Source: OCP 8-bit Floating Point Specification 1.0; transformers' `integrations/finegrained_fp8.py` and
//! `fbgemm_fp8.py`, compressed-tensors. Tested by `goldens/fp8.safetensors`, which PyTorch made.

mod cast;
mod config;
mod stored;

use rayon::prelude::*;

pub use self::stored::{Fp8Layout, Fp8Weight};
pub(crate) use self::{config::Fp8Rules, stored::MODULE_SUFFIXES, stored::WEIGHT_SUFFIXES};
use crate::element::not_a_float;
use crate::little_endian::{le_bf16_to_f32, le_f16_to_f32, le_f32_to_f32};
use crate::simd::dispatch;
use crate::{Dtype, Element, Error};

/// Rows and columns of a block.
pub const BLOCK: usize = 128;

/// The largest value of a code.
pub const MAX: f32 = 448.0;

/// The elements of an fp8 weight that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fp8Scaling {
    /// All of them.
    Tensor,
    /// A row.
    Row,
    /// A block of [`BLOCK`] × [`BLOCK`], fewer at the edges.
    Block,
}

impl Fp8Scaling {
    /// Returns the rows and columns of the matrix of scales of a weight.
    pub const fn grid(self, [rows, cols]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Tensor => [1, 1],
            Self::Row => [rows, 1],
            Self::Block => [rows.div_ceil(BLOCK), cols.div_ceil(BLOCK)],
        }
    }

    /// Returns the words for messages.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tensor => "one scale",
            Self::Row => "a scale per row",
            Self::Block => "a scale per 128 × 128 block",
        }
    }

    /// The rows and columns that share a scale, at most.
    const fn extent(self, [rows, cols]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Tensor => [rows, cols],
            Self::Row => [1, cols],
            Self::Block => [BLOCK, BLOCK],
        }
    }
}

/// A weight `[out, in]` in fp8.
#[derive(Debug, Clone, PartialEq)]
pub struct Fp8Tensor {
    shape: [usize; 2],
    codes: Vec<u8>,
    scales: Vec<f32>,
    scaling: Fp8Scaling,
}

impl Fp8Tensor {
    /// Quantizes a row-major weight of `shape` `[out, in]`.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Length`] if `values` does not match `shape`, and [`Error::Stored`] for an infinity or NaN.
    pub fn quantize<T: Element>(values: &[T], shape: [usize; 2], scaling: Fp8Scaling) -> Result<Self, Error> {
        check(shape, scaling, "elements", element_count(shape)?, values.len())?;
        Self::encode(values, T::to_f32_slice, shape, scaling)
    }

    /// Quantizes a weight as stored in a file: little-endian elements of `dtype` at any alignment. Each thread copies one
    /// row at a time from the dense weight.
    ///
    /// # Errors
    /// As [`quantize`](Self::quantize), and [`Error::Dtype`].
    pub fn quantize_le_bytes(
        bytes: &[u8],
        dtype: Dtype,
        shape: [usize; 2],
        scaling: Fp8Scaling,
    ) -> Result<Self, Error> {
        check(shape, scaling, "bytes", element_count(shape)?.saturating_mul(dtype.size()), bytes.len())?;
        match dtype {
            Dtype::F32 => Self::encode(bytes.as_chunks().0, le_f32_to_f32, shape, scaling),
            Dtype::F16 => Self::encode(bytes.as_chunks().0, le_f16_to_f32, shape, scaling),
            Dtype::BF16 => Self::encode(bytes.as_chunks().0, le_bf16_to_f32, shape, scaling),
            other => Err(not_a_float(other)),
        }
    }

    fn encode<T: Sync>(
        values: &[T],
        to_f32: impl Fn(&[T], &mut [f32]) + Sync,
        shape: [usize; 2],
        scaling: Fp8Scaling,
    ) -> Result<Self, Error> {
        let ([_, cols], [height, width]) = (shape, scaling.extent(shape));
        let [_, per_group] = scaling.grid([height, cols]);
        let mut codes = vec![0; values.len()];
        let mut scales = vec![0.0_f32; values.len().div_ceil(height * cols) * per_group];
        let groups = values.par_chunks(height * cols).zip(codes.par_chunks_mut(height * cols));
        groups.zip(scales.par_chunks_mut(per_group)).for_each_init(
            || vec![0.0; cols],
            |row, ((values, codes), scales)| {
                dispatch(
                    #[inline(always)]
                    || {
                        for values in values.chunks(cols) {
                            to_f32(values, row);
                            for (largest, part) in scales.iter_mut().zip(row.chunks(width)) {
                                *largest = part.iter().fold(*largest, |largest, x| largest.max(x.abs()));
                            }
                        }
                        scales.iter_mut().for_each(|largest| *largest = scale_of(*largest));
                        for (values, codes) in values.chunks(cols).zip(codes.chunks_mut(cols)) {
                            to_f32(values, row);
                            for ((codes, part), &scale) in codes.chunks_mut(width).zip(row.chunks(width)).zip(&*scales)
                            {
                                codes.iter_mut().zip(part).for_each(|(code, &x)| *code = cast::encode(x / scale));
                            }
                        }
                    },
                );
            },
        );
        Self::from_parts(shape, codes, scales, scaling)
    }

    /// Creates a weight from its codes `[out · in]` and the row-major scales of [`Fp8Scaling::grid`].
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Length`] if `codes` or `scales` does not match `shape`, and [`Error::Stored`] for a code
    /// or scale that is NaN or infinite.
    pub fn from_parts(shape: [usize; 2], codes: Vec<u8>, scales: Vec<f32>, scaling: Fp8Scaling) -> Result<Self, Error> {
        check(shape, scaling, "codes", element_count(shape)?, codes.len())?;
        let [rows, cols] = scaling.grid(shape);
        check(shape, scaling, "scales", rows * cols, scales.len())?;
        let damaged = |what: &str, index: usize| Error::Stored {
            key: what.to_owned(),
            reason: format!("{index} is NaN or infinite; the weight is damaged"),
        };
        if let Some(index) = codes.par_iter().position_any(|code| code & 0x7f == 0x7f) {
            return Err(damaged("code", index));
        }
        if let Some(index) = scales.iter().position(|scale| !scale.is_finite()) {
            return Err(damaged("scale", index));
        }
        Ok(Self { shape, codes, scales, scaling })
    }

    /// Returns the dense weight, row-major.
    pub fn dequantize<T: Element>(&self) -> Vec<T> {
        let mut out = vec![T::default(); self.codes.len()];
        let ([_, cols], [height, width]) = (self.shape, self.scaling.extent(self.shape));
        let [_, per_row] = self.scaling.grid(self.shape);
        out.par_chunks_mut(cols).zip(self.codes.par_chunks(cols)).enumerate().for_each(|(row, (out, codes))| {
            let scales = &self.scales[row / height * per_row..][..per_row];
            dispatch(
                #[inline(always)]
                || {
                    for ((out, codes), scale) in out.chunks_mut(width).zip(codes.chunks(width)).zip(scales) {
                        let values = codes.iter().map(|&code| T::from_f32(cast::decode(code) * scale));
                        out.iter_mut().zip(values).for_each(|(out, value)| *out = value);
                    }
                },
            );
        });
        out
    }

    /// Returns the shape `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// Returns the codes, row-major.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Returns the scales, row-major in the matrix of [`Fp8Scaling::grid`].
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Returns the elements that share a scale.
    pub fn scaling(&self) -> Fp8Scaling {
        self.scaling
    }

    /// Returns the codes and scales.
    pub fn into_parts(self) -> (Vec<u8>, Vec<f32>) {
        (self.codes, self.scales)
    }
}

/// The scale of elements with this largest magnitude.
fn scale_of(largest: f32) -> f32 {
    if largest == 0.0 { 1.0 } else { (largest / MAX).max(f32::MIN_POSITIVE) }
}

fn element_count(shape: [usize; 2]) -> Result<usize, Error> {
    match shape[0].checked_mul(shape[1]) {
        Some(0) => Err(Error::Empty { shape: shape.to_vec() }),
        // If the product overflows, no slice has that length, so the length check reports it.
        count => Ok(count.unwrap_or(usize::MAX)),
    }
}

fn check(shape: [usize; 2], scaling: Fp8Scaling, part: &'static str, expected: usize, got: usize) -> Result<(), Error> {
    if expected == got {
        return Ok(());
    }
    Err(Error::Length { shape: shape.to_vec(), rule: format!("fp8 codes and {}", scaling.name()), part, expected, got })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_by_hand() {
        // The first row has scale 1; 1.0625 is half way between 1 and 1.125 and goes to the even code. The second is zero.
        let weight = [448.0_f32, -1.0625, 0.001, 0.0, -0.0, 0.0];
        let fp8 = Fp8Tensor::quantize(&weight, [2, 3], Fp8Scaling::Row).expect("two rows of three");
        assert_eq!((fp8.codes(), fp8.scales()), (&[0x7e, 0xb8, 0x01, 0, 0x80, 0][..], &[1.0, 1.0][..]));
        assert_eq!(fp8.dequantize::<f32>(), [448.0, -1.0, 1.0 / 512.0, 0.0, -0.0, 0.0]);
        let tiny = Fp8Tensor::quantize(&[1e-45_f32], [1, 1], Fp8Scaling::Tensor).expect("one element");
        assert_eq!(tiny.scales(), [f32::MIN_POSITIVE]);
    }

    #[test]
    fn edges_are_blocks_of_their_own() {
        let (rows, cols) = (130, 129);
        let values: Vec<f32> = (0..rows * cols).map(|i| if i / cols < 128 { 1.0 } else { 2.0 }).collect();
        let fp8 = Fp8Tensor::quantize(&values, [rows, cols], Fp8Scaling::Block).expect("four blocks");
        assert_eq!(fp8.scales(), [1.0 / MAX, 1.0 / MAX, 2.0 / MAX, 2.0 / MAX]);
        assert!(fp8.codes().iter().all(|&code| code == 0x7e));
    }

    #[test]
    fn damaged_weights_are_refused() {
        let from = |shape, codes: &[u8], scales: &[f32], scaling| {
            Fp8Tensor::from_parts(shape, codes.to_vec(), scales.to_vec(), scaling).expect_err("refused").to_string()
        };
        let row = Fp8Scaling::Row;
        assert!(from([2, 1], &[0], &[1.0; 2], row).contains("fp8 codes and a scale per row needs 2 codes, got 1"));
        assert!(from([2, 1], &[0; 2], &[1.0], row).contains("needs 2 scales, got 1"));
        assert!(from([1, 2], &[0, 0xff], &[1.0], row).contains("\"code\" 1 is NaN"));
        assert!(from([1, 1], &[0], &[f32::INFINITY], Fp8Scaling::Tensor).contains("\"scale\" 0 is NaN or infinite"));
        assert!(Fp8Tensor::quantize(&[1.0, f32::NAN], [1, 2], row).is_err());
        assert!(Fp8Tensor::quantize(&[1.0, f32::INFINITY], [1, 2], row).is_err());
        assert!(Fp8Tensor::quantize_le_bytes(&[0; 4], Dtype::BF16, [usize::MAX, 1], row).is_err());
    }
}
