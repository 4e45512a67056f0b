//! MXFP4: 4-bit floating-point codes in blocks of 32 along the input, which share a power of two.
//!
//! decoded = value(code) · 2^(scale − 127), with the sixteen values of E2M1 ([`VALUES`]) and one byte of scale a block
//! (E8M0). Codes are packed row-major with the **even element in the low nibble**; a row is a whole number of blocks.
//! A weight in 16 bits holds every decoded value exactly.
//!
//! A checkpoint of gpt-oss has the experts of a layer in this format, all of them in one pair of tensors:
//!
//! | key | stored as | holds |
//! |---|---|---|
//! | `experts.gate_up_proj_blocks` | u8 `[experts, out, in / 32, 16]` | codes |
//! | `experts.gate_up_proj_scales` | u8 `[experts, out, in / 32]` | scales |
//!
//! Source: OCP Microscaling Formats 1.0; transformers' `integrations/mxfp4.py`. Tested by
//! `tests/goldens/families/gpt-oss/mxfp4`.

use std::borrow::Cow;

use crate::bnb::RawTensor;
use crate::{Dtype, Element, Error};

/// Elements that share a scale.
pub const BLOCK: usize = 32;

/// The values of the codes.
pub const VALUES: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The scale that stands for NaN.
const NAN: u8 = 255;

/// The exponent of the largest value.
const LARGEST_EXPONENT: i32 = 2;

/// The end of the key of a weight's codes.
pub const BLOCKS: &str = "_blocks";

/// The end of the key of a weight's scales.
pub const SCALES: &str = "_scales";

/// A tensor in MXFP4. Its last dimension is a multiple of [`BLOCK`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mxfp4Tensor {
    shape: Vec<usize>,
    codes: Vec<u8>,
    scales: Vec<u8>,
}

impl Mxfp4Tensor {
    /// Creates a tensor `[.., in]` from codes and scales as a file has them.
    ///
    /// # Errors
    /// [`Error::Length`] if `in` is not a whole number of blocks or a length does not match, [`Error::Stored`] for a
    /// scale that stands for NaN.
    pub fn from_parts(shape: Vec<usize>, codes: Vec<u8>, scales: Vec<u8>) -> Result<Self, Error> {
        let length = |part, expected, got| Error::Length {
            shape: shape.clone(),
            rule: format!("MXFP4 blocks of {BLOCK}"),
            part,
            expected,
            got,
        };
        let input = shape.last().copied().unwrap_or(1);
        if !input.is_multiple_of(BLOCK) {
            return Err(length("elements in whole blocks of a row", input.next_multiple_of(BLOCK), input));
        }
        let elements: usize = shape.iter().product();
        for (part, expected, got) in
            [("bytes of codes", elements / 2, codes.len()), ("scales", elements / BLOCK, scales.len())]
        {
            if expected != got {
                return Err(length(part, expected, got));
            }
        }
        if let Some(block) = scales.iter().position(|&scale| scale == NAN) {
            let reason = format!("of block {block} is 255, which stands for NaN; the tensor is damaged");
            return Err(Error::Stored { key: "scale".to_owned(), reason });
        }
        Ok(Self { shape, codes, scales })
    }

    /// Quantizes a tensor `[.., in]`: a block's scale has the exponent of its largest magnitude, less that of the largest
    /// code, and values go to the nearest code, ties to the even one.
    ///
    /// # Errors
    /// As [`from_parts`](Self::from_parts).
    pub fn quantize<T: Element>(values: &[T], shape: &[usize]) -> Result<Self, Error> {
        let mut wide = vec![0.0; values.len()];
        T::to_f32_slice(values, &mut wide);
        let (mut codes, mut scales) = (Vec::with_capacity(wide.len() / 2), Vec::with_capacity(wide.len() / BLOCK));
        for block in wide.chunks(BLOCK) {
            let largest = block.iter().fold(f32::MIN_POSITIVE, |largest, x| largest.max(x.abs()));
            let exponent = exponent(largest) - LARGEST_EXPONENT;
            let scale = (exponent + 127).clamp(0, 254) as u8;
            scales.push(scale);
            let by = power(scale).recip();
            codes.extend(block.chunks(2).map(|pair| {
                let code = |at: usize| pair.get(at).map_or(0, |&x| code(x * by));
                code(0) | code(1) << 4
            }));
        }
        Self::from_parts(shape.to_vec(), codes, scales)
    }

    /// Reads the weight `name`, or returns `None` if the checkpoint has none of that name in MXFP4.
    ///
    /// # Errors
    /// [`Error::MissingKey`] for codes or scales alone, [`Error::Stored`] for another dtype or number of blocks, and those
    /// of [`from_parts`](Self::from_parts).
    pub fn read<'a>(name: &str, find: impl Fn(&str) -> Option<RawTensor<'a>>) -> Result<Option<Self>, Error> {
        let [blocks_key, scales_key] = [BLOCKS, SCALES].map(|suffix| format!("{name}{suffix}"));
        let (blocks, scales) = match (find(&blocks_key), find(&scales_key)) {
            (None, None) => return Ok(None),
            (Some(blocks), Some(scales)) => (blocks, scales),
            (Some(_), None) => return Err(Error::MissingKey { name: blocks_key, key: scales_key }),
            (None, Some(_)) => return Err(Error::MissingKey { name: scales_key, key: blocks_key }),
        };
        blocks.expect(Dtype::U8, &blocks_key)?;
        scales.expect(Dtype::U8, &scales_key)?;
        let [rest @ .., per_row, bytes] = blocks.shape.as_slice() else {
            let reason = format!("has shape {:?}, expected [.., out, in / {BLOCK}, {}]", blocks.shape, BLOCK / 2);
            return Err(Error::Stored { key: blocks_key, reason });
        };
        let of_scales = [rest, &[*per_row]].concat();
        if *bytes != BLOCK / 2 || scales.shape != of_scales {
            let reason = format!(
                "has shape {:?} and \"{scales_key}\" {:?}; blocks of {BLOCK} are [.., out, in / {BLOCK}, {}] with one scale \
                 each",
                blocks.shape,
                scales.shape,
                BLOCK / 2
            );
            return Err(Error::Stored { key: blocks_key, reason });
        }
        let shape = [rest, &[per_row * BLOCK]].concat();
        Self::from_parts(shape, blocks.bytes.into_owned(), scales.bytes.into_owned()).map(Some)
    }

    /// Returns the tensors to write, by the suffix appended to the weight's name.
    pub fn write(&self) -> Vec<(&'static str, RawTensor<'_>)> {
        let [rest @ .., input] = self.shape.as_slice() else { unreachable!("a scalar is no block") };
        let per_row = input / BLOCK;
        let tensor = |shape: Vec<usize>, bytes| RawTensor { dtype: Dtype::U8, shape, bytes: Cow::Borrowed(bytes) };
        vec![
            (BLOCKS, tensor([rest, &[per_row, BLOCK / 2]].concat(), &self.codes[..])),
            (SCALES, tensor([rest, &[per_row]].concat(), &self.scales[..])),
        ]
    }

    /// Returns the dense tensor, row-major.
    pub fn dequantize<T: Element>(&self) -> Vec<T> {
        let blocks = self.codes.chunks_exact(BLOCK / 2).zip(&self.scales);
        let values = blocks.flat_map(|(codes, &scale)| {
            let scale = power(scale);
            let value = move |code: u8| T::from_f32(VALUES[usize::from(code)] * scale);
            codes.iter().flat_map(move |byte| [value(byte & 15), value(byte >> 4)])
        });
        values.collect()
    }

    /// The same elements in another shape.
    ///
    /// # Errors
    /// As [`from_parts`](Self::from_parts).
    pub fn reshaped(self, shape: Vec<usize>) -> Result<Self, Error> {
        Self::from_parts(shape, self.codes, self.scales)
    }

    /// Returns the shape of the dense tensor.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Returns the shape, the codes and the scales.
    pub fn into_parts(self) -> (Vec<usize>, Vec<u8>, Vec<u8>) {
        (self.shape, self.codes, self.scales)
    }
}

/// 2^(scale − 127).
pub(crate) fn power(scale: u8) -> f32 {
    match scale {
        0 => f32::from_bits(1 << 22),
        scale => f32::from_bits(u32::from(scale) << 23),
    }
}

/// ⌊log₂ x⌋ of a normal number.
fn exponent(x: f32) -> i32 {
    (x.to_bits() >> 23 & 255) as i32 - 127
}

/// The nearest code, of two equally near ones the even one.
fn code(x: f32) -> u8 {
    // The middles between neighbouring magnitudes; a tie rounds up where the upper code is even.
    const MIDDLES: [f32; 7] = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
    let magnitude = x.abs();
    let above = |(index, middle): (usize, &f32)| magnitude > *middle || (magnitude == *middle && index % 2 == 1);
    let code = MIDDLES.iter().enumerate().take_while(|&at| above(at)).count() as u8;
    if x < 0.0 { code | 8 } else { code }
}

/// Exchanges the nibbles of every byte, between the order of files and that of devices.
#[cfg(feature = "linear")]
pub(crate) fn swapped(mut codes: Vec<u8>) -> Vec<u8> {
    codes.iter_mut().for_each(|byte| *byte = byte.rotate_left(4));
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_by_hand() {
        let mut values = vec![0.0_f32; 64];
        values[..6].copy_from_slice(&[6.0, -0.5, 0.25, 0.75, 2.5, 5.0]);
        values[32..34].copy_from_slice(&[0.75, -0.1]);
        let tensor = Mxfp4Tensor::quantize(&values, &[2, 32]).expect("it is valid");
        let (_, codes, scales) = tensor.clone().into_parts();
        assert_eq!(scales, [127, 124]);
        // 0.25 and 2.5 go down to an even code, 0.75 and 5 to 1 and 4.
        assert_eq!(codes[..3], [7 | 9 << 4, 2 << 4, 4 | 6 << 4]);
        let back: Vec<f32> = tensor.dequantize();
        assert_eq!(back[..6], [6.0, -0.5, 0.0, 1.0, 2.0, 4.0]);
        assert_eq!(back[32..34], [0.75, -0.125]);
    }

    #[test]
    fn tensors_are_written_as_they_were_read() {
        let values: Vec<f32> = (0..2 * 3 * 64).map(|i| (i as f32 * 0.7).sin()).collect();
        let tensor = Mxfp4Tensor::quantize(&values, &[2, 3, 64]).expect("it is valid");
        let stored = tensor.write();
        let find =
            |key: &str| stored.iter().find(|(suffix, _)| format!("w{suffix}") == key).map(|(_, raw)| raw.clone());
        assert_eq!(stored[0].1.shape, [2, 3, 2, 16]);
        assert_eq!(Mxfp4Tensor::read("w", find).expect("it is valid"), Some(tensor.clone()));
        assert_eq!(Mxfp4Tensor::read("v", find).expect("it is valid"), None);
        let alone = |key: &str| find(key).filter(|_| key.ends_with(BLOCKS));
        let error = Mxfp4Tensor::read("w", alone).expect_err("it is refused").to_string();
        assert!(error.contains("no \"w_scales\", which \"w_blocks\" needs"), "{error}");
        let short = |key: &str| {
            let mut raw = find(key)?;
            if key.ends_with(SCALES) {
                raw.shape = vec![2, 3, 1];
            }
            Some(raw)
        };
        let error = Mxfp4Tensor::read("w", short).expect_err("it is refused").to_string();
        assert!(error.starts_with("\"w_blocks\" has shape [2, 3, 2, 16] and \"w_scales\" [2, 3, 1];"), "{error}");
    }

    #[test]
    fn damaged_blocks_are_refused() {
        let from = |shape: &[usize], codes, scale| {
            Mxfp4Tensor::from_parts(shape.to_vec(), vec![0; codes], vec![scale; 2])
                .expect_err("it is refused")
                .to_string()
        };
        assert!(from(&[2, 33], 33, 1).contains("needs 64 elements in whole blocks of a row, got 33"));
        assert!(from(&[2, 32], 31, 1).contains("needs 32 bytes of codes, got 31"));
        assert!(from(&[3, 32], 48, 1).contains("needs 3 scales, got 2"));
        assert!(from(&[2, 32], 32, 255).contains("of block 0 is 255, which stands for NaN"));
    }
}
