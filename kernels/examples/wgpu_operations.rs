//! Launches and time of the operations on wgpu, by their kernels and by Burn's operations, in the shapes of a layer of
//! Qwen3-0.6B.
//!
//! `cargo run -p rekindle-kernels --features wgpu --profile wgpu --example wgpu_operations -- [TOKENS] [PART OF A NAME]`
//!
//! It takes the adapter that wgpu prefers, and a software renderer only where there is no other.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use burn::tensor::{DType, Device as BurnDevice, DeviceKind, DeviceType};
use cubecl::logging::{LaunchObservation, LaunchObserver};
use rekindle_kernels::attention::{self, Documents, Heads, Saved};
use rekindle_kernels::gated_activation::{self, Activation};
use rekindle_kernels::linear_cross_entropy::{self, LmHead, TokenWeights};
use rekindle_kernels::quantized::{Absmax, QuantizedData, QuantizedFormat};
use rekindle_kernels::rms_norm::{self, Gain};
use rekindle_kernels::rope::{self, HeadNorm, RopeTables, Rotation};
use rekindle_kernels::{Backend, Device, QuantizedWeight, Tensor, from_f32};

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 3072;
const HEADS: usize = 16;
const KV_HEADS: usize = 8;
const HEAD_DIM: usize = 128;
const VOCAB: usize = 16_384;
const EPS: f64 = 1e-6;

fn main() {
    let mut args = std::env::args().skip(1);
    let tokens = args.next().map_or(256, |word| word.parse().expect("TOKENS is a number"));
    let only = args.next().unwrap_or_default();
    let found = BurnDevice::enumerate(DeviceType::Wgpu).into_vec();
    let software = BurnDevice::wgpu(DeviceKind::Cpu);
    let device = if found == [software.clone()] { software } else { BurnDevice::wgpu(DeviceKind::DefaultDevice) };
    let name = device.identity().map_or_else(|| "wgpu".to_owned(), |identity| identity.name);
    println!("{tokens} tokens on {name}; launches and milliseconds by Burn's operations and by the kernels");

    let bench = Bench { device, only };
    let on = Device::from(bench.device.clone());
    let random = |seed: u64, rows: usize, cols: usize| matrix(seed, [rows, cols], &on);
    let x = random(1, tokens, HIDDEN);
    let delta = random(2, tokens, HIDDEN);
    let gain = Gain::Plain(from_f32(noise(3, HIDDEN), [HIDDEN], &on, DType::F32));
    let (_, rstd) = rms_norm::forward(&x, &gain, EPS, 0);
    bench.run("rms_norm, with the residual", || drop(rms_norm::add_forward(&x, delta.clone(), &gain, EPS, 0)));
    bench.run("rms_norm backward", || drop(rms_norm::backward(&delta, &x, &gain, &rstd, Some(x.clone()), 0)));

    let [q, d_o] = [4, 5].map(|seed| random(seed, tokens, HEADS * HEAD_DIM));
    let [k, v] = [6, 7].map(|seed| random(seed, tokens, KV_HEADS * HEAD_DIM));
    let norm = || HeadNorm { gain: Gain::Plain(from_f32(noise(8, HEAD_DIM), [HEAD_DIM], &on, DType::F32)), eps: EPS };
    let norms = [norm(), norm()];
    let angles = tokens * HEAD_DIM / 2;
    let tables = RopeTables::new(noise(9, angles), noise(10, angles), HEAD_DIM / 2, &on);
    let angles = tables.angles(&(0..tokens as u32).collect::<Vec<_>>());
    let rotation = || Some(Rotation { angles: &angles, interleaved: false });
    let forward = || rope::forward_qk(q.clone(), k.clone(), &v, HEAD_DIM, Some(&norms), rotation());
    let [(_, rstd_q), (_, rstd_k)] = forward();
    let (rstd_q, rstd_k) = (rstd_q.expect("there is a norm"), rstd_k.expect("there is a norm"));
    bench.run("rope with norms", || drop(forward()));
    bench.run("rope with norms backward", || {
        let saved = Some([(&norms[0], q.clone(), &rstd_q), (&norms[1], k.clone(), &rstd_k)]);
        drop(rope::backward_qk([d_o.clone(), v.clone()], &v, HEAD_DIM, saved, rotation(), false));
    });

    let heads = Heads::new(HEADS, KV_HEADS, HEAD_DIM, 0.088);
    let documents = Documents::new(&[0, tokens as u32], heads, &on, DType::F32);
    let forward = || attention::forward(&q, &k, &v, None, heads, &documents, 0);
    let (o, lse) = forward();
    let saved = Saved { q: q.clone(), k: k.clone(), v: v.clone(), o, lse };
    bench.run("attention", || drop(forward()));
    bench.run("attention backward", || drop(attention::backward(&d_o, &saved, None, heads, &documents, 0)));

    let [gate, up, dact] = [11, 12, 13].map(|seed| random(seed, tokens, INTERMEDIATE));
    bench.run("swiglu", || drop(gated_activation::forward(Activation::Silu, &gate, &up, 0)));
    bench.run("swiglu backward", || {
        drop(gated_activation::backward(Activation::Silu, dact.clone(), gate.clone(), up.clone()));
    });

    let head = LmHead::new(random(14, VOCAB, HIDDEN));
    let targets: Vec<i32> = (0..tokens as i32).map(|t| (t * 37) % VOCAB as i32).collect();
    bench.run("linear cross-entropy and its gradient", || {
        drop(linear_cross_entropy::forward_backward(&x, &head, &targets, TokenWeights::Uniform(1.0), None));
    });

    let weight = QuantizedWeight::new(four_bit([INTERMEDIATE, HIDDEN]), &on);
    bench.run("NF4 product", || drop(weight.nt(&x, None)));
    bench.run("NF4 product backward", || drop(weight.nn(&gate, None)));
}

struct Bench {
    device: BurnDevice,
    only: String,
}

impl Bench {
    fn run(&self, name: &str, operation: impl Fn()) {
        if !name.contains(&self.only) {
            return;
        }
        let [(burn_launches, burn), (launches, kernels)] =
            [Backend::portable_only(|| self.measure(&operation)), self.measure(&operation)];
        println!("{name:40} {burn_launches:4} {burn:9.2}   {launches:4} {kernels:9.2}   {:5.1} ×", burn / kernels);
    }

    /// Launches, and milliseconds in the fastest of five runs after one that compiles.
    fn measure(&self, operation: &impl Fn()) -> (usize, f64) {
        operation();
        self.wait();
        let counter = Arc::new(Counter::default());
        let watching = LaunchObservation::new(counter.clone());
        operation();
        drop(watching);
        self.wait();
        let time = || {
            let start = Instant::now();
            operation();
            self.wait();
            start.elapsed().as_secs_f64() * 1e3
        };
        (counter.0.load(Ordering::Relaxed), (0..5).map(|_| time()).fold(f64::INFINITY, f64::min))
    }

    fn wait(&self) {
        self.device.sync().expect("the device works");
    }
}

#[derive(Default)]
struct Counter(AtomicUsize);

impl LaunchObserver for Counter {
    fn launched(&self, _kernel: &'static str) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn matrix(seed: u64, shape: [usize; 2], device: &Device) -> Tensor<2> {
    from_f32(noise(seed, shape[0] * shape[1]), shape, device, DType::F32)
}

/// Repeatable numbers in (−1, 1).
fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ 0xD1B5_4A32_D192_ED03;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((state >> 40) as f32 / (1u64 << 24) as f32) * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Codes in blocks of 64 with double quantization, as bitsandbytes stores NF4.
fn four_bit(dims: [usize; 2]) -> QuantizedData {
    let bytes = |seed, n| noise(seed, n).into_iter().map(|x| ((x + 1.0) * 128.0) as u8).collect::<Vec<_>>();
    let elements = dims[0] * dims[1];
    let blocks = elements / 64;
    let absmax = Absmax::Double {
        codes: bytes(21, blocks),
        map: Box::new(noise(22, 256).try_into().expect("256 values")),
        nested: noise(23, blocks / 256),
        blocksize: 256,
        offsets: vec![0.1],
    };
    let table = noise(24, 16).try_into().expect("16 values");
    QuantizedData {
        dims,
        format: QuantizedFormat::FourBit { codes: bytes(20, elements / 2), table, blocksize: 64, absmax },
    }
}
