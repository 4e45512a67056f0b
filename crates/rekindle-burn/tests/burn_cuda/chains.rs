//! Random chains of operations of Burn and of ours, in both orders, on rows that Burn pads.

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, Distribution, Tensor, activation};
use rekindle_burn::{LoraLinear, RmsNorm, SwiGluConfig};

use crate::common::{noise, tensor, values};
use crate::formulas;

const CHAINS: usize = 200;
const STEPS: usize = 16;

pub(crate) fn run(device: &Device) {
    let device = device.clone().autodiff();
    let (mut wrong, mut all) = (Vec::new(), Vec::new());
    for chain in 0..CHAINS {
        // Rows of 512 to 1,280 bytes; Burn pads those that are not powers of two.
        let width = 128 + 32 * (chain % 7);
        let reference = compute(chain, width, &device, false);
        let ours = compute(chain, width, &device, true);
        let relative = reference.iter().zip(&ours).map(|(reference, ours)| {
            let largest = reference.iter().fold(0.0, |m: f64, value| m.max(value.abs()));
            let error = reference.iter().zip(ours).fold(0.0, |e: f64, (a, b)| f64::max(e, (a - b).abs()));
            let finite = ours.iter().all(|value| value.is_finite()) && ours.len() == reference.len();
            if finite { error / largest } else { f64::INFINITY }
        });
        let relative = relative.fold(0.0, f64::max);
        // Sixteen steps in f32, whose products Burn may compute in TF32 (10 bits); a lost order is off by the whole value.
        all.push(relative);
        if relative > 0.05 {
            wrong.push((chain, relative));
        }
    }
    all.sort_by(f64::total_cmp);
    println!(
        "chains: errors relative to the largest value: median {:e}, greatest {:e}",
        all[CHAINS / 2],
        all[CHAINS - 1]
    );
    assert!(wrong.is_empty(), "{} of {CHAINS} chains are wrong: {:?}", wrong.len(), &wrong[..wrong.len().min(8)]);
    println!("chains: {CHAINS} of {STEPS} steps are right");
}

/// The result and the gradients of x, W and gamma.
fn compute(chain: usize, width: usize, device: &Device, ours: bool) -> [Vec<f64>; 4] {
    let leaf = |seed, shape: [usize; 2], scale: f32| {
        let values: Vec<f32> = noise(seed + 10 * chain as u64, shape[0] * shape[1]).iter().map(|v| v * scale).collect();
        tensor(&values, shape, device, DType::F32).require_grad()
    };
    let x = leaf(1, [48, width], 1.0);
    let (w, gamma) = (leaf(2, [width, width], 3.0 / (width as f32).sqrt()), leaf(3, [1, width], 1.0));
    let linear = LoraLinear { weight: Param::initialized(ParamId::new(), w.clone()), bias: None };
    let gain = gamma.clone().reshape([width]) + 1.0;
    let norm = RmsNorm { gamma: Param::initialized(ParamId::new(), gain.clone()), epsilon: 1e-5, one_plus: false };
    let swiglu = SwiGluConfig::new().init();
    let mut state = chain as u64 + 1;
    let mut y = x.clone();
    for _ in 0..STEPS {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        y = match (state >> 33) % 7 {
            0 => y.tanh() * 1.5,
            1 => y.clone() + y.flip([0]),
            2 if ours => linear.forward(y),
            2 => y.matmul(w.clone()),
            3 if ours => swiglu.forward(y.clone(), y.flip([0])),
            3 => activation::silu(y.clone()) * y.flip([0]),
            4 => {
                // Memory that is freed and taken again.
                let _garbage = Tensor::<2>::random([96, width], Distribution::Default, device) + 1.0;
                y * 0.9
            }
            _ => y,
        };
        y = if ours { norm.forward(y) } else { formulas::rms_norm(y.unsqueeze(), gain.clone()).squeeze_dim::<2>(0) };
    }
    let grads = (y.clone() * leaf(4, [48, width], 1.0).detach()).sum().backward();
    let of = |leaf: &Tensor<2>| leaf.grad(&grads).map(values).unwrap_or_default();
    [values(y), of(&x), of(&w), of(&gamma)]
}
