//! Quantizing the linears of a network.

use std::collections::BTreeSet;

use burn::module::{Module, Param, Reparameterization, Reparameterizer};
use burn::tensor::{DType, Shape, Tensor};
use rekindle_lora::{LoraConfig, TargetModules, match_targets};

use crate::wrap::unwrapped;
use crate::{Adapter, Error, LoraLinear, QuantLinearConfig, QuantizedCodes, WeightFormat};

/// Settings of [`quantize`]. The default is bitsandbytes' QLoRA recipe: NF4 in blocks of 64 with double quantization, for
/// all linears but the output layer.
#[derive(Clone, Debug)]
pub struct QuantConfig {
    /// The format of the weights.
    pub format: WeightFormat,
    /// Elements of a 4-bit weight that share a scale: a power of two from 32 to 4,096.
    pub blocksize: usize,
    /// True if the scales of 4-bit weights are quantized to 8 bits.
    pub double_quant: bool,
    /// The linears that are quantized: names, a regular expression or `"all-linear"`, as in [`LoraConfig`].
    pub target_modules: TargetModules,
    /// Linears that are left as they are.
    pub exclude_modules: Option<TargetModules>,
}

impl Default for QuantConfig {
    fn default() -> Self {
        Self {
            format: WeightFormat::Nf4,
            blocksize: 64,
            double_quant: true,
            target_modules: TargetModules::AllLinear,
            exclude_modules: None,
        }
    }
}

impl QuantConfig {
    /// Returns the default with another format.
    pub fn new(format: WeightFormat) -> Self {
        Self { format, ..Self::default() }
    }

    /// Sets the linears that are quantized.
    #[must_use]
    pub fn target_modules(self, target_modules: impl Into<TargetModules>) -> Self {
        Self { target_modules: target_modules.into(), ..self }
    }

    /// Sets linears that are left as they are.
    #[must_use]
    pub fn exclude_modules(self, exclude_modules: impl Into<TargetModules>) -> Self {
        Self { exclude_modules: Some(exclude_modules.into()), ..self }
    }
}

/// Quantizes the weights of the linears that `config` targets. Other parameters are unchanged.
///
/// The linears are the [`LoraLinear`] and `burn::nn::Linear` in `model`, named by their path as in [`wrap`](crate::wrap),
/// which can add adapters afterwards (QLoRA, arXiv:2305.14314). Codes and scales are bit-exact with bitsandbytes.
///
/// The type of the model does not change: the parameter keeps a reparameterization, [`QuantizedParam`], and a placeholder
/// of one element. A [`LoraLinear`] reads the codes itself, as [`QuantLinear`](crate::QuantLinear) does. A
/// `burn::nn::Linear` works too, but Burn decodes the weight in every forward and keeps the result for the backward;
/// in a [`Checkpointed`](crate::Checkpointed) block it does so for one block at a time.
///
/// Records contain codes and scales. Quantize a network with the same configuration before loading a record into it.
/// [`materialize`](Module::materialize) decodes the weights for good.
///
/// ```
/// use burn::module::Module;
/// use burn::tensor::{Device, Tensor};
/// use rekindle_burn::{LoraLinear, LoraLinearConfig, QuantConfig, quantize, wrap};
/// use rekindle_lora::LoraConfig;
///
/// #[derive(Module, Debug)]
/// struct Net {
///     up_proj: LoraLinear,
///     lm_head: LoraLinear,
/// }
///
/// let device = Device::flex().autodiff();
/// let net = Net {
///     up_proj: LoraLinearConfig::new(64, 64).init(&device),
///     lm_head: LoraLinearConfig::new(64, 8).init(&device),
/// };
/// let net = quantize(net, &QuantConfig::default())?;
/// assert!(net.up_proj.quantized().is_some() && net.lm_head.quantized().is_none());
/// let net = wrap(net, &LoraConfig::new(4).target_modules("all-linear"))?;
/// let grads = net.up_proj.forward(Tensor::<2>::ones([3, 64], &device)).sum().backward();
/// let adapter = net.up_proj.adapter().expect("up_proj is a target");
/// assert!(adapter.b.val().grad(&grads).is_some());
/// # Ok::<(), rekindle_burn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lora`] for targets that match nothing, [`Error::Wrapped`] if the model has adapters, [`Error::Quant`] if
/// `blocksize` is none of the sizes above or a weight is empty.
pub fn quantize<M: Module>(model: M, config: &QuantConfig) -> Result<M, Error> {
    let linears = unwrapped(&model)?;
    let linears: Vec<_> = linears.into_iter().filter(|linear| !linear.is_quantized).collect();
    let names: Vec<&str> = linears.iter().map(|linear| linear.name.as_str()).collect();
    // The rules of adapters, whose rank does not matter here.
    let mut rules = LoraConfig::new(1).target_modules(config.target_modules.clone());
    rules.exclude_modules.clone_from(&config.exclude_modules);
    let targets = match_targets(&rules, &names)?;
    let weights = linears.into_iter().filter(|linear| targets.contains(&linear.name));
    let mut result = Ok(());
    let weights = weights.map(|linear| linear.anchor).collect();
    let model = model.apply_reparameterization(Quantize { weights, config, result: &mut result });
    result.map(|()| model)
}

/// A quantized weight `[d_input, d_output]` in the place of a parameter, whose own value is a placeholder.
///
/// Any module that reads the parameter gets the decoded weight, and W + s·A·B if there is an adapter.
#[derive(Module, Debug)]
pub struct QuantizedParam {
    /// W. Its codes and scales are integer parameters, so that nothing that trains or casts floats changes them.
    pub weight: QuantizedCodes,
    /// The sizes `[[d_input, d_output]]`, frozen. This parameter carries the adapter.
    pub features: Param<Tensor<2>>,
}

impl QuantizedParam {
    /// Returns the adapter.
    pub fn adapter(&self) -> Option<&Adapter> {
        self.features.reparameterization()
    }

    /// Returns W decoded, `[d_input, d_output]`, on a device without autodiff.
    pub fn dequantize(&self) -> Tensor<2> {
        self.weight.dequantize()
    }
}

impl Reparameterization for QuantizedParam {
    const NAME: &'static str = "quantized";

    /// `base` is the placeholder, which has the dtype of the result.
    fn apply<const D: usize>(&self, base: Tensor<D>) -> Tensor<D> {
        let weight = self.dequantize();
        let shape = Shape::from(weight.dims());
        let weight = match self.adapter() {
            Some(adapter) => weight + adapter.delta().cast(DType::F32),
            None => weight,
        };
        weight.cast(base.dtype()).reshape(shape)
    }
}

struct Quantize<'a> {
    /// The paths of the weights.
    weights: BTreeSet<String>,
    config: &'a QuantConfig,
    /// The first error.
    result: &'a mut Result<(), Error>,
}

impl Reparameterizer for Quantize<'_> {
    type Reparam = QuantizedParam;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<QuantizedParam>) {
        if self.result.is_err() || !self.weights.contains(path) {
            return (param, None);
        }
        let (base, id) = (param.base().without_autodiff(), param.id);
        let (device, dtype) = (param.lazy_device(), base.dtype());
        let &[input, out] = base.shape().as_slice() else { return (param, None) };
        let QuantConfig { format, blocksize, double_quant, .. } = *self.config;
        let layer = QuantLinearConfig { d_input: input, d_output: out, bias: false, format, blocksize, double_quant };
        let weight = Param::initialized(id, base.reshape([input, out]));
        match layer.quantize_on(&LoraLinear { weight, bias: None }, &device) {
            Ok(layer) => {
                let placeholder = Param::initialized(id, Tensor::zeros([1; D], (&device, dtype)));
                (placeholder, Some(QuantizedParam { weight: layer.weight, features: layer.features }))
            }
            Err(error) => {
                *self.result = Err(error);
                (param, None)
            }
        }
    }
}
