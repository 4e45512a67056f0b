//! A linear layer over a quantized weight, and the conversion between stored weights and device weights.

use burn::tensor::DType;
use half::{bf16, f16};
use rekindle_kernels::{Device, Params, QuantizedWeight, Tensor, Weight, from_f32, quantized, to_f32};

use crate::bnb::{FourBitWeight, StoredWeight};
use crate::format::matrix;
use crate::fp8::{Fp8Layout, Fp8Scaling, Fp8Tensor, Fp8Weight};
use crate::{
    Absmax, Blocksize, DoubleQuant, Dtype, DynamicMap, Element, Error, Int8Tensor, Mxfp4Tensor, QuantConfig,
    QuantFormat, QuantizedTensor, mxfp4,
};

/// A frozen linear layer whose weight is NF4, FP4, MXFP4, fp8, 8-bit or dense: y = x·Wᵀ + b.
///
/// Only the quantized weight is kept; products decode a few rows of W at a time.
///
/// ```
/// use burn::tensor::DType;
/// use rekindle_kernels::{Device, from_f32};
/// use rekindle_quant::{QuantConfig, QuantLinear, QuantizedTensor};
///
/// let weight: Vec<f32> = (0..32 * 64).map(|i| (i as f32 * 0.37).sin() * 0.02).collect();
/// let packed = QuantizedTensor::quantize(&weight, &[32, 64], &QuantConfig::default())?;
/// let device = Device::cpu();
/// let linear = QuantLinear::four_bit(packed, None, &device)?;
/// let x = from_f32(vec![1.0; 3 * 64], [3, 64], &device, DType::F32);
/// let y = linear.forward(&x);
/// assert_eq!(linear.backward(&y).dims(), [3, 64]);
/// # Ok::<(), rekindle_quant::Error>(())
/// ```
///
/// # Shapes
/// W `[out, in]`, b `[out]`; x `[tokens, in]`, y `[tokens, out]`.
///
/// # Dtypes
/// The weight is decoded in `f32` and rounded once to the dtype of x, in which the product is computed with `f32` sums.
///
/// # Gradients
/// dx = dy·W. Nothing is saved, and neither W nor b is trained.
#[derive(Debug, Clone)]
pub struct QuantLinear {
    weight: Weight,
    bias: Option<Tensor<1>>,
    params: Params,
}

impl QuantLinear {
    /// Creates a layer over an NF4 or FP4 weight.
    ///
    /// # Errors
    /// [`Error::Stored`] if the weight is not a matrix.
    pub fn four_bit(weight: QuantizedTensor, bias: Option<Tensor<1>>, device: &Device) -> Result<Self, Error> {
        let (_, codes) = DiskMetadata::split(StoredWeight::FourBit(FourBitWeight::new(weight)))?;
        Ok(Self::over(Weight::Quantized(QuantizedWeight::new(codes, device)), bias, device))
    }

    /// Creates a layer over an LLM.int8() weight.
    pub fn int8(weight: Int8Tensor, bias: Option<Tensor<1>>, device: &Device) -> Self {
        Self::over(Weight::Quantized(QuantizedWeight::new(int8_codes(weight), device)), bias, device)
    }

    /// Creates a layer over an MXFP4 weight.
    ///
    /// # Errors
    /// [`Error::Stored`] if the weight is not a matrix.
    pub fn mxfp4(weight: Mxfp4Tensor, bias: Option<Tensor<1>>, device: &Device) -> Result<Self, Error> {
        Ok(Self::over(Weight::Quantized(QuantizedWeight::new(mxfp4_codes(weight)?, device)), bias, device))
    }

    /// Creates a layer over an fp8 weight.
    pub fn fp8(weight: Fp8Tensor, bias: Option<Tensor<1>>, device: &Device) -> Self {
        Self::over(Weight::Quantized(QuantizedWeight::new(fp8_codes(weight), device)), bias, device)
    }

    /// Creates a layer over a dense weight `[out, in]`.
    pub fn dense(weight: Tensor<2>, bias: Option<Tensor<1>>) -> Self {
        let device = weight.device();
        Self::over(Weight::Frozen(weight), bias, &device)
    }

    fn over(weight: Weight, bias: Option<Tensor<1>>, device: &Device) -> Self {
        Self { weight, bias, params: Params::none(device, DType::F32) }
    }

    /// Returns y for x.
    pub fn forward(&self, x: &Tensor<2>) -> Tensor<2> {
        self.weight.nt(&self.params, x, self.bias.as_ref())
    }

    /// Returns dx for dy.
    pub fn backward(&self, dy: &Tensor<2>) -> Tensor<2> {
        self.weight.nn(&self.params, dy, None)
    }

    /// Returns y for x with 8-bit activations (see [`Int8Tensor::matmul`]), for inference. b is added in the dtype of
    /// x. Returns `None` unless the weight is LLM.int8(). LLM.int8() uses threshold 6; 0 disables the outlier
    /// decomposition.
    ///
    /// This product has no gradient: [`backward`](Self::backward) is that of [`forward`](Self::forward). It runs on the
    /// host on copies of x and the weight, then moves y to the device of x.
    ///
    /// # Shapes
    /// x `[tokens, in]`, y `[tokens, out]`.
    ///
    /// # Dtypes
    /// x and y `f32`, `f16` or `bf16`.
    pub fn forward_int8(&self, x: &Tensor<2>, threshold: f32) -> Option<Tensor<2>> {
        let Weight::Quantized(packed) = &self.weight else { return None };
        let codes = packed.data();
        let quantized::QuantizedFormat::Int8 { codes: int8, scales, .. } = &codes.format else { return None };
        let weight = Int8Tensor::from_parts(codes.dims, int8.clone(), scales.clone())
            .expect("codes and scales were checked against their shape");
        let y = match x.dtype() {
            DType::F16 => int8_product::<f16>(&weight, x, threshold),
            DType::BF16 => int8_product::<bf16>(&weight, x, threshold),
            _ => int8_product::<f32>(&weight, x, threshold),
        };
        Some(match &self.bias {
            None => y,
            Some(bias) => y.add_row(bias),
        })
    }

    /// Returns `[out, in]`.
    pub fn dims(&self) -> [usize; 2] {
        self.weight.dims()
    }
}

/// The metadata of a quantized weight in a checkpoint besides its codes and scales, kept so that it can be written back
/// unchanged.
#[derive(Debug, Clone, PartialEq)]
pub enum DiskMetadata {
    /// NF4 or FP4.
    FourBit {
        /// The data type, the block size and the kind of scales.
        config: QuantConfig,
        /// The dtype of the dense weight.
        dtype: Dtype,
        /// The dtype in which packed codes are stored.
        storage: Dtype,
        /// The shape of the stored codes.
        packed_shape: Vec<usize>,
    },
    /// LLM.int8().
    Int8,
    /// MXFP4.
    Mxfp4,
    /// fp8.
    Fp8 {
        /// The elements that share a scale.
        scaling: Fp8Scaling,
        /// The properties of the stored tensors.
        layout: Fp8Layout,
    },
}

impl DiskMetadata {
    /// Returns the format of the weight.
    pub fn format(&self) -> QuantFormat {
        match self {
            Self::FourBit { config, .. } => QuantFormat::FourBit(*config),
            Self::Int8 => QuantFormat::Int8,
            Self::Mxfp4 => QuantFormat::Mxfp4,
            Self::Fp8 { scaling, .. } => QuantFormat::Fp8(*scaling),
        }
    }

    /// Splits a weight into its disk metadata and the data used for computing.
    ///
    /// # Errors
    /// [`Error::Stored`] if a 4-bit weight is not a matrix.
    pub fn split(weight: StoredWeight) -> Result<(Self, quantized::QuantizedData), Error> {
        let FourBitWeight { tensor, storage, packed_shape } = match weight {
            StoredWeight::Int8(tensor) => return Ok((Self::Int8, int8_codes(tensor))),
            StoredWeight::Mxfp4(tensor) => return Ok((Self::Mxfp4, mxfp4_codes(tensor)?)),
            StoredWeight::Fp8(Fp8Weight { tensor, layout }) => {
                return Ok((Self::Fp8 { scaling: tensor.scaling(), layout }, fp8_codes(tensor)));
            }
            StoredWeight::FourBit(weight) => weight,
        };
        let config = tensor.config();
        let (shape, dtype, codes, absmax) = tensor.into_parts();
        let dims = matrix(&shape)?;
        let absmax = match absmax {
            Absmax::Single(absmax) => quantized::Absmax::Single(absmax),
            Absmax::Double(double) => quantized::Absmax::Double {
                map: Box::new(*double.map().values()),
                nested: double.nested_absmax().to_vec(),
                blocksize: double.blocksize().get(),
                offsets: vec![double.offset()],
                codes: double.into_codes(),
            },
        };
        let format = quantized::QuantizedFormat::FourBit {
            codes,
            table: crate::four_bit::values(config.quant_type),
            blocksize: config.blocksize.get(),
            absmax,
        };
        let metadata = Self::FourBit { config, dtype, storage, packed_shape };
        Ok((metadata, quantized::QuantizedData { dims, format }))
    }

    /// Joins the metadata and the data that [`split`](Self::split) returned.
    ///
    /// # Errors
    /// The errors of the formats' constructors, if `codes` belongs to a different weight.
    pub fn restore(&self, codes: quantized::QuantizedData) -> Result<StoredWeight, Error> {
        let dims = codes.dims;
        match (self, codes.format) {
            (Self::Int8, quantized::QuantizedFormat::Int8 { codes, scales, .. }) => {
                Ok(StoredWeight::Int8(Int8Tensor::from_parts(dims, codes, scales)?))
            }
            (
                Self::FourBit { config, dtype, storage, packed_shape },
                quantized::QuantizedFormat::FourBit { codes, blocksize, absmax, .. },
            ) => {
                let absmax = match absmax {
                    quantized::Absmax::Single(absmax) => Absmax::Single(absmax),
                    quantized::Absmax::Double { codes, map, nested, blocksize, offsets } => {
                        let [offset] = offsets[..] else {
                            let reason = format!("is stacked from {} weights", offsets.len());
                            return Err(Error::Stored { key: "weight".to_owned(), reason });
                        };
                        let (map, blocksize) = (DynamicMap::from_values(*map)?, Blocksize::new(blocksize)?);
                        Absmax::Double(DoubleQuant::from_parts(codes, nested, blocksize, offset, map)?)
                    }
                };
                let (shape, blocksize) = (dims.to_vec(), Blocksize::new(blocksize)?);
                let tensor = QuantizedTensor::from_parts(shape, *dtype, config.quant_type, blocksize, codes, absmax)?;
                let (storage, packed_shape) = (*storage, packed_shape.clone());
                Ok(StoredWeight::FourBit(FourBitWeight { tensor, storage, packed_shape }))
            }
            (
                Self::Mxfp4,
                quantized::QuantizedFormat::FourBit {
                    codes,
                    absmax: quantized::Absmax::Double { codes: scales, .. },
                    ..
                },
            ) => {
                let tensor = Mxfp4Tensor::from_parts(dims.to_vec(), mxfp4::swapped(codes), scales)?;
                Ok(StoredWeight::Mxfp4(tensor))
            }
            (Self::Fp8 { scaling, layout }, quantized::QuantizedFormat::Fp8 { codes, scales, .. }) => {
                let tensor = Fp8Tensor::from_parts(dims, codes, scales, *scaling)?;
                Ok(StoredWeight::Fp8(Fp8Weight { tensor, layout: layout.clone() }))
            }
            (_, format) => Err(Error::Stored {
                key: "weight".to_owned(),
                reason: format!("was read as {self:?} but holds {}", format.name()),
            }),
        }
    }
}

fn int8_product<T: Element>(weight: &Int8Tensor, x: &Tensor<2>, threshold: f32) -> Tensor<2> {
    let ([tokens, _], [out, _]) = (x.dims(), weight.shape());
    // The conversion to f32 is exact, and so is the one back.
    let values: Vec<T> = to_f32(x.clone()).into_iter().map(T::from_f32).collect();
    let mut y = vec![T::default(); tokens * out];
    weight.matmul(&values, threshold, &mut y);
    let mut wide = vec![0.0; y.len()];
    T::to_f32_slice(&y, &mut wide);
    from_f32(wide, [tokens, out], &x.device(), x.dtype())
}

/// Returns the device format. value = (code · SCB) · (1/127), in this order, as in bitsandbytes.
fn int8_codes(tensor: Int8Tensor) -> quantized::QuantizedData {
    let dims = tensor.shape();
    let (codes, scales) = tensor.into_parts();
    quantized::QuantizedData { dims, format: quantized::QuantizedFormat::Int8 { codes, scales, factor: 1.0 / 127.0 } }
}

impl From<Fp8Scaling> for quantized::Fp8Scaling {
    fn from(scaling: Fp8Scaling) -> Self {
        match scaling {
            Fp8Scaling::Tensor => Self::Tensor,
            Fp8Scaling::Row => Self::Row,
            Fp8Scaling::Block => Self::Block,
        }
    }
}

fn fp8_codes(tensor: Fp8Tensor) -> quantized::QuantizedData {
    let (dims, scaling) = (tensor.shape(), tensor.scaling().into());
    let (codes, scales) = tensor.into_parts();
    let format = quantized::QuantizedFormat::Fp8 { codes, scales, scaling, section: dims[0] };
    quantized::QuantizedData { dims, format }
}

/// Returns the device format: 4-bit codes whose scales are codes too, of a map of powers of two. Their nested scales are 1
/// and the offset is 0, so that a decoded scale is the power itself.
fn mxfp4_codes(tensor: Mxfp4Tensor) -> Result<quantized::QuantizedData, Error> {
    let (shape, codes, scales) = tensor.into_parts();
    let dims = matrix(&shape)?;
    let blocksize = mxfp4_nesting(scales.len());
    let absmax = quantized::Absmax::Double {
        map: Box::new(core::array::from_fn(|scale| mxfp4::power(scale as u8))),
        nested: vec![1.0; scales.len() / blocksize],
        blocksize,
        offsets: vec![0.0],
        codes: scales,
    };
    let (codes, blocksize) = (mxfp4::swapped(codes), mxfp4::BLOCK);
    let format = quantized::QuantizedFormat::FourBit { codes, table: mxfp4::VALUES, blocksize, absmax };
    Ok(quantized::QuantizedData { dims, format })
}

/// The number of scales that share a nested one, for a weight with `blocks` of them: it divides them, so that weights can
/// be stacked.
pub(crate) fn mxfp4_nesting(blocks: usize) -> usize {
    1 << blocks.trailing_zeros().min(8)
}
