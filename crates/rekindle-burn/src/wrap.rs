//! Adapters on the linears of a network.

pub(crate) mod linears;

use std::collections::BTreeMap;
use std::path::Path;

use burn::module::{Module, Param, Reparameterizer};
use burn::tensor::{DType, Tensor, TensorData};
use rekindle_lora::peft::AdapterConfig;
use rekindle_lora::{
    AdaptableModules, Adapter as AdapterFiles, Bias, InitLoraWeights, LinearModule, LoraConfig, LoraFactors,
    initial_factors, match_targets,
};

use crate::{Adapter, Error};
use linears::{FoundLinear, find_linears};

/// Adds new adapters to the linears that `config` targets and freezes everything else.
///
/// The linears are the `LoraLinear`, `QuantLinear` and `burn::nn::Linear` in `model`, named by their path, such as
/// `layers.0.q_proj`; targets match these names by PEFT's rules. The initial A depends on `random_state` and the
/// name alone, and B is zero, so the model's outputs are unchanged at first.
///
/// The type of the model does not change: Burn lets a parameter carry a reparameterization ([`Adapter`]). `LoraLinear` and
/// `QuantLinear` compute x·A·B in one node. A `burn::nn::Linear` works too, but forms W + s·A·B in every forward and a
/// gradient of that size in every backward.
///
/// ```
/// use burn::module::Module;
/// use burn::tensor::{Device, Tensor};
/// use rekindle_burn::{LoraLinear, LoraLinearConfig, wrap};
/// use rekindle_lora::LoraConfig;
///
/// #[derive(Module, Debug)]
/// struct Net {
///     up_proj: LoraLinear,
///     down_proj: LoraLinear,
/// }
///
/// let device = Device::flex().autodiff();
/// let net = Net {
///     up_proj: LoraLinearConfig::new(8, 32).init(&device),
///     down_proj: LoraLinearConfig::new(32, 8).init(&device),
/// };
/// let net = wrap(net, &LoraConfig::new(4).target_modules(["up_proj"]))?;
/// let x = Tensor::<2>::ones([3, 8], &device);
/// let grads = net.down_proj.forward(net.up_proj.forward(x)).sum().backward();
/// let adapter = net.up_proj.adapter().expect("up_proj is a target");
/// assert!(adapter.b.val().grad(&grads).is_some());
/// assert!(net.down_proj.weight.val().grad(&grads).is_none());
/// # Ok::<(), rekindle_burn::Error>(())
/// ```
///
/// # Errors
/// [`Error::Lora`] for arguments out of range and targets that match nothing, [`Error::Unsupported`] for arguments that
/// modules do not have yet, [`Error::Wrapped`] if the model has adapters.
pub fn wrap<M: Module>(model: M, config: &LoraConfig) -> Result<M, Error> {
    config.validate()?;
    check_supported(config)?;
    let linears = unwrapped(&model)?;
    let names: Vec<&str> = linears.iter().map(|linear| linear.name.as_str()).collect();
    let targets = match_targets(config, &names)?;
    let factors = linears.iter().filter(|linear| targets.contains(&linear.name)).map(|linear| {
        let factors = initial_factors(config, &linear.name, linear.input, linear.out);
        (linear.name.clone(), factors)
    });
    Ok(attach(model, &linears, factors.collect(), config))
}

/// Writes the adapters of `model` into the existing directory `dir`, as the two files that PEFT reads. `config` is that of
/// [`wrap`], and `base` the name or path of the base model.
///
/// # Errors
/// [`Error::NotWrapped`] without an adapter, [`Error::Lora`] if a file cannot be written.
pub fn save_adapter<M: Module>(model: &M, config: &LoraConfig, base: Option<&str>, dir: &Path) -> Result<(), Error> {
    check_supported(config)?;
    let linears = find_linears(model);
    let adapted = linears.into_iter().filter_map(|linear| Some((linear.name, linear.factors?)));
    let factors: BTreeMap<String, LoraFactors> = adapted.collect();
    if factors.is_empty() {
        return Err(Error::NotWrapped);
    }
    let modules: Vec<String> = factors.keys().cloned().collect();
    let (biases, saved, tables) = Default::default();
    let config = AdapterConfig::new(config, base, &modules);
    Ok(AdapterFiles { config, factors, biases, saved, tables }.save(dir)?)
}

/// Adds the adapters of a directory that PEFT, [`save_adapter`] or `rekindle` wrote, and freezes everything else. Returns
/// the model and the configuration of the adapter, for [`save_adapter`].
///
/// # Errors
/// [`Error::Lora`] for files that cannot be read or do not fit the model, [`Error::Unsupported`] for settings that modules
/// do not have yet, [`Error::Wrapped`] if the model has adapters.
pub fn load_adapter<M: Module>(model: M, dir: &Path) -> Result<(M, LoraConfig), Error> {
    let config = AdapterConfig::open(dir)?.lora().clone();
    check_supported(&config)?;
    let linears = unwrapped(&model)?;
    let module = |linear: &FoundLinear| LinearModule {
        name: linear.name.clone(),
        input: linear.input,
        out: linear.out,
        has_bias: linear.has_bias,
    };
    let modules = AdaptableModules { linears: linears.iter().map(module).collect(), ..AdaptableModules::default() };
    let adapter = AdapterFiles::load(dir, &modules)?;
    Ok((attach(model, &linears, adapter.factors, &config), config))
}

/// The linears of a model without adapters.
pub(crate) fn unwrapped<M: Module>(model: &M) -> Result<Vec<FoundLinear>, Error> {
    let linears = find_linears(model);
    match linears.iter().find(|linear| linear.factors.is_some()) {
        Some(linear) => Err(Error::Wrapped { module: linear.name.clone() }),
        None => Ok(linears),
    }
}

fn check_supported(config: &LoraConfig) -> Result<(), Error> {
    let plain = [InitLoraWeights::Default, InitLoraWeights::Random, InitLoraWeights::Gaussian];
    let unsupported = [
        (config.lora_dropout != 0.0, "lora_dropout", "0"),
        (config.use_dora, "use_dora", "false"),
        (config.bias != Bias::None, "bias", "\"none\""),
        (!config.modules_to_save.is_empty(), "modules_to_save", "none, and unfreeze those parameters after wrap"),
        (!config.target_parameters.is_empty(), "target_parameters", "target_modules"),
        (!plain.contains(&config.init_lora_weights), "init_lora_weights", "true, false or \"gaussian\""),
    ];
    let problems: Vec<String> = unsupported
        .into_iter()
        .filter(|(is_set, ..)| *is_set)
        .map(|(_, key, way_out)| format!("{key} is not supported in modules of Burn yet; use {way_out}"))
        .collect();
    if problems.is_empty() { Ok(()) } else { Err(Error::Unsupported { problems }) }
}

/// Freezes the model and attaches `factors` by the names of linears.
fn attach<M: Module>(
    model: M,
    linears: &[FoundLinear],
    factors: BTreeMap<String, LoraFactors>,
    config: &LoraConfig,
) -> M {
    let anchors = linears.iter().map(|linear| (linear.anchor.clone(), linear.name.clone()));
    model.apply_reparameterization(Attach { anchors: anchors.collect(), factors, config })
}

struct Attach<'a> {
    /// Names of linears by the path of the parameter that carries the adapter.
    anchors: BTreeMap<String, String>,
    factors: BTreeMap<String, LoraFactors>,
    config: &'a LoraConfig,
}

impl Reparameterizer for Attach<'_> {
    type Reparam = Adapter;

    fn reparameterize<const D: usize>(
        &mut self,
        path: &str,
        param: Param<Tensor<D>>,
    ) -> (Param<Tensor<D>>, Option<Adapter>) {
        let device = param.lazy_device();
        let base = param.set_require_grad(false);
        let Some(name) = self.anchors.get(path) else { return (base, None) };
        let Some(LoraFactors { r, a, b, .. }) = self.factors.remove(name) else { return (base, None) };
        // PEFT's A is [r, in] and its B [out, r].
        let matrix = |values: Vec<f32>, rows: usize| {
            let columns = values.len() / rows;
            let turned = (0..columns).flat_map(|column| values[column..].iter().step_by(columns).copied());
            let data = TensorData::new(turned.collect::<Vec<f32>>(), [columns, rows]);
            Param::from_tensor(Tensor::<2>::from_data(data, (&device, DType::F32)))
        };
        let out = b.len() / r;
        let adapter = Adapter { a: matrix(a, r), b: matrix(b, out), scale: self.config.scale_of(name) };
        (base, Some(adapter))
    }
}
