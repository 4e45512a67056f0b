use std::borrow::Cow;

use crate::element::not_a_float;
use crate::little_endian::{le_bf16_to_f32, le_f16_to_f32, le_f32_to_f32};
use crate::{Blocksize, DoubleQuant, Dtype, Element, Error, QuantConfig, QuantType, four_bit};

/// A 4-bit tensor: packed codes, scales, and the shape and dtype of the dense tensor it represents.
///
/// The lengths always match: `codes` is `[⌈n/2⌉]` and `absmax` is `[⌈n/blocksize⌉]` for the n > 0 elements of `shape`.
/// The formats are described in [`four_bit`] and [`double_quant`](crate::double_quant).
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedTensor {
    shape: Vec<usize>,
    dtype: Dtype,
    quant_type: QuantType,
    blocksize: Blocksize,
    codes: Vec<u8>,
    absmax: Absmax,
}

/// The block scales of a [`QuantizedTensor`].
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// Unquantized, in f32.
    Single(Vec<f32>),
    /// Quantized to 8 bits.
    Double(DoubleQuant),
}

impl QuantizedTensor {
    /// Quantizes the row-major `values` of a tensor of `shape`.
    ///
    /// # Errors
    /// [`Error::Empty`], or [`Error::Length`] if `values` does not match `shape`.
    pub fn quantize<T: Element>(values: &[T], shape: &[usize], config: &QuantConfig) -> Result<Self, Error> {
        let expected = element_count(shape)?;
        if values.len() != expected {
            return Err(length(shape, config.blocksize, "elements", expected, values.len()));
        }
        Self::from_encoded(four_bit::encode(values, config.quant_type, config.blocksize), shape, T::DTYPE, config)
    }

    /// Quantizes a tensor as stored in a file: little-endian elements of `dtype` at any alignment. Only one block at a
    /// time is copied from the dense tensor.
    ///
    /// # Errors
    /// [`Error::Empty`], [`Error::Length`] if `bytes` does not match `shape`, or [`Error::Dtype`].
    pub fn quantize_le_bytes(bytes: &[u8], dtype: Dtype, shape: &[usize], config: &QuantConfig) -> Result<Self, Error> {
        let expected = element_count(shape)?.saturating_mul(dtype.size());
        if bytes.len() != expected {
            return Err(length(shape, config.blocksize, "bytes", expected, bytes.len()));
        }
        let (quant_type, blocksize) = (config.quant_type, config.blocksize);
        let encoded = match dtype {
            Dtype::F32 => four_bit::encode_with(bytes.as_chunks().0, le_f32_to_f32, quant_type, blocksize),
            Dtype::F16 => four_bit::encode_with(bytes.as_chunks().0, le_f16_to_f32, quant_type, blocksize),
            Dtype::BF16 => four_bit::encode_with(bytes.as_chunks().0, le_bf16_to_f32, quant_type, blocksize),
            other => return Err(not_a_float(other)),
        };
        Self::from_encoded(encoded, shape, dtype, config)
    }

    fn from_encoded(
        (codes, absmax): (Vec<u8>, Vec<f32>),
        shape: &[usize],
        dtype: Dtype,
        config: &QuantConfig,
    ) -> Result<Self, Error> {
        let absmax =
            if config.double_quant { Absmax::Double(DoubleQuant::quantize(&absmax)) } else { Absmax::Single(absmax) };
        Self::from_parts(shape.to_vec(), dtype, config.quant_type, config.blocksize, codes, absmax)
    }

    /// Creates a tensor read from a file; `dtype` is the dtype of the original dense tensor.
    ///
    /// # Errors
    /// [`Error::Empty`], or [`Error::Length`] if `codes` or `absmax` does not match `shape`.
    pub fn from_parts(
        shape: Vec<usize>,
        dtype: Dtype,
        quant_type: QuantType,
        blocksize: Blocksize,
        codes: Vec<u8>,
        absmax: Absmax,
    ) -> Result<Self, Error> {
        let elements = element_count(&shape)?;
        let packed = elements.div_ceil(2);
        if codes.len() != packed {
            return Err(length(&shape, blocksize, "packed bytes", packed, codes.len()));
        }
        let blocks = blocksize.blocks(elements);
        if absmax.len() != blocks {
            return Err(length(&shape, blocksize, "absmax values", blocks, absmax.len()));
        }
        Ok(Self { shape, dtype, quant_type, blocksize, codes, absmax })
    }

    /// Returns the dense tensor, row-major.
    pub fn dequantize<T: Element>(&self) -> Vec<T> {
        let mut out = vec![T::default(); self.elements()];
        self.dequantize_into(&mut out);
        out
    }

    /// Writes the dense tensor to `out`.
    ///
    /// # Panics
    /// If the length of `out` is not the tensor's number of elements.
    pub fn dequantize_into<T: Element>(&self, out: &mut [T]) {
        assert_eq!(out.len(), self.elements(), "output of a tensor of shape {:?}", self.shape);
        four_bit::decode(&self.codes, &self.absmax.values(), self.quant_type, self.blocksize, out);
    }

    /// Returns the shape and dtype of the dense tensor, the codes and the scales.
    pub fn into_parts(self) -> (Vec<usize>, Dtype, Vec<u8>, Absmax) {
        (self.shape, self.dtype, self.codes, self.absmax)
    }

    /// Returns the shape of the dense tensor.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Returns the dtype of the original dense tensor.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Returns the quantization settings.
    pub fn config(&self) -> QuantConfig {
        let double_quant = matches!(self.absmax, Absmax::Double(_));
        QuantConfig { quant_type: self.quant_type, blocksize: self.blocksize, double_quant }
    }

    /// Returns the packed codes, two per byte with the even element in the high nibble.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Returns the scales, one per block.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// Returns the number of elements of the dense tensor.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the bytes of codes and scales, excluding tables shared by all tensors of a type.
    pub fn byte_len(&self) -> usize {
        self.codes.len() + self.absmax.byte_len()
    }

    /// Returns the bits per element, including scales.
    pub fn bits_per_weight(&self) -> f64 {
        8.0 * self.byte_len() as f64 / self.elements() as f64
    }
}

impl Absmax {
    /// Returns the scales in f32.
    pub fn values(&self) -> Cow<'_, [f32]> {
        match self {
            Self::Single(absmax) => Cow::Borrowed(absmax),
            Self::Double(double) => Cow::Owned(double.absmax()),
        }
    }

    /// Returns the bytes of the scales, including the offset of double quantization.
    pub fn byte_len(&self) -> usize {
        match self {
            Self::Single(absmax) => 4 * absmax.len(),
            Self::Double(double) => double.codes().len() + 4 * double.nested_absmax().len() + 4,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Single(absmax) => absmax.len(),
            Self::Double(double) => double.codes().len(),
        }
    }
}

fn element_count(shape: &[usize]) -> Result<usize, Error> {
    // If the product overflows, no slice has that length, so the length check reports it.
    match shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size)) {
        _ if shape.contains(&0) => Err(Error::Empty { shape: shape.to_vec() }),
        count => Ok(count.unwrap_or(usize::MAX)),
    }
}

fn length(shape: &[usize], blocksize: Blocksize, part: &'static str, expected: usize, got: usize) -> Error {
    Error::Length { shape: shape.to_vec(), rule: format!("blocksize {}", blocksize.get()), part, expected, got }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_must_match_the_shape() {
        let build = |shape: &[usize], codes, absmax| {
            let absmax = Absmax::Single(vec![1.0; absmax]);
            let parts = (Dtype::BF16, QuantType::Nf4, Blocksize::B64, vec![0; codes]);
            QuantizedTensor::from_parts(shape.to_vec(), parts.0, parts.1, parts.2, parts.3, absmax)
        };
        assert!(build(&[5, 13], 33, 2).is_ok());
        assert_eq!(
            build(&[5, 13], 33, 3).expect_err("65 elements are two blocks").to_string(),
            "shape [5, 13] with blocksize 64 needs 2 absmax values, got 3; the tensor is damaged or of another shape"
        );
        assert!(build(&[5, 13], 32, 2).is_err());
        assert!(build(&[usize::MAX, 3], 33, 2).is_err(), "a product that overflows");
        assert_eq!(build(&[7, 0, usize::MAX], 0, 0), Err(Error::Empty { shape: vec![7, 0, usize::MAX] }));
        assert!(build(&[], 1, 1).is_ok(), "a scalar has one element");
    }

    /// The bytes start one past every alignment, as in a memory map.
    #[test]
    fn unaligned_bytes_quantize_like_their_values() {
        fn check<T: Element>(to_bytes: impl Fn(T) -> Vec<u8>) {
            let values: Vec<T> = (0..3 * 1711).map(|i| T::from_f32((i as f32 * 0.73).sin() * 0.02)).collect();
            let file: Vec<u8> = [7].into_iter().chain(values.iter().flat_map(|&v| to_bytes(v))).collect();
            for quant_type in QuantType::ALL {
                for double_quant in [false, true] {
                    let config = QuantConfig { quant_type, double_quant, ..QuantConfig::default() };
                    let ours = QuantizedTensor::quantize_le_bytes(&file[1..], T::DTYPE, &[3, 1711], &config);
                    assert_eq!(ours, QuantizedTensor::quantize(&values, &[3, 1711], &config), "{:?}", T::DTYPE);
                }
            }
            let short = QuantizedTensor::quantize_le_bytes(&file[2..], T::DTYPE, &[3, 1711], &QuantConfig::default());
            let message = short.expect_err("a byte is missing").to_string();
            let needed = 5133 * T::DTYPE.size();
            assert!(message.contains(&format!("needs {needed} bytes, got {}", needed - 1)), "{message}");
        }
        check::<f32>(|v| v.to_le_bytes().to_vec());
        check::<half::f16>(|v| v.to_le_bytes().to_vec());
        check::<half::bf16>(|v| v.to_le_bytes().to_vec());
    }

    #[test]
    fn large_tensors_use_the_bits_the_config_reports() {
        let config = QuantConfig::default();
        let tensor = QuantizedTensor::quantize(&vec![0.5f32; 1 << 20], &[1024, 1024], &config).expect("shape fits");
        // The offset adds 32 bits.
        assert_eq!(tensor.bits_per_weight(), config.bits_per_weight() + 32.0 / (1 << 20) as f64);
        assert_eq!(tensor.config(), config);
    }
}
