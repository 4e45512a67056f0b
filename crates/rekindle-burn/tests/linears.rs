//! Linears with and without adapters: the pair of `rekindle-lora`, Burn's gradients, records, PEFT's files, training.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use std::path::Path;

use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::store::ModuleRecord;
use burn::tensor::{DType, Device, Tensor};
use burn_optim::{AdamWConfig, GradientsParams};
use common::{bits, device, noise, plain, values};
use rekindle_burn::{
    Adapter, Error, LoraLinear, LoraLinearConfig, QuantLinear, QuantLinearConfig, RmsNormConfig, WeightFormat,
    load_adapter, save_adapter, wrap,
};
use rekindle_kernels::{Device as Place, ParamsBuilder, Weight, from_f32, to_f32};
use rekindle_lora::{LinearContext, LinearGroup, LoraConfig, LoraFactors, LoraInit};

const INPUT: usize = 64;
const OUT: usize = 24;
const R: usize = 4;

/// A network with a linear of each type.
#[derive(Module, Debug)]
struct Net {
    layers: Vec<Layer>,
    head: Linear,
}

#[derive(Module, Debug)]
struct Layer {
    q_proj: LoraLinear,
    o_proj: QuantLinear,
}

impl Net {
    fn new(device: &Device) -> Self {
        let layer = |_| Layer {
            q_proj: LoraLinearConfig::new(INPUT, OUT).init(device),
            o_proj: QuantLinearConfig::new(OUT, INPUT).init(device),
        };
        Self { layers: (0..2).map(layer).collect(), head: LinearConfig::new(INPUT, 3).init(device) }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        let x = self.layers.iter().fold(x, |x, layer| x.clone() + layer.o_proj.forward(layer.q_proj.forward(x)));
        self.head.forward(x)
    }
}

/// Factors that are not zero.
fn config() -> LoraConfig {
    let text = r#"{"r": 4, "lora_alpha": 6.0, "target_modules": "all-linear", "init_lora_weights": false}"#;
    serde_json::from_str(text).unwrap()
}

fn linear(device: &Device) -> LoraLinear {
    let tensor = |seed, shape| common::tensor(&noise(seed, INPUT * OUT), shape, device, DType::F32);
    LoraLinear {
        weight: Param::from_tensor(tensor(1, [INPUT, OUT])),
        bias: Some(Param::from_tensor(common::tensor(&noise(2, OUT), [OUT], device, DType::F32))),
    }
}

/// The transpose of a row-major matrix.
fn turned(values: &[f32], columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| values[column..].iter().step_by(columns).copied()).collect()
}

fn f32s<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_into_vec().unwrap()
}

/// y, dx, dA and dB of one linear by `LinearGroup`, in PEFT's orientation.
fn by_group(weight: Weight, bias: Vec<f32>, adapter: &Adapter, x: &Tensor<2>, dy: &Tensor<2>) -> [Vec<f32>; 4] {
    let device = Place::cpu();
    let bias = Weight::Frozen(from_f32(bias, [1, OUT], &device, DType::F32));
    let mut group = LinearGroup::new(vec![rekindle_lora::Linear::new("q_proj", weight, Some(bias))]);
    let mut params = ParamsBuilder::new(&device, DType::F32);
    let factors = LoraFactors {
        r: R,
        a: turned(&f32s(adapter.a.val()), R),
        b: turned(&f32s(adapter.b.val()), OUT),
        magnitude: None,
    };
    group.adapt(&mut params, 0, |_| LoraInit { factors: Some((factors.clone(), adapter.scale)), bias: None });
    let params = params.build();
    let (ctx, mut grads) = (LinearContext::new(&params), params.zero_grads());
    let (x, dy) = (x.clone().into(), vec![dy.clone().into()]);
    let (y, saved) = group.forward(ctx, &x);
    let dx = group.backward(ctx, &mut grads, &x, &saved, &dy, true).unwrap();
    let [a, b] = [0, 1].map(|index| grads.values(params.infos()[index].at));
    [to_f32(y[0].clone()), to_f32(dx), a, b]
}

/// Compares a wrapped linear with [`by_group`], to the bit.
fn assert_is_group(
    what: &str,
    weight: Weight,
    bias: &Option<Param<Tensor<1>>>,
    adapter: &Adapter,
    forward: impl Fn(Tensor<2>) -> Tensor<2>,
) {
    let (x, dy) = (plain(3, [5, INPUT]), plain(4, [5, OUT]));
    let tracked = Tensor::from_data(x.to_data(), &device()).require_grad();
    let y = forward(tracked.clone());
    let grads = (y.clone() * dy.clone()).sum().backward();
    let of = |param: &Param<Tensor<2>>, columns| turned(&f32s(param.val().grad(&grads).unwrap()), columns);
    let ours = [f32s(y), f32s(tracked.grad(&grads).unwrap()), of(&adapter.a, R), of(&adapter.b, OUT)];
    let bias = bias.as_ref().unwrap();
    let group = by_group(weight, f32s(bias.val()), adapter, &x, &dy);
    for (part, (ours, group)) in ["y", "dx", "dA", "dB"].iter().zip(ours.iter().zip(&group)) {
        assert_eq!(ours, group, "{what}: {part}");
    }
    assert!(bias.val().grad(&grads).is_none(), "{what}: a frozen bias");
}

#[test]
fn an_adapted_linear_has_the_bits_of_its_group() {
    let linear = wrap(Alone { q_proj: linear(&device()) }, &config()).unwrap().q_proj;
    let dense = turned(&f32s(linear.weight.base()), OUT);
    let weight = Weight::Frozen(from_f32(dense, [OUT, INPUT], &Place::cpu(), DType::F32));
    assert_is_group("dense", weight, &linear.bias, linear.adapter().unwrap(), |x| linear.forward(x));
}

/// One linear that has a name.
#[derive(Module, Debug)]
struct Alone<L: Module> {
    q_proj: L,
}

#[test]
fn a_quantized_linear_has_the_bits_of_its_group_in_every_format() {
    use rekindle_kernels::QuantizedWeight;
    use rekindle_quant::bnb::{FourBitWeight, StoredWeight};
    use rekindle_quant::{DiskMetadata, Int8Tensor, QuantConfig, QuantType, QuantizedTensor};

    for (format, double_quant) in
        [(WeightFormat::Nf4, true), (WeightFormat::Nf4, false), (WeightFormat::Fp4, true), (WeightFormat::Int8, true)]
    {
        let dense = linear(&device());
        let values = turned(&f32s(dense.weight.val()), OUT);
        let stored = match format {
            WeightFormat::Int8 => StoredWeight::Int8(Int8Tensor::quantize(&values, [OUT, INPUT]).unwrap()),
            _ => {
                let quant_type = if format == WeightFormat::Nf4 { QuantType::Nf4 } else { QuantType::Fp4 };
                let config = QuantConfig { quant_type, double_quant, ..QuantConfig::default() };
                let tensor = QuantizedTensor::quantize(&values, &[OUT, INPUT], &config).unwrap();
                StoredWeight::FourBit(FourBitWeight::new(tensor))
            }
        };
        let config = QuantLinearConfig::new(INPUT, OUT).with_format(format).with_double_quant(double_quant);
        let linear = wrap(Alone { q_proj: config.quantize(dense).unwrap() }, &self::config()).unwrap().q_proj;
        let weight = Weight::Quantized(QuantizedWeight::new(DiskMetadata::split(stored).unwrap().1, &Place::cpu()));
        let what = format!("{format:?} {double_quant}");
        assert_is_group(&what, weight, &linear.bias, linear.adapter().unwrap(), |x| linear.forward(x));
    }
}

/// `burn::nn::Linear` with the same adapter forms W + s·A·B; a `LoraLinear` agrees with it up to rounding, on inputs of any
/// rank and on trained weights.
#[test]
fn an_adapted_linear_is_that_of_burn() {
    let ours = wrap(Alone { q_proj: linear(&device()) }, &config()).unwrap().q_proj;
    let burn = Linear { weight: ours.weight.clone(), bias: ours.bias.clone() };
    let (x, dy) = (plain(3, [2, 3, INPUT]), plain(4, [2, 3, OUT]));
    let run = |forward: &dyn Fn(Tensor<3>) -> Tensor<3>| {
        let x = Tensor::from_data(x.to_data(), &device()).require_grad();
        let y = forward(x.clone());
        let grads = (y.clone() * dy.clone()).sum().backward();
        let adapter = ours.adapter().unwrap();
        [
            values(y),
            values(x.grad(&grads).unwrap()),
            values(adapter.a.val().grad(&grads).unwrap()),
            values(adapter.b.val().grad(&grads).unwrap()),
        ]
    };
    let (ours, burn) = (run(&|x| ours.forward(x)), run(&|x| burn.forward(x)));
    for (ours, burn) in ours.iter().zip(&burn) {
        let largest = burn.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        // Sums of at most 64 products and twice 4 more, in f32, in another order.
        let bound = 72.0 * f64::from(f32::EPSILON) * largest;
        assert!(ours.iter().zip(burn).all(|(a, b)| (a - b).abs() <= bound), "{ours:?} {burn:?}");
    }
}

#[test]
fn a_linear_without_an_adapter_trains_like_that_of_burn() {
    let ours = linear(&device());
    let burn = Linear { weight: ours.weight.clone(), bias: ours.bias.clone() };
    let x = Tensor::<2>::from_data(plain(3, [5, INPUT]).to_data(), &device());
    let run = |y: Tensor<2>| {
        let grads = y.powi_scalar(2).sum().backward();
        let bias = ours.bias.as_ref().unwrap();
        [values(ours.weight.val().grad(&grads).unwrap()), values(bias.val().grad(&grads).unwrap())]
    };
    for (a, b) in run(ours.forward(x.clone())).iter().zip(&run(burn.forward(x))) {
        let largest = b.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
        // y is a sum of 64 products and enters sums of 5.
        assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 70.0 * f64::from(f32::EPSILON) * largest));
    }
}

#[test]
fn a_new_adapter_changes_nothing_and_freezes_the_rest() {
    let base = Net::new(&device());
    let x = Tensor::<2>::from_data(plain(3, [5, INPUT]).to_data(), &device());
    let before = bits(base.forward(x.clone()));
    let params = base.num_params();
    let net = wrap(base, &LoraConfig::new(R).target_modules(["q_proj", "o_proj"])).unwrap();
    assert_eq!(bits(net.forward(x.clone())), before);
    assert_eq!(net.num_params() - params, 2 * 2 * R * (INPUT + OUT));

    let grads = net.forward(x).sum().backward();
    let grads = GradientsParams::from_grads(grads, &net);
    // A and B of four linears.
    assert_eq!(grads.len(), 8);
    assert!(net.head.weight.reparameterization::<Adapter>().is_none(), "head is no target");
}

#[test]
fn wrong_targets_and_settings_are_named() {
    let message = |config: LoraConfig| wrap(Net::new(&device()), &config).unwrap_err().to_string();
    assert_eq!(
        message(LoraConfig::new(R).target_modules(["q_porj"])),
        "target_modules \"q_porj\" matches no linear of this model; nearest: \"q_proj\""
    );
    assert_eq!(message(config().lora_dropout(0.1)), "lora_dropout is not supported in modules of Burn yet; use 0");
    let twice = wrap(wrap(Net::new(&device()), &config()).unwrap(), &config()).unwrap_err();
    assert!(matches!(twice, Error::Wrapped { module } if module == "layers.0.q_proj"));
    let none = save_adapter(&Net::new(&device()), &config(), None, Path::new("."));
    assert!(matches!(none, Err(Error::NotWrapped)));
}

#[test]
fn records_hold_codes_and_factors() {
    let net = wrap(Net::new(&device()), &config()).unwrap();
    let x = Tensor::<2>::from_data(plain(3, [5, INPUT]).to_data(), &device());
    let bytes = net.clone().into_record().into_bytes().unwrap();
    let other = wrap(Net::new(&device()), &config().random_state(7)).unwrap();
    assert_ne!(bits(other.forward(x.clone())), bits(net.forward(x.clone())));
    let loaded = other.load_record(ModuleRecord::from_bytes(bytes).unwrap());
    assert_eq!(bits(loaded.forward(x.clone())), bits(net.forward(x.clone())));
    // The record contains the quantized weight, not a dense one.
    let weights = |net: &Net| bits(net.layers[1].o_proj.dequantize());
    assert_eq!(weights(&loaded), weights(&net));
}

/// A record of a network with `burn::nn::Linear` loads into the same network with `LoraLinear`.
#[test]
fn records_of_burns_linear_load() {
    let burn = Alone { q_proj: LinearConfig::new(INPUT, OUT).init(&device()) };
    let x = Tensor::<2>::from_data(plain(3, [5, INPUT]).to_data(), &device());
    let want = values(burn.q_proj.forward(x.clone()));
    let ours = Alone { q_proj: linear(&device()) }.load_record(burn.into_record());
    for (got, want) in values(ours.q_proj.forward(x)).iter().zip(want) {
        // A sum of 64 products of numbers below 1/8 and 1.
        assert!((got - want).abs() <= 64.0 * f64::from(f32::EPSILON), "{got} {want}");
    }
}

/// A record of `burn::nn::RmsNorm` loads into [`RmsNorm`], which computes the same.
#[test]
fn records_of_burns_norm_load() {
    let mut burn = burn::nn::RmsNormConfig::new(INPUT).with_epsilon(1e-5).init(&device());
    burn.gamma = Param::from_tensor(plain(4, [INPUT]));
    let x = Tensor::<2>::from_data(plain(3, [5, INPUT]).to_data(), &device());
    let want = values(burn.forward(x.clone()));
    let ours = RmsNormConfig::new(INPUT).init(&device()).load_record(burn.into_record());
    for (got, want) in values(ours.forward(x)).iter().zip(want) {
        assert!((got - want).abs() <= 4.0 * f64::from(f32::EPSILON) * want.abs().max(1.0), "{got} {want}");
    }
}

#[test]
fn quantized_codes_survive_moves_and_forks() {
    let net = Net::new(&device());
    let codes = bits(net.layers[0].o_proj.dequantize());
    let cast = net.clone().valid().train().to_device(&Device::flex()).fork(&device());
    assert_eq!(bits(cast.layers[0].o_proj.dequantize()), codes);
}

#[test]
fn adapters_are_exchanged_through_files_of_peft() {
    let dir = tempfile::tempdir().unwrap();
    let base = Net::new(&device());
    let net = wrap(base.clone(), &config()).unwrap();
    save_adapter(&net, &config(), Some("org/base"), dir.path()).unwrap();

    // The file is one of `rekindle-lora`, with full names and PEFT's orientation.
    let modules = rekindle_lora::AdaptableModules {
        linears: ["layers.0", "layers.1"]
            .iter()
            .flat_map(|layer| [(format!("{layer}.q_proj"), INPUT, OUT), (format!("{layer}.o_proj"), OUT, INPUT)])
            .chain([("head".to_owned(), INPUT, 3)])
            .map(|(name, input, out)| rekindle_lora::LinearModule { name, input, out, has_bias: true })
            .collect(),
        ..rekindle_lora::AdaptableModules::default()
    };
    let file = rekindle_lora::Adapter::load(dir.path(), &modules).unwrap();
    let factors = &file.factors["layers.1.q_proj"];
    let adapter = net.layers[1].q_proj.adapter().unwrap();
    assert_eq!((factors.r, &factors.b), (R, &turned(&f32s(adapter.b.val()), OUT)));
    assert_eq!(file.config.base_model_name_or_path(), Some("org/base"));

    let (loaded, config) = load_adapter(base, dir.path()).unwrap();
    assert_eq!((config.r, config.lora_alpha), (R, 6.0));
    let x = Tensor::<2>::from_data(plain(3, [5, INPUT]).to_data(), &device());
    assert_eq!(bits(loaded.forward(x.clone())), bits(net.forward(x)));
    let again = load_adapter(loaded, dir.path()).unwrap_err();
    assert!(matches!(again, Error::Wrapped { .. }));
}

#[test]
fn an_optimizer_of_burn_trains_the_adapters_alone() {
    let mut net = wrap(Net::new(&device()), &config()).unwrap();
    let base = net.clone();
    let x = Tensor::<2>::from_data(plain(3, [5, INPUT]).to_data(), &device());
    let target = Tensor::<2>::from_data(plain(4, [5, 3]).to_data(), &device());
    let mut optimizer = AdamWConfig::new().init();
    let mut losses = Vec::new();
    for _ in 0..20 {
        let loss = (net.forward(x.clone()) - target.clone()).powi_scalar(2).mean();
        losses.push(values(loss.clone())[0]);
        let grads = GradientsParams::from_grads(loss.backward(), &net);
        net = optimizer.step(1e-2, net, grads);
    }
    assert!(losses[19] < 0.5 * losses[0], "{losses:?}");
    assert_eq!(bits(net.layers[0].q_proj.weight.base()), bits(base.layers[0].q_proj.weight.base()));
    assert_eq!(bits(net.layers[0].o_proj.dequantize()), bits(base.layers[0].o_proj.dequantize()));
    assert_ne!(
        bits(net.layers[0].o_proj.adapter().unwrap().b.val()),
        bits(base.layers[0].o_proj.adapter().unwrap().b.val())
    );
}

#[test]
fn an_adapter_used_twice_gets_the_sum_of_its_gradients() {
    let linear = wrap(Alone { q_proj: linear(&device()) }, &config()).unwrap().q_proj;
    let adapter = linear.adapter().unwrap();
    let grad = |seeds: &[u64]| {
        let sum = seeds.iter().map(|&seed| linear.forward(plain(seed, [5, INPUT])).sum()).reduce(|a, b| a + b).unwrap();
        adapter.a.val().grad(&sum.backward()).unwrap()
    };
    assert_eq!(bits(grad(&[3, 4])), bits(grad(&[3]) + grad(&[4])));
}

/// `materialize` merges the adapter of a dense linear.
#[test]
fn a_dense_linear_merges() {
    let linear = wrap(Alone { q_proj: linear(&device()) }, &config()).unwrap();
    let x = plain(3, [5, INPUT]);
    let before = values(linear.q_proj.forward(x.clone()));
    let merged = linear.materialize().q_proj;
    assert!(merged.adapter().is_none());
    for (a, b) in values(merged.forward(x)).iter().zip(before) {
        // Numbers up to 64, in sums of 64 products.
        assert!((a - b).abs() <= 64.0 * 64.0 * f64::from(f32::EPSILON), "{a} {b}");
    }
}
