//! The format of a quantized weight, as one value.

use core::fmt;

#[cfg(feature = "linear")]
use rekindle_kernels::quantized::QuantizedData;

use crate::bnb::{FourBitWeight, StoredWeight};
use crate::fp8::{Fp8Scaling, Fp8Tensor, Fp8Weight};
use crate::little_endian::to_f32;
#[cfg(feature = "linear")]
use crate::mxfp4;
use crate::{Blocksize, Dtype, Error, Int8Tensor, Mxfp4Tensor, QuantConfig, QuantizedTensor};

/// The format of a quantized weight: the description that loading, saving, merging, plans and configurations share.
///
/// A new format is a variant here and one of [`StoredWeight`], whose matches name every part that it needs: a codec, its
/// keys and its JSON in a checkpoint, and its data on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QuantFormat {
    /// NF4 or FP4 in blocks.
    FourBit(QuantConfig),
    /// LLM.int8(): 8-bit rows.
    Int8,
    /// MXFP4: 4-bit floating-point codes in blocks of 32.
    Mxfp4,
    /// 8-bit floats (E4M3).
    Fp8(Fp8Scaling),
}

impl QuantFormat {
    /// Returns the bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Self::FourBit(_) | Self::Mxfp4 => 4,
            Self::Int8 | Self::Fp8(_) => 8,
        }
    }

    /// Returns true if weights in this format can be trained: quantized scales cannot follow new values, and fp8 has no
    /// kernel for it.
    pub const fn is_trainable(self) -> bool {
        match self {
            Self::FourBit(config) => !config.double_quant,
            Self::Int8 => true,
            Self::Mxfp4 | Self::Fp8(_) => false,
        }
    }

    /// Returns the number of elements that share a scale, where a user chooses it.
    pub const fn blocksize(self) -> Option<Blocksize> {
        match self {
            Self::FourBit(config) => Some(config.blocksize),
            Self::Int8 | Self::Mxfp4 | Self::Fp8(_) => None,
        }
    }

    /// Quantizes a weight as stored in a file: little-endian elements of `dtype` at any alignment.
    ///
    /// # Errors
    /// [`Error::Empty`], and [`Error::Length`] if `bytes` does not match `shape`, or rows are not whole MXFP4 blocks;
    /// [`Error::Stored`] for an infinity or NaN to fp8.
    pub fn quantize(self, bytes: &[u8], dtype: Dtype, shape: &[usize]) -> Result<StoredWeight, Error> {
        match self {
            Self::FourBit(config) => QuantizedTensor::quantize_le_bytes(bytes, dtype, shape, &config)
                .map(|tensor| StoredWeight::FourBit(FourBitWeight::new(tensor))),
            Self::Int8 => Int8Tensor::quantize_le_bytes(bytes, dtype, rows_of(shape)).map(StoredWeight::Int8),
            Self::Fp8(scaling) => Fp8Tensor::quantize_le_bytes(bytes, dtype, rows_of(shape), scaling)
                .map(|tensor| StoredWeight::Fp8(Fp8Weight::new(tensor))),
            Self::Mxfp4 => Mxfp4Tensor::quantize(&to_f32(bytes, dtype)?, shape).map(StoredWeight::Mxfp4),
        }
    }

    /// Returns the device data of a weight `[out, in]` that is all zeros: as long as any other of its shape.
    #[cfg(feature = "linear")]
    pub fn zeros(self, dims: [usize; 2]) -> QuantizedData {
        self.stacked_zeros(dims, 1)
    }

    /// Returns the device data of a weight `[out, in]` that is all zeros and stacked from `parts` weights of one shape.
    #[cfg(feature = "linear")]
    pub fn stacked_zeros(self, dims: [usize; 2], parts: usize) -> QuantizedData {
        match self {
            Self::FourBit(config) => {
                let (blocksize, nested) = (config.blocksize.get(), Blocksize::B256.get());
                // The scales of stacked weights stay quantized where those of each fill their blocks.
                let fills = parts == 1 || (dims[0] / parts * dims[1]).is_multiple_of(blocksize * nested);
                let nested = (config.double_quant && fills).then_some(nested);
                QuantizedData::four_bit_zeros(dims, parts, blocksize, nested)
            }
            Self::Int8 => QuantizedData::int8_zeros(dims),
            Self::Fp8(scaling) => QuantizedData::fp8_zeros(dims, parts, scaling.into()),
            Self::Mxfp4 => {
                let blocks = dims[0] / parts * dims[1] / mxfp4::BLOCK;
                QuantizedData::four_bit_zeros(dims, parts, mxfp4::BLOCK, Some(crate::linear::mxfp4_nesting(blocks)))
            }
        }
    }
}

/// Writes the name used in messages: `4-bit (nf4)`, `8-bit (LLM.int8())`.
impl fmt::Display for QuantFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FourBit(config) => write!(f, "4-bit ({})", config.quant_type.name()),
            Self::Int8 => f.write_str("8-bit (LLM.int8())"),
            Self::Mxfp4 => f.write_str("4-bit (MXFP4)"),
            Self::Fp8(scaling) => write!(f, "fp8 (E4M3, {})", scaling.name()),
        }
    }
}

/// Returns a shape as rows of the last dimension.
fn rows_of(shape: &[usize]) -> [usize; 2] {
    let cols = shape.last().copied().unwrap_or(1);
    [shape.iter().product::<usize>() / cols.max(1), cols]
}

/// Returns the shape of a linear layer's weight, `[out, in]`.
#[cfg(feature = "linear")]
pub(crate) fn matrix(shape: &[usize]) -> Result<[usize; 2], Error> {
    shape.try_into().map_err(|_| Error::Stored {
        key: "weight".to_owned(),
        reason: format!("has shape {shape:?}; a linear layer's weight is [out, in]"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::QuantType;

    #[test]
    fn every_format_names_its_weights() {
        let values: Vec<u8> = (0..64 * 3).flat_map(|i| ((i as f32 * 0.7).sin() * 0.1).to_le_bytes()).collect();
        let single = QuantConfig { quant_type: QuantType::Fp4, double_quant: false, ..QuantConfig::default() };
        let four_bit = QuantFormat::FourBit(QuantConfig::default());
        let fp8 = QuantFormat::Fp8(Fp8Scaling::Row);
        let formats = [four_bit, QuantFormat::FourBit(single), QuantFormat::Int8, QuantFormat::Mxfp4, fp8];
        for format in formats {
            let weight = format.quantize(&values, Dtype::F32, &[3, 64]).expect("the shape fits");
            assert_eq!((weight.format(), weight.shape()), (format, vec![3, 64]));
            let dense = match format {
                QuantFormat::FourBit(_) => Dtype::F32,
                QuantFormat::Int8 => Dtype::F16,
                QuantFormat::Mxfp4 | QuantFormat::Fp8(_) => Dtype::BF16,
            };
            assert_eq!(weight.dense_dtype(), dense);
            let decoded: Vec<f32> = weight.dequantize();
            assert_eq!(decoded.len(), 3 * 64);
        }
        assert_eq!(formats.map(QuantFormat::is_trainable), [false, true, true, false, false]);
        assert_eq!(
            formats.map(|format| format.to_string()),
            ["4-bit (nf4)", "4-bit (fp4)", "8-bit (LLM.int8())", "4-bit (MXFP4)", "fp8 (E4M3, a scale per row)"]
        );
    }
}
