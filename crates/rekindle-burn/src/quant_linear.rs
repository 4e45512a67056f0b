//! A linear over a quantized weight.

mod codes;

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::LinearConfig;
use burn::tensor::{DType, Device, Tensor, TensorData};
use rekindle_kernels::quantized::QuantizedData;
use rekindle_quant::bnb::{FourBitWeight, StoredWeight};
use rekindle_quant::{Blocksize, DiskMetadata, Int8Tensor, QuantConfig, QuantFormat, QuantType, QuantizedTensor};

use crate::linear::{LinearWeight, record_linear};
use crate::{Adapter, Error, LoraLinear};

pub use codes::QuantizedCodes;

/// Configuration of [`QuantLinear`].
#[derive(Config, Debug)]
pub struct QuantLinearConfig {
    /// Size of the input's last axis.
    pub d_input: usize,
    /// Size of the output's last axis.
    pub d_output: usize,
    /// True if there is a bias.
    #[config(default = true)]
    pub bias: bool,
    /// The format of the weight.
    #[config(default = "WeightFormat::Nf4")]
    pub format: WeightFormat,
    /// Elements of a 4-bit weight that share a scale: a power of two from 32 to 4,096.
    #[config(default = 64)]
    pub blocksize: usize,
    /// True if the scales of a 4-bit weight are quantized to 8 bits.
    #[config(default = true)]
    pub double_quant: bool,
}

/// The format of a quantized weight.
#[derive(Config, Debug, Copy, PartialEq)]
pub enum WeightFormat {
    /// 4-bit NormalFloat (arXiv:2305.14314).
    Nf4,
    /// A float of 4 bits.
    Fp4,
    /// LLM.int8()'s 8 bits with a scale for each row of W.
    Int8,
}

impl QuantLinearConfig {
    /// Creates the layer over a random weight, for a record to be loaded into. [`quantize`](Self::quantize) keeps the
    /// weight of a linear.
    ///
    /// # Panics
    /// If `blocksize` is none of the sizes above.
    pub fn init(&self, device: &Device) -> QuantLinear {
        let linear = LinearConfig::new(self.d_input, self.d_output).with_bias(self.bias).init(device);
        self.quantize(linear.into()).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Creates the layer over the quantized weight of `linear`, whose bias it keeps. An adapter of `linear` is dropped.
    ///
    /// # Errors
    /// [`Error::Quant`] if `blocksize` is none of the sizes above, or the weight is empty.
    pub fn quantize(&self, linear: LoraLinear) -> Result<QuantLinear, Error> {
        let device = linear.weight.base().device();
        self.quantize_on(&linear, &device)
    }

    /// Quantizes to a device, of which the weight of `linear` may be without the autodiff.
    pub(crate) fn quantize_on(&self, linear: &LoraLinear, device: &Device) -> Result<QuantLinear, Error> {
        let weight = linear.weight.base().without_autodiff().transpose(); // [d_output, d_input]
        let shape = weight.dims();
        let values = weight.into_data_as::<f32>().try_into_vec::<f32>().expect("cast to f32 just before");
        let stored = match self.format() {
            QuantFormat::Int8 => StoredWeight::Int8(Int8Tensor::quantize(&values, shape)?),
            _ => {
                let tensor = QuantizedTensor::quantize(&values, &shape, &self.four_bit()?)?;
                StoredWeight::FourBit(FourBitWeight::new(tensor))
            }
        };
        QuantLinear::from_stored(stored, linear.bias.clone(), device)
    }

    fn format(&self) -> QuantFormat {
        match self.format {
            WeightFormat::Int8 => QuantFormat::Int8,
            WeightFormat::Nf4 | WeightFormat::Fp4 => QuantFormat::FourBit(QuantConfig::default()),
        }
    }

    fn four_bit(&self) -> Result<QuantConfig, Error> {
        let quant_type = if self.format == WeightFormat::Fp4 { QuantType::Fp4 } else { QuantType::Nf4 };
        let blocksize = Blocksize::new(self.blocksize)?;
        Ok(QuantConfig { quant_type, blocksize, double_quant: self.double_quant })
    }
}

/// A linear layer over an NF4, FP4 or 8-bit weight, with a place for an adapter (QLoRA, arXiv:2305.14314):
/// y = x·W + b + s·(x·A)·B.
///
/// Only the codes and scales of W are kept, bit-exact with bitsandbytes; products decode a few rows at a time.
///
/// # Shapes
/// x `[.., d_input]`, y `[.., d_output]`; b `[d_output]`, A `[d_input, r]`, B `[r, d_output]`.
///
/// # Dtypes
/// W is decoded in `f32` and rounded once to the dtype of x, in which the products are computed.
///
/// # Gradients
/// To x, A and B, and to b if it is not frozen. W has none. Saved: x·A, and x if there is an adapter.
#[derive(Module, Debug)]
pub struct QuantLinear {
    /// W. Its codes and scales are integer parameters, so that nothing that trains or casts floats changes them.
    pub weight: QuantizedCodes,
    /// The sizes `[[d_input, d_output]]`, frozen. This parameter carries the adapter, because W is not a float.
    pub features: Param<Tensor<2>>,
    /// b.
    pub bias: Option<Param<Tensor<1>>>,
}

impl QuantLinear {
    /// Creates the layer over a weight `[d_output, d_input]` as bitsandbytes stores it.
    ///
    /// # Errors
    /// [`Error::Quant`] if the weight is not a matrix.
    pub fn from_stored(weight: StoredWeight, bias: Option<Param<Tensor<1>>>, device: &Device) -> Result<Self, Error> {
        let (_, codes) = DiskMetadata::split(weight)?;
        Ok(Self::over(codes, bias, device))
    }

    fn over(codes: QuantizedData, bias: Option<Param<Tensor<1>>>, device: &Device) -> Self {
        let [out, input] = codes.dims;
        let features = TensorData::from([[input as f32, out as f32]]);
        let features = Tensor::from_data(features, (device, DType::F32));
        let features = Param::from_tensor(features).set_require_grad(false);
        Self { weight: QuantizedCodes::new(codes, device), features, bias }
    }

    /// Returns y for x.
    ///
    /// # Panics
    /// If the last axis of x is not `d_input`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let bias = self.bias.as_ref().map(|bias| bias.val());
        record_linear(x, LinearWeight::Quantized(self.weight.weight().clone()), bias, self.adapter())
    }

    /// Returns W decoded, `[d_input, d_output]`, on a device without autodiff.
    pub fn dequantize(&self) -> Tensor<2> {
        self.weight.dequantize()
    }

    /// Returns the adapter.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.features.reparameterization()
    }
}
