use rayon::prelude::*;

use super::{encode_row, round_to_f16};
use crate::Element;
use crate::simd::dispatch;

/// Activations `[tokens, in]` quantized for LLM.int8(): 8-bit codes, and the columns excluded from quantization.
///
/// x is first rounded to f16. An **outlier** is an element with |x| ≥ threshold. A column that contains one is an
/// outlier column, and its codes are all 0. For the other columns
///
/// SCA = max |x| of the row without its outliers; code = rint(x · (127 · 1/SCA)).
///
/// As in bitsandbytes, elements below the threshold contribute to SCA even in outlier columns, and threshold 0 excludes
/// nothing.
///
/// # Edge cases
/// NaN elements get code 0 and are not outliers; ±∞ is an outlier. SCA is −0 for a row of only NaN and outliers.
///
/// Source: bitsandbytes 0.50 `int8_vectorwise_quant`; tested by `goldens/int8_matmul.safetensors`.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedActivations {
    codes: Vec<i8>,
    sca: Vec<f32>,
    outlier_columns: Vec<usize>,
}

impl QuantizedActivations {
    /// Quantizes `x`, rows of `columns` elements. The threshold is rounded to f16 like x; LLM.int8() uses 6.
    ///
    /// # Panics
    /// If `columns` is 0 or does not divide the number of elements.
    pub fn quantize<T: Element>(x: &[T], columns: usize, threshold: f32) -> Self {
        assert!(x.len().is_multiple_of(columns), "{} elements in rows of {columns}", x.len());
        // Comparing with NaN is always false, so no element is an outlier.
        let threshold = if threshold > 0.0 { round_to_f16(threshold) } else { f32::NAN };
        let mut codes = vec![0; x.len()];
        let mut sca = vec![0.0; x.len() / columns];
        let buffers = || (vec![0.0; columns], vec![false; columns]);
        let outliers = x
            .par_chunks(columns)
            .zip(codes.par_chunks_mut(columns))
            .zip(&mut sca)
            .fold(buffers, |(mut row, mut outliers), ((x, codes), sca)| {
                dispatch(
                    #[inline(always)]
                    || {
                        T::to_f32_slice(x, &mut row);
                        for (x, outlier) in row.iter_mut().zip(&mut outliers) {
                            let half = round_to_f16(*x);
                            let above = half.abs() >= threshold;
                            *outlier |= above;
                            // NaN does not affect the scale, and its code is 0.
                            *x = if above { f32::NAN } else { half };
                        }
                        *sca = encode_row(&row, codes);
                    },
                );
                (row, outliers)
            })
            .map(|(_, outliers)| outliers)
            .reduce(|| vec![false; columns], |a, b| a.iter().zip(b).map(|(a, b)| a | b).collect());
        let outlier_columns: Vec<usize> = (0..columns).filter(|&column| outliers[column]).collect();
        if !outlier_columns.is_empty() {
            codes.par_chunks_mut(columns).for_each(|row| outlier_columns.iter().for_each(|&column| row[column] = 0));
        }
        Self { codes, sca, outlier_columns }
    }

    /// Returns the codes `[tokens, in]`, row-major.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// Returns the scale of each token.
    pub fn sca(&self) -> &[f32] {
        &self.sca
    }

    /// Returns the columns that are multiplied in the activations' own precision, ascending.
    pub fn outlier_columns(&self) -> &[usize] {
        &self.outlier_columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_with_an_outlier_is_excluded() {
        // Column 1 has an outlier in row 0; its 4 in row 1 is still that row's largest element.
        let x = [1.0f32, 6.0, -2.0, 0.5, 4.0, 1.0];
        let quantized = QuantizedActivations::quantize(&x, 3, 6.0);
        assert_eq!(quantized.outlier_columns(), [1]);
        assert_eq!(quantized.sca(), [2.0, 4.0]);
        // 63.5 rounds to the even 64; the others are 127/8 = 15.875 and 31.75.
        assert_eq!(quantized.codes(), [64, 0, -127, 16, 0, 32]);
    }

    #[test]
    fn threshold_zero_excludes_nothing() {
        let quantized = QuantizedActivations::quantize(&[100.0f32, 50.0, f32::NAN], 3, 0.0);
        assert_eq!((quantized.codes(), quantized.sca()), (&[127, 64, 0][..], &[100.0][..]));
        assert!(quantized.outlier_columns().is_empty());
    }
}
