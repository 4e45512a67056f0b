//! An NF4 layer in a network of one's own: a trained network is quantized, and an adapter makes up for the loss (QLoRA).
//!
//! `cargo run --release -p rekindle-burn --example nf4`

use burn::module::Module;
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Distribution, Tensor, activation};
use burn_optim::{AdamWConfig, GradientsParams};
use rekindle_burn::{QuantLinear, QuantLinearConfig, wrap};
use rekindle_lora::LoraConfig;

/// The network as it was trained.
#[derive(Module, Debug)]
struct Dense {
    up: Linear,
    down: Linear,
}

/// The same network with 4-bit weights.
#[derive(Module, Debug)]
struct Packed {
    up: QuantLinear,
    down: QuantLinear,
}

impl Dense {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(activation::relu(self.up.forward(x)))
    }
}

impl Packed {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(activation::relu(self.up.forward(x)))
    }
}

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    let device = Device::flex().autodiff();
    device.seed(3407);
    let dense = Dense { up: LinearConfig::new(64, 128).init(&device), down: LinearConfig::new(128, 64).init(&device) };
    let packed = Packed {
        up: QuantLinearConfig::new(64, 128).quantize(dense.up.clone().into())?,
        down: QuantLinearConfig::new(128, 64).quantize(dense.down.clone().into())?,
    };
    let mut packed = wrap(packed, &LoraConfig::new(8).target_modules("all-linear"))?;

    let x = Tensor::<2>::random([256, 64], Distribution::Normal(0.0, 1.0), &device);
    let target = dense.valid().forward(x.clone().without_autodiff());
    let mut optimizer = AdamWConfig::new().init();
    let mut errors = Vec::new();
    for _ in 0..60 {
        let loss = (packed.forward(x.clone()) - target.clone()).powi_scalar(2).mean();
        errors.push(loss.clone().into_scalar::<f32>());
        let grads = GradientsParams::from_grads(loss.backward(), &packed);
        packed = optimizer.step(3e-3, packed, grads);
    }
    println!("mean squared error: quantized {:.2e}, with the trained adapter {:.2e}", errors[0], errors[59]);
    assert!(errors[59] < 0.7 * errors[0], "the adapter made up for little: {errors:?}");
    Ok(())
}
