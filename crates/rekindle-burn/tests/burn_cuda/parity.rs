//! Results and gradients against `f64`, at most twice as wrong as Burn's operations in the same dtype on the same device.

use std::panic::{AssertUnwindSafe, catch_unwind};

use burn::module::{Param, ParamId};
use burn::tensor::{DType, Device, Int, Tensor, activation};
use rekindle_burn::{
    FlashAttentionConfig, LinearCrossEntropyConfig, LoraLinear, LoraLinearConfig, QuantConfig, RmsNorm,
    RotaryEmbeddingConfig, SwiGluConfig, WeightFormat, quantize, wrap,
};
use rekindle_lora::LoraConfig;

use crate::common::{noise, tensor, values};
use crate::formulas;

/// The number of right results, and a sentence for each wrong one.
#[derive(Default)]
struct Tally {
    right: usize,
    wrong: Vec<String>,
}

impl Tally {
    fn fail(&mut self, message: String) {
        println!("{message}");
        self.wrong.push(message);
    }

    /// Runs a case, whose panic is a failure of it alone.
    fn attempt<T>(&mut self, what: &str, run: impl FnOnce() -> T) -> Option<T> {
        let result = catch_unwind(AssertUnwindSafe(run));
        result.map_err(|_| self.fail(format!("{what}: panicked"))).ok()
    }
}

type Case<'a, const N: usize> = &'a dyn Fn([Tensor<3>; N]) -> Tensor<3>;

/// Widths whose rows are whole vectors of Burn, are padded by it, or begin at odd addresses.
const WIDTHS: [usize; 4] = [64, 320, 448, 33];

pub(crate) fn run(device: &Device) {
    let (mut tally, begin) = (Tally::default(), std::time::Instant::now());
    for dtype in [DType::BF16, DType::F32, DType::F16] {
        for width in WIDTHS {
            layers(device, dtype, width, &mut tally);
            linears(device, dtype, width, &mut tally);
        }
        attention(device, dtype, &mut tally);
        let seconds = begin.elapsed().as_secs_f64();
        println!("parity: {} right, {} wrong up to {dtype:?}, {seconds:.1} s", tally.right, tally.wrong.len());
    }
    let Tally { right, wrong } = tally;
    println!("parity: {right} results and gradients are right, {} wrong", wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

fn layers(device: &Device, dtype: DType, width: usize, tally: &mut Tally) {
    let shape = [2, 7, width];
    let what = |name: &str| format!("{name} {dtype:?} {width}");
    let norm = |gamma: Tensor<3>| RmsNorm {
        gamma: Param::initialized(ParamId::new(), gamma.reshape([width])),
        epsilon: 1e-5,
        one_plus: false,
    };
    judge(
        &what("rms_norm"),
        device,
        dtype,
        [shape, [1, 1, width]],
        &|[x, gamma]| norm(gamma).forward(x),
        &|[x, gamma]| formulas::rms_norm(x, gamma.reshape([width])),
        tally,
    );
    let swiglu = SwiGluConfig::new().init();
    judge(
        &what("swiglu"),
        device,
        dtype,
        [shape, shape],
        &|[gate, up]| swiglu.forward(gate, up),
        &|[gate, up]| activation::silu(gate) * up,
        tally,
    );
    // Strides of a transposed tensor, and rows of a narrowed one.
    judge(
        &what("swiglu of views"),
        device,
        dtype,
        [[2, width, 9], [2, 9, width + 5]],
        &|[gate, up]| swiglu.forward(gate.swap_dims(1, 2), up.narrow(2, 3, width)),
        &|[gate, up]| activation::silu(gate.swap_dims(1, 2)) * up.narrow(2, 3, width),
        tally,
    );
    let loss = LinearCrossEntropyConfig::new().init();
    let targets =
        |like: &Tensor<3>| Tensor::<1, Int>::from_ints([3, 0, 499, 17, 8, 9, 2, 1, 0, 5, 6, 7, 8, 9], &like.device());
    judge(
        &what("cross-entropy"),
        device,
        dtype,
        [shape, [1, 500, width]],
        &|[h, w]| loss.forward(h.clone(), w.squeeze_dim::<2>(0), targets(&h)).reshape([1, 1, 1]),
        &|[h, w]| {
            let wide = if h.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
            let logits = h.clone().reshape([14, width]).matmul(w.squeeze_dim::<2>(0).transpose()).cast(wide);
            let logs = activation::log_softmax(logits, 1).gather(1, targets(&h).reshape([14, 1]));
            logs.mean().neg().reshape([1, 1, 1])
        },
        tally,
    );
    let weight = |w: Tensor<3>| Param::initialized(ParamId::new(), w.squeeze_dim::<2>(0));
    let bias = |b: Tensor<3>| Some(Param::initialized(ParamId::new(), b.reshape([24])));
    judge(
        &what("linear"),
        device,
        dtype,
        [shape, [1, width, 24], [1, 1, 24]],
        &|[x, w, b]| LoraLinear { weight: weight(w), bias: bias(b) }.forward(x),
        &|[x, w, b]| x.matmul(w) + b,
        tally,
    );
}

fn attention(device: &Device, dtype: DType, tally: &mut Tally) {
    for head_dim in [64, 128] {
        for seq in [5, 77] {
            let attention = FlashAttentionConfig::new(4, 2, head_dim).init();
            let (wide, narrow) = ([2, seq, 4 * head_dim], [2, seq, 2 * head_dim]);
            judge(
                &format!("attention {dtype:?} {head_dim} {seq}"),
                device,
                dtype,
                [wide, narrow, narrow],
                &|[q, k, v]| attention.forward(q, k, v),
                &|qkv: [Tensor<3>; 3]| {
                    let mask = formulas::causal(seq, &qkv[0].device(), qkv[0].dtype());
                    let mask = mask.clamp_min(-6e4); // The least of f16, which hides the score too.
                    formulas::attend(qkv, head_dim, mask)
                },
                tally,
            );
            let rope = RotaryEmbeddingConfig::new(head_dim).init();
            judge(
                &format!("rotary {dtype:?} {head_dim} {seq}"),
                device,
                dtype,
                [wide],
                &|[x]| rope.forward(x),
                &|[x]| {
                    let tables = formulas::tables(seq, head_dim, 10000.0, &x.device(), x.dtype());
                    formulas::rotate(x, head_dim, tables)
                },
                tally,
            );
        }
    }
}

/// Adapters, on dense and quantized weights of which Burn's formula gets the decoded values.
fn linears(device: &Device, dtype: DType, width: usize, tally: &mut Tally) {
    let out = 40;
    let config: LoraConfig = serde_json::from_str(
        r#"{"r": 4, "lora_alpha": 6.0, "target_modules": "all-linear", "init_lora_weights": false}"#,
    )
    .unwrap();
    for format in [None, Some(WeightFormat::Nf4), Some(WeightFormat::Int8)] {
        let device = device.clone().autodiff();
        let mut linear = LoraLinearConfig::new(width, out).with_bias(false).init(&device);
        linear.weight = Param::from_tensor(tensor(&noise(5, width * out), [width, out], &device, dtype));
        let net = Alone { q_proj: linear };
        let net = match format {
            Some(format) => quantize(net, &QuantConfig::new(format)).unwrap(),
            None => net,
        };
        let linear = wrap(net, &config).unwrap().q_proj;
        let adapter = linear.adapter().unwrap();
        let decoded = linear.quantized().map_or_else(|| linear.weight.base(), |quantized| quantized.dequantize());
        let parts = [values(decoded), values(adapter.a.val()), values(adapter.b.val())];
        let (x, dy) = (noise(1, 14 * width), noise(99, 14 * out));
        let on = |device: &Device, dtype, ours: bool| {
            let x = tensor(&x, [2, 7, width], device, dtype).require_grad();
            let dy = tensor(&dy, [2, 7, out], device, dtype);
            if ours {
                let y = linear.forward(x.clone());
                let grads = (y.clone() * dy).sum().backward();
                let [a, b] = [&adapter.a, &adapter.b].map(|param| values(param.val().grad(&grads).unwrap()));
                return vec![values(y), values(x.grad(&grads).unwrap()), a, b];
            }
            let leaf = |values: &[f64], shape: [usize; 2]| {
                let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
                tensor(&values, shape, device, dtype).require_grad()
            };
            let (w, a) = (leaf(&parts[0], [width, out]), leaf(&parts[1], [width, 4]));
            let b = leaf(&parts[2], [4, out]);
            let xa = x.clone().matmul(a.clone().unsqueeze());
            let y = x.clone().matmul(w.unsqueeze()) + xa.matmul(b.clone().unsqueeze()) * adapter.scale;
            let grads = (y.clone() * dy).sum().backward();
            let [a, b] = [a, b].map(|leaf| values(leaf.grad(&grads).unwrap()));
            vec![values(y), values(x.grad(&grads).unwrap()), a, b]
        };
        let truth = on(&Device::flex().autodiff(), DType::F64, false);
        let what = format!("adapter {format:?} {dtype:?} {width}");
        if let Some((naive, ours)) = tally.attempt(&what, || (on(&device, dtype, false), on(&device, dtype, true))) {
            compare(&what, dtype, &ours, &naive, &truth, tally);
        }
    }
}

#[derive(burn::module::Module, Debug)]
struct Alone {
    q_proj: LoraLinear,
}

fn judge<const N: usize>(
    what: &str,
    device: &Device,
    dtype: DType,
    shapes: [[usize; 3]; N],
    ours: Case<'_, N>,
    formula: Case<'_, N>,
    tally: &mut Tally,
) {
    let device = device.clone().autodiff();
    let run = |device: &Device, computed: DType, f: Case<'_, N>| {
        let mut seed = 0;
        let leaves = shapes.map(|shape| {
            seed += 1;
            // All computations begin with the values of `dtype`.
            let values = tensor(&noise(seed, shape.iter().product()), shape, &Device::flex(), dtype);
            let data = values.into_data().try_cast(computed).unwrap();
            Tensor::<3>::from_data(data, (device, computed)).require_grad()
        });
        let y = f(leaves.clone());
        let dy = tensor(&noise(99, y.dims().iter().product()), y.dims(), device, y.dtype());
        let grads = (y.clone() * dy).sum().backward();
        let gradients = leaves.iter().map(|leaf| values(leaf.grad(&grads).unwrap()));
        core::iter::once(values(y)).chain(gradients).collect::<Vec<_>>()
    };
    let truth = run(&Device::flex().autodiff(), DType::F64, formula);
    let both = tally.attempt(what, || (run(&device, dtype, formula), run(&device, dtype, ours)));
    if let Some((naive, ours)) = both {
        compare(what, dtype, &ours, &naive, &truth, tally);
    }
}

fn compare(what: &str, dtype: DType, ours: &[Vec<f64>], naive: &[Vec<f64>], truth: &[Vec<f64>], tally: &mut Tally) {
    let unit = match dtype {
        DType::F32 => f64::from(f32::EPSILON),
        DType::F16 => 2f64.powi(-10),
        _ => 2f64.powi(-7),
    };
    for (part, ((ours, naive), truth)) in ours.iter().zip(naive).zip(truth).enumerate() {
        let error = |other: &[f64]| other.iter().zip(truth).fold(0.0, |e: f64, (n, t)| e.max((n - t).abs()));
        let largest = truth.iter().fold(0.0, |m: f64, t| m.max(t.abs()));
        let bound = 2.0 * error(naive) + 4.0 * unit * largest;
        // Written so that a NaN fails.
        let wrong = ours.iter().zip(truth).position(|(got, want)| !((got - want).abs() <= bound));
        match wrong {
            None if ours.len() == truth.len() => tally.right += 1,
            _ => tally.fail(format!("{what}: part {part} is off by {:e} (bound {bound:e})", error(ours))),
        }
    }
}
