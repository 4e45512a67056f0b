//! A linear that computes its adapter without forming W + s·A·B.

use burn::config::Config;
use burn::module::{Module, Param};
use burn::nn::{Initializer, Linear, LinearConfig};
use burn::tensor::{Device, Tensor};

use crate::linear::{LinearWeight, record_linear};
use crate::{Adapter, QuantizedParam};

/// Configuration of [`LoraLinear`].
#[derive(Config, Debug)]
pub struct LoraLinearConfig {
    /// Size of the input's last axis.
    pub d_input: usize,
    /// Size of the output's last axis.
    pub d_output: usize,
    /// True if there is a bias.
    #[config(default = true)]
    pub bias: bool,
    /// The initial values of weight and bias.
    #[config(default = "Initializer::KaimingUniform{gain:1.0/f64::sqrt(3.0), fan_out_only:false}")]
    pub initializer: Initializer,
}

impl LoraLinearConfig {
    /// Creates the layer, without an adapter and trainable.
    pub fn init(&self, device: &Device) -> LoraLinear {
        let config = LinearConfig::new(self.d_input, self.d_output);
        config.with_bias(self.bias).with_initializer(self.initializer.clone()).init(device).into()
    }
}

/// A linear layer with a place for an adapter (Hu et al., arXiv:2106.09685): y = x·W + b + s·(x·A)·B.
///
/// It has the fields of `burn::nn::Linear`, so records of a network written with that type load into it. Without an
/// adapter it is that layer; [`wrap`](crate::wrap) adds one. W + s·A·B is never formed. [`quantize`](crate::quantize)
/// quantizes W; products then decode a few rows at a time, and W is never formed either.
///
/// # Shapes
/// x `[.., d_input]`, y `[.., d_output]`; W `[d_input, d_output]`, b `[d_output]`, A `[d_input, r]`, B `[r, d_output]`.
///
/// # Dtypes
/// Computed in the dtype of x, with `f32` sums on the CPU; parameters of another dtype are cast. Gradients of parameters
/// are summed in `f32` and have their parameter's dtype.
///
/// # Gradients
/// To x, A and B, and to W and b where they are not frozen. Saved: x·A, and x if W or A is trained. A frozen W gets no
/// gradient and no buffer.
#[derive(Module, Debug)]
pub struct LoraLinear {
    /// W, which carries the adapter if there is one.
    pub weight: Param<Tensor<2>>,
    /// b.
    pub bias: Option<Param<Tensor<1>>>,
}

impl LoraLinear {
    /// Returns y for x. A reparameterization of other types, such as Burn's own LoRA, is applied to W first.
    ///
    /// # Panics
    /// If the last axis of x is not `d_input`.
    pub fn forward<const D: usize>(&self, x: Tensor<D>) -> Tensor<D> {
        let adapter = self.adapter();
        let weight = match self.quantized() {
            Some(quantized) => LinearWeight::Quantized(quantized.weight.weight().clone()),
            None if adapter.is_some() => LinearWeight::Dense(self.weight.base()),
            None => LinearWeight::Dense(self.weight.val()),
        };
        let bias = self.bias.as_ref().map(|bias| bias.val());
        record_linear(x, weight, bias, adapter)
    }

    /// Returns the adapter.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.quantized().map_or_else(|| self.weight.reparameterization(), QuantizedParam::adapter)
    }

    /// Returns W, if [`quantize`](crate::quantize) has quantized it.
    pub fn quantized(&self) -> Option<&QuantizedParam> {
        self.weight.reparameterization()
    }
}

impl From<Linear> for LoraLinear {
    /// The same parameters, with their adapter if there is one.
    fn from(Linear { weight, bias }: Linear) -> Self {
        Self { weight, bias }
    }
}
