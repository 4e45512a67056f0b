//! Quantized networks: which linears, their bits, adapters, records and Burn's own linear.

#![allow(missing_docs, clippy::unwrap_used)]

mod common;

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::store::ModuleRecord;
use burn::tensor::{Device, Tensor};
use burn_optim::{AdamWConfig, GradientsParams};
use common::{bits, device, plain, values};
use rekindle_burn::{
    Checkpointed, Error, LoraLinear, LoraLinearConfig, QuantConfig, QuantLinear, QuantLinearConfig, WeightFormat,
    load_adapter, quantize, save_adapter, wrap,
};
use rekindle_lora::LoraConfig;

const WIDTH: usize = 64;

#[derive(Module, Debug)]
struct Net {
    layers: Vec<Checkpointed<Layer>>,
    lm_head: Linear,
}

#[derive(Module, Debug)]
struct Layer {
    up_proj: LoraLinear,
    down_proj: Linear,
}

impl Layer {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        x.clone() + self.down_proj.forward(self.up_proj.forward(x).tanh())
    }
}

impl Net {
    fn new(device: &Device) -> Self {
        let layer = |_| Layer {
            up_proj: LoraLinearConfig::new(WIDTH, 96).init(device),
            down_proj: LinearConfig::new(96, WIDTH).init(device),
        };
        Self {
            layers: (0..2).map(|layer_index| Checkpointed::new(layer(layer_index))).collect(),
            lm_head: LinearConfig::new(WIDTH, 3).init(device),
        }
    }

    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.lm_head.forward(self.layers.iter().fold(x, |x, layer| layer.forward(x, Layer::forward)))
    }
}

fn x() -> Tensor<2> {
    plain(3, [5, WIDTH]).autodiff()
}

fn lora() -> LoraConfig {
    let text = r#"{"r": 4, "lora_alpha": 6.0, "target_modules": "all-linear", "init_lora_weights": false}"#;
    serde_json::from_str(text).unwrap()
}

#[test]
fn a_quantized_weight_has_the_bits_of_the_layer() {
    for format in [WeightFormat::Nf4, WeightFormat::Fp4, WeightFormat::Int8] {
        let net = Net::new(&device());
        let config = QuantLinearConfig::new(WIDTH, 96).with_format(format);
        let layer: QuantLinear = config.quantize(net.layers[0].up_proj.clone()).unwrap();
        let down = net.layers[0].down_proj.clone();
        let config = QuantLinearConfig::new(96, WIDTH).with_format(format);
        let down_layer: QuantLinear = config.quantize(down.into()).unwrap();

        let net = quantize(net, &QuantConfig::new(format)).unwrap();
        assert_eq!(bits(net.layers[0].up_proj.forward(x())), bits(layer.forward(x())));
        // Burn's linear decodes the weight.
        let down = &net.layers[0].down_proj;
        assert_eq!(down.weight.val().dims(), [96, WIDTH]);
        assert_eq!(bits(down.weight.val()), bits(down_layer.dequantize()));
        let h = plain(4, [5, 96]).autodiff();
        for (got, want) in values(down.forward(h.clone())).iter().zip(values(down_layer.forward(h))) {
            // A sum of 96 products of numbers below 1/8 and 1.
            assert!((got - want).abs() <= 96.0 * f64::from(f32::EPSILON), "{got} {want}");
        }
        // The weights are codes, a placeholder and sizes.
        let floats = 96 + WIDTH + 2 * (1 + 2);
        assert_eq!(net.layers[0].num_params(), floats);
    }
}

#[test]
fn names_choose_the_linears() {
    let quantized = |config: &QuantConfig| {
        let net = quantize(Net::new(&device()), config).unwrap();
        [net.layers[0].up_proj.quantized().is_some(), net.layers[1].up_proj.quantized().is_some()]
    };
    let default = QuantConfig::default();
    assert_eq!(quantized(&default), [true, true]);
    assert_eq!(quantized(&default.clone().target_modules(["down_proj"])), [false, false]);
    assert_eq!(quantized(&default.clone().exclude_modules(["layers.1.up_proj"])), [true, false]);
    let head = quantize(Net::new(&device()), &default).unwrap().lm_head;
    assert_eq!(head.weight.base().dims(), [WIDTH, 3], "the output layer is not quantized");

    let error = quantize(Net::new(&device()), &default.clone().target_modules(["up_porj"])).unwrap_err().to_string();
    assert_eq!(error, "target_modules \"up_porj\" matches no linear of this model; nearest: \"up_proj\"");
    let wrong = QuantConfig { blocksize: 48, ..QuantConfig::default() };
    assert!(matches!(quantize(Net::new(&device()), &wrong), Err(Error::Quant(_))));
    let adapted = wrap(Net::new(&device()), &lora()).unwrap();
    assert!(matches!(quantize(adapted, &default), Err(Error::Wrapped { .. })));
}

/// Gradients of adapters are those of a `QuantLinear` with the same adapter.
#[test]
fn adapters_train_over_quantized_weights() {
    let net = wrap(quantize(Net::new(&device()), &QuantConfig::default()).unwrap(), &lora()).unwrap();
    let grads = net.forward(x()).powi_scalar(2).sum().backward();
    let grads = GradientsParams::from_grads(grads, &net);
    // A and B of two linears of each layer and, as PEFT does, not of the output layer.
    assert_eq!(grads.len(), 8);

    let up = &net.layers[0].up_proj;
    let mut layer = QuantLinearConfig::new(WIDTH, 96).init(&device());
    (layer.weight, layer.bias) = (up.quantized().unwrap().weight.clone(), up.bias.clone());
    layer.features = up.quantized().unwrap().features.clone();
    let run = |y: Tensor<2>| {
        let adapter = up.adapter().unwrap();
        let grads = y.clone().powi_scalar(2).sum().backward();
        [bits(y), bits(adapter.a.val().grad(&grads).unwrap()), bits(adapter.b.val().grad(&grads).unwrap())]
    };
    assert_eq!(run(up.forward(x())), run(layer.forward(x())));
}

#[test]
fn records_hold_codes_scales_and_adapters() {
    let new = || wrap(quantize(Net::new(&device()), &QuantConfig::default()).unwrap(), &lora()).unwrap();
    let (net, other) = (new(), new());
    let bytes = net.clone().into_record().into_bytes().unwrap();
    // Dense weights alone would be 4 · 2 · 2 · 64 · 96 bytes.
    assert!(bytes.len() < 4 * 2 * 2 * 64 * 96 / 2, "{} bytes", bytes.len());
    let loaded = other.load_record(ModuleRecord::from_bytes(bytes).unwrap());
    assert_eq!(bits(loaded.forward(x())), bits(net.forward(x())));
    let moved = net.clone().valid().train().to_device(&Device::flex()).fork(&device());
    assert_eq!(bits(moved.forward(x())), bits(net.forward(x())));
}

#[test]
fn adapters_of_quantized_networks_are_files_of_peft() {
    let dir = tempfile::tempdir().unwrap();
    let base = quantize(Net::new(&device()), &QuantConfig::default()).unwrap();
    let net = wrap(base.clone(), &lora()).unwrap();
    save_adapter(&net, &lora(), None, dir.path()).unwrap();
    let (loaded, _) = load_adapter(base, dir.path()).unwrap();
    assert_eq!(bits(loaded.forward(x())), bits(net.forward(x())));
}

#[test]
fn materialize_decodes_and_merges() {
    let net = wrap(quantize(Net::new(&device()), &QuantConfig::default()).unwrap(), &lora()).unwrap();
    let merged = net.clone().materialize();
    assert!(merged.layers[0].up_proj.quantized().is_none());
    assert_eq!(merged.layers[0].up_proj.weight.base().dims(), [WIDTH, 96]);
    for (got, want) in values(merged.forward(x())).iter().zip(values(net.forward(x()))) {
        // Numbers up to 64, in sums of 96 products.
        assert!((got - want).abs() <= 64.0 * 96.0 * f64::from(f32::EPSILON), "{got} {want}");
    }
}

#[test]
fn an_optimizer_trains_the_adapters_of_a_quantized_network() {
    let mut net = wrap(quantize(Net::new(&device()), &QuantConfig::default()).unwrap(), &lora()).unwrap();
    let codes = bits(net.layers[0].up_proj.quantized().unwrap().dequantize());
    let target = plain(4, [5, 3]);
    let (mut optimizer, mut losses) = (AdamWConfig::new().init(), Vec::new());
    for _ in 0..20 {
        let loss = (net.forward(x()) - target.clone()).powi_scalar(2).mean();
        losses.push(values(loss.clone())[0]);
        let grads = GradientsParams::from_grads(loss.backward(), &net);
        net = optimizer.step(1e-2, net, grads);
    }
    assert!(losses[19] < 0.5 * losses[0], "{losses:?}");
    assert_eq!(bits(net.layers[0].up_proj.quantized().unwrap().dequantize()), codes);
}
