use super::{FourBitWeight, RawTensor, read_int8, write_int8};
use crate::fp8::Fp8Weight;
use crate::{Dtype, Element, Error, Int8Tensor, Mxfp4Tensor, QuantFormat};

/// A quantized weight of a checkpoint, in any [`QuantFormat`].
#[derive(Debug, Clone, PartialEq)]
pub enum StoredWeight {
    /// NF4 or FP4.
    FourBit(FourBitWeight),
    /// LLM.int8().
    Int8(Int8Tensor),
    /// MXFP4.
    Mxfp4(Mxfp4Tensor),
    /// fp8.
    Fp8(Fp8Weight),
}

impl StoredWeight {
    /// Reads the weight `name` (`…q_proj.weight`), or returns `None` if the checkpoint has no quantized weight of that
    /// name. `find` returns the tensor of a key.
    ///
    /// # Errors
    /// The same as [`FourBitWeight::read`], [`read_int8`], [`Mxfp4Tensor::read`] and [`Fp8Weight::read`].
    pub fn read<'a>(name: &str, find: impl Fn(&str) -> Option<RawTensor<'a>>) -> Result<Option<Self>, Error> {
        if let Some(weight) = FourBitWeight::read(name, &find)? {
            return Ok(Some(Self::FourBit(weight)));
        }
        if let Some(tensor) = Mxfp4Tensor::read(name, &find)? {
            return Ok(Some(Self::Mxfp4(tensor)));
        }
        if let Some(weight) = Fp8Weight::read(name, &find)? {
            return Ok(Some(Self::Fp8(weight)));
        }
        let Some(module) = name.strip_suffix(".weight") else { return Ok(None) };
        Ok(read_int8(module, find)?.map(Self::Int8))
    }

    /// Returns the tensors to write, by key.
    pub fn write(&self, name: &str) -> Vec<(String, RawTensor<'_>)> {
        let (prefix, tensors) = match self {
            Self::FourBit(weight) => (name, weight.write()),
            Self::Int8(tensor) => (name.strip_suffix(".weight").unwrap_or(name), write_int8(tensor)),
            Self::Mxfp4(tensor) => (name, tensor.write()),
            Self::Fp8(weight) => return weight.write(name),
        };
        tensors.into_iter().map(|(suffix, tensor)| (format!("{prefix}{suffix}"), tensor)).collect()
    }

    /// Returns the format.
    pub fn format(&self) -> QuantFormat {
        match self {
            Self::FourBit(weight) => QuantFormat::FourBit(weight.tensor.config()),
            Self::Int8(_) => QuantFormat::Int8,
            Self::Mxfp4(_) => QuantFormat::Mxfp4,
            Self::Fp8(weight) => QuantFormat::Fp8(weight.tensor.scaling()),
        }
    }

    /// Returns the dtype of the dense weight that was quantized. LLM.int8() casts to f16 before it quantizes; MXFP4 and
    /// fp8 do not say it: bf16 holds the values of MXFP4 exactly, and has the range of those of fp8.
    pub fn dense_dtype(&self) -> Dtype {
        match self {
            Self::FourBit(weight) => weight.tensor.dtype(),
            Self::Int8(_) => Dtype::F16,
            Self::Mxfp4(_) | Self::Fp8(_) => Dtype::BF16,
        }
    }

    /// Returns the dense weight, row-major.
    pub fn dequantize<T: Element>(&self) -> Vec<T> {
        match self {
            Self::FourBit(weight) => weight.tensor.dequantize(),
            Self::Int8(tensor) => tensor.dequantize(),
            Self::Mxfp4(tensor) => tensor.dequantize(),
            Self::Fp8(weight) => weight.tensor.dequantize(),
        }
    }

    /// Returns the shape of the dense weight.
    pub fn shape(&self) -> Vec<usize> {
        match self {
            Self::FourBit(weight) => weight.tensor.shape().to_vec(),
            Self::Int8(tensor) => tensor.shape().to_vec(),
            Self::Mxfp4(tensor) => tensor.shape().to_vec(),
            Self::Fp8(weight) => weight.tensor.shape().to_vec(),
        }
    }
}
