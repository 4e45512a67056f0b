use rayon::prelude::*;

use super::{encode_row, round_to_f16};
use crate::Element;
use crate::simd::dispatch;

/// Activations `[tokens, in]` as LLM.int8() multiplies them: 8-bit codes, and the columns that are left out.
///
/// With x rounded to f16 first: an **outlier** is an element with |x| ≥ threshold, and a column that has one is an
/// outlier column, whose codes are all 0. For the rest
///
/// SCA = max |x| of the row without its outliers; code = rint(x · (127 · 1/SCA)).
///
/// As in bitsandbytes, the elements below the threshold count towards SCA in outlier columns too, and threshold 0
/// leaves nothing out.
///
/// # Edges
/// NaN elements get code 0 and make no outlier; ±∞ is an outlier. SCA of a row that has neither zeros nor other
/// elements below the threshold is −0.
///
/// Source: bitsandbytes 0.50 `int8_vectorwise_quant`; held by `goldens/int8_matmul.safetensors`.
#[derive(Debug, Clone, PartialEq)]
pub struct Activations {
    codes: Vec<i8>,
    sca: Vec<f32>,
    outlier_columns: Vec<usize>,
}

impl Activations {
    /// Quantizes `x`, rows of `columns` elements. The threshold is rounded to f16, as x is; LLM.int8() has 6.
    ///
    /// # Panics
    /// When `columns` does not divide the number of elements, or is 0.
    pub fn quantize<T: Element>(x: &[T], columns: usize, threshold: f32) -> Self {
        assert!(x.len().is_multiple_of(columns), "{} elements in rows of {columns}", x.len());
        // Nothing is as large as NaN.
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
                        T::widen(x, &mut row);
                        for (x, outlier) in row.iter_mut().zip(&mut outliers) {
                            let half = round_to_f16(*x);
                            let above = half.abs() >= threshold;
                            *outlier |= above;
                            // NaN counts neither towards the scale nor has it a code.
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

    /// The codes `[tokens, in]`, row-major.
    pub fn codes(&self) -> &[i8] {
        &self.codes
    }

    /// The scale of each token.
    pub fn sca(&self) -> &[f32] {
        &self.sca
    }

    /// The columns that are multiplied in the activations' own precision, ascending.
    pub fn outlier_columns(&self) -> &[usize] {
        &self.outlier_columns
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_column_with_an_outlier_is_left_out() {
        // Column 1 has an outlier in row 0; its 4 in row 1 still is that row's largest.
        let x = [1.0f32, 6.0, -2.0, 0.5, 4.0, 1.0];
        let quantized = Activations::quantize(&x, 3, 6.0);
        assert_eq!(quantized.outlier_columns(), [1]);
        assert_eq!(quantized.sca(), [2.0, 4.0]);
        // 63.5 goes to the even 64; 127/8 = 15.875 and 31.75.
        assert_eq!(quantized.codes(), [64, 0, -127, 16, 0, 32]);
    }

    #[test]
    fn threshold_zero_leaves_nothing_out() {
        let quantized = Activations::quantize(&[100.0f32, 50.0, f32::NAN], 3, 0.0);
        assert_eq!((quantized.codes(), quantized.sca()), (&[127, 64, 0][..], &[100.0][..]));
        assert!(quantized.outlier_columns().is_empty());
    }
}
