//! Double quantization: the f32 scales of 4-bit blocks, quantized to 8 bits.
//!
//! offset = mean(absmax); absmax − offset is quantized with the signed [`DynamicMap`] in blocks of 256, whose f32
//! scales are `nested_absmax`. Decoding is in f32 with a rounding after the product and another after the sum (never a
//! fused multiply-add):
//!
//! absmax ≈ value(code) · nested_absmax + offset.
//!
//! bitsandbytes computes the mean in f32 with an unspecified summation order; this crate uses an f64 mean, which is
//! within 2 ulp of it. [`DoubleQuant::with_offset`] reproduces its bits for a given offset.

use crate::{Blocksize, DynamicMap, Error, blockwise};

/// The scales of one tensor in 8 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleQuant {
    codes: Vec<u8>,
    nested_absmax: Vec<f32>,
    blocksize: Blocksize,
    offset: f32,
    map: DynamicMap,
}

impl DoubleQuant {
    /// Quantizes `absmax` around its mean.
    pub fn quantize(absmax: &[f32]) -> Self {
        let sum: f64 = absmax.iter().map(|&a| f64::from(a)).sum();
        Self::with_offset(absmax, (sum / absmax.len().max(1) as f64) as f32)
    }

    /// Quantizes `absmax` around `offset`.
    pub fn with_offset(absmax: &[f32], offset: f32) -> Self {
        let (map, blocksize) = (DynamicMap::signed(), Blocksize::B256);
        let centre = |absmax: &[f32], centred: &mut [f32]| {
            centred.iter_mut().zip(absmax).for_each(|(centred, absmax)| *centred = absmax - offset);
        };
        let (codes, nested_absmax) = blockwise::encode_with(absmax, centre, &map, blocksize);
        Self { codes, nested_absmax, blocksize, offset, map }
    }

    /// Creates scales read from a file.
    ///
    /// # Errors
    /// [`Error::Length`] if `nested_absmax` is not `[⌈codes/blocksize⌉]`.
    pub fn from_parts(
        codes: Vec<u8>,
        nested_absmax: Vec<f32>,
        blocksize: Blocksize,
        offset: f32,
        map: DynamicMap,
    ) -> Result<Self, Error> {
        let expected = blocksize.blocks(codes.len());
        if nested_absmax.len() != expected {
            return Err(Error::Length {
                shape: vec![codes.len()],
                rule: format!("nested_blocksize {}", blocksize.get()),
                part: "nested_absmax values",
                expected,
                got: nested_absmax.len(),
            });
        }
        Ok(Self { codes, nested_absmax, blocksize, offset, map })
    }

    /// Returns the decoded scales, one per code.
    pub fn absmax(&self) -> Vec<f32> {
        let mut absmax = vec![0.0; self.codes.len()];
        blockwise::decode(&self.codes, &self.nested_absmax, &self.map, self.blocksize, &mut absmax);
        absmax.iter_mut().for_each(|a| *a += self.offset);
        absmax
    }

    /// Returns the 8-bit codes, one per 4-bit block.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Returns the same as [`codes`](Self::codes), by value.
    pub fn into_codes(self) -> Vec<u8> {
        self.codes
    }

    /// Returns the nested scales, one per `blocksize` codes.
    pub fn nested_absmax(&self) -> &[f32] {
        &self.nested_absmax
    }

    /// Returns the number of codes that share a nested scale.
    pub fn blocksize(&self) -> Blocksize {
        self.blocksize
    }

    /// Returns the offset added to every decoded scale.
    pub fn offset(&self) -> f32 {
        self.offset
    }

    /// Returns the values of the codes.
    pub fn map(&self) -> &DynamicMap {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_by_hand() {
        // The mean is 2, the differences −1, 0, 1 and the nested scale 1; −1 rounds to the lowest value, −0.992969.
        let double = DoubleQuant::quantize(&[1.0, 2.0, 3.0]);
        assert_eq!((double.codes(), double.offset()), (&[0, 127, 255][..], 2.0));
        assert_eq!(double.nested_absmax(), [1.0]);
        assert_eq!(double.absmax(), [2.0 - 0.992_968_74, 2.0, 3.0]);
    }

    #[test]
    fn the_error_is_within_half_the_widest_gap_of_the_nested_scale() {
        let absmax: Vec<f32> = (0..1000).map(|i| 0.03 + ((i * 7919) % 1000) as f32 * 2e-5).collect();
        let double = DoubleQuant::quantize(&absmax);
        let widest = double.map().values().windows(2).map(|w| w[1] - w[0]).fold(0.0, f32::max);
        for (i, (a, b)) in absmax.iter().zip(double.absmax()).enumerate() {
            // The gap plus one rounding of the sum.
            let bound = double.nested_absmax()[i / 256] * widest / 2.0 + a * f32::EPSILON;
            assert!((a - b).abs() <= bound, "scale {i}: {a} became {b}");
        }
    }

    #[test]
    fn nested_scales_must_match_the_codes() {
        let error = DoubleQuant::from_parts(vec![0; 257], vec![1.0], Blocksize::B256, 0.0, DynamicMap::signed());
        assert_eq!(
            error.expect_err("257 codes are two blocks").to_string(),
            "shape [257] with nested_blocksize 256 needs 2 nested_absmax values, got 1; \
             the tensor is damaged or of another shape"
        );
    }
}
