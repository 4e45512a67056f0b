//! `cargo xtask bench kernels`: compares the operations of a training step on a CUDA device with their lower bounds.

use std::error::Error;
use std::path::Path;
use std::process::Command;

use rekindle_kernels::attention::{self, Documents, Heads};
use rekindle_kernels::expert_act::{self, ClampedSwiglu, ExpertActivation};
use rekindle_kernels::gated_activation::{self, Activation};
use rekindle_kernels::gated_delta::{self, DeltaHeads, DeltaInputs, Sequences};
use rekindle_kernels::grouped::{self, GroupedRows};
use rekindle_kernels::linear_cross_entropy::{self, LmHead, TokenWeights};
use rekindle_kernels::optimizer::{self, Clip, OptimizerState, StateFormat, UpdateRule, UpdateStep};
use rekindle_kernels::quantized::{Absmax, BlockCodec, Fp8Scaling, QuantizedData, QuantizedFormat};
use rekindle_kernels::rms_norm::{self, Gain, GainEps};
use rekindle_kernels::rope::{self, HeadNorm, RopeTables, Rotation};
use rekindle_kernels::routing::{self, Dispatch, RoutingForm};
use rekindle_kernels::runtime::{BLOCK_FORMATS, Cuda};
use rekindle_kernels::{
    DType, Device, ParamsBuilder, QuantizedWeight, Tensor, from_f32, from_le_bytes, matmul, parse_device,
};
use serde_json::{Value, json};

use super::result;

/// Embedded, because there may be no checkout on the machine.
const PEER: &str = include_str!("../../peers/gpu_kernels.py");

/// Measured runs of each operation, after three warm-up runs.
const RUNS: usize = 20;

/// Tokens per step. The sizes below are those of Qwen3-4B.
const TOKENS: usize = 8192;
const HIDDEN: usize = 2560;
const INTERMEDIATE: usize = 9728;
const VOCAB: usize = 151_936;
const HEADS: Heads = Heads::new(32, 8, 128, 0.088_388_35);

/// Numbers of documents and tokens per document of Qwen3-4B's attention.
const ATTENTION: [(usize, usize); 3] = [(4, 2048), (1, 8192), (1, 32_768)];

/// Attention of other models: name, heads, and whether there are sinks.
const OTHER_ATTENTION: [(&str, Heads, bool); 4] = [
    ("Gemma-3-4B full", Heads::new(8, 4, 256, 0.0625), false),
    ("Gemma-3-4B window 1024", Heads::new(8, 4, 256, 0.0625).with_window(1024), false),
    ("gpt-oss full", Heads::new(64, 8, 64, 0.125), true),
    ("gpt-oss window 128", Heads::new(64, 8, 64, 0.125).with_window(128), true),
];

/// Rows of x and `[out, in]` of the weight: the linears of Qwen3-4B, fused as at run time, and a square matrix.
const PRODUCTS: [[usize; 3]; 6] = [
    [TOKENS, 2 * INTERMEDIATE, HIDDEN],
    [TOKENS, HIDDEN, INTERMEDIATE],
    [TOKENS, 6144, HIDDEN],
    [TOKENS, HIDDEN, 4096],
    [512, VOCAB, HIDDEN],
    [8192, 8192, 8192],
];

/// Experts, and `[out, in]` of each, with [`EXPERT_ROWS`] rows in all: gate and up, and down, of Qwen3-30B-A3B; gate and
/// up of gpt-oss-20B.
const EXPERTS: [(usize, [usize; 2]); 3] = [(128, [1536, 2048]), (128, [2048, 768]), (32, [5760, 2880])];
const EXPERT_ROWS: usize = 65_536;

/// Heads of the gated delta layers of Qwen3.5-4B, with [`TOKENS`] tokens in four documents.
const DELTA: DeltaHeads = DeltaHeads { key_heads: 16, value_heads: 32, key_dim: 128, value_dim: 128 };

/// One measured operation.
struct Row {
    name: String,
    milliseconds: f64,
    work: Work,
}

/// The minimum work of the device.
enum Work {
    Bytes(f64),
    Flops(f64),
}

/// Prints a table, with PyTorch's figures if a Python is given, and ends with one JSON line. `only` is a name of [`PARTS`].
pub(crate) fn run(device: &str, python: Option<&Path>, only: Option<&str>) -> Result<(), Box<dyn Error>> {
    if let Some(unknown) = only.filter(|only| !PARTS.contains(only)) {
        let names = PARTS.join(", ");
        return Err(format!("there is no part \"{unknown}\" of this benchmark; parts: {names}").into());
    }
    let (device, _) = rekindle_kernels::open_device(parse_device(device)?)?;
    let Device::Cuda(cuda) = &device else { return Err("these kernels run on a CUDA device".into()) };
    let bench = Bench { device: &device, cuda };
    let mut rows = Vec::new();
    for part in PARTS.into_iter().filter(|part| only.is_none_or(|only| only == *part)) {
        match part {
            "attention" => bench.attention(&mut rows)?,
            "bandwidth" => bench.bandwidth(&mut rows)?,
            "products" => bench.products(&mut rows)?,
            "experts" => bench.experts(&mut rows)?,
            _ => bench.delta(&mut rows)?,
        }
    }
    let card = cuda.props().name.clone();
    let peers = python.map(|python| peer(python, only)).transpose()?.unwrap_or_default();
    println!("{card}");
    println!("{:<56}{:>10}{:>16}{:>12}{:>8}", "", "ms", "", "PyTorch", "ratio");
    let mut report = serde_json::Map::new();
    for Row { name, milliseconds, work } in &rows {
        let (rate, unit) = match work {
            Work::Bytes(bytes) => (bytes / milliseconds / 1e9, "TB/s"),
            Work::Flops(flops) => (flops / milliseconds / 1e9, "TFLOP/s"),
        };
        let peer = peers[name.as_str()].as_f64();
        let beside = peer.map_or_else(String::new, |peer| format!("{peer:>12.3}{:>7.2}×", peer / milliseconds));
        println!("{name:<56}{milliseconds:>10.4}{rate:>9.2} {unit:<7}{beside}");
        report.insert(name.clone(), json!({"ms": milliseconds, "rate": rate, "unit": unit, "peer_ms": peer}));
    }
    println!("{}", json!({"card": card, "rows": report}));
    Ok(())
}

/// The parts of the benchmark.
const PARTS: [&str; 5] = ["attention", "bandwidth", "products", "experts", "delta"];

/// Returns PyTorch's milliseconds by row name.
fn peer(python: &Path, only: Option<&str>) -> Result<Value, Box<dyn Error>> {
    let scratch = tempfile::tempdir()?;
    let script = scratch.path().join("gpu_kernels.py");
    std::fs::write(&script, PEER)?;
    result(Command::new(python).arg("-B").arg(&script).args(only))
}

struct Bench<'a> {
    device: &'a Device,
    cuda: &'a Cuda,
}

impl Bench<'_> {
    /// Times `run`, counting only queued operations whose name contains `part`.
    fn time(
        &self,
        rows: &mut Vec<Row>,
        name: impl Into<String>,
        work: Work,
        part: &str,
        mut run: impl FnMut(),
    ) -> Result<(), Box<dyn Error>> {
        for _ in 0..3 {
            run();
        }
        let ((), entries) = self.cuda.profile(|| (0..RUNS).for_each(|_| run()))?;
        let total: f64 = entries.iter().filter(|entry| entry.name.contains(part)).map(|entry| entry.milliseconds).sum();
        rows.push(Row { name: name.into(), milliseconds: total / RUNS as f64, work });
        Ok(())
    }

    fn attention(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        for (documents, length) in ATTENTION {
            self.one_attention(rows, "", HEADS, false, [documents, length])?;
        }
        for (model, heads, sinks) in OTHER_ATTENTION {
            self.one_attention(rows, &format!(", {model}"), heads, sinks, [4, 2048])?;
        }
        Ok(())
    }

    fn one_attention(
        &self,
        rows: &mut Vec<Row>,
        model: &str,
        layout: Heads,
        sinks: bool,
        [documents, length]: [usize; 2],
    ) -> Result<(), Box<dyn Error>> {
        let Heads { heads, kv_heads, head_dim, window, .. } = layout;
        let tokens = documents * length;
        let cu_seqlens: Vec<u32> = (0..=documents).map(|i| (i * length) as u32).collect();
        let plan = Documents::new(&cu_seqlens, layout, self.device, DType::BF16);
        let (q, d_o) = (self.noise(1, [tokens, heads * head_dim]), self.noise(2, [tokens, heads * head_dim]));
        let [k, v] = [3, 4].map(|seed| self.noise(seed, [tokens, kv_heads * head_dim]));
        let sinks = sinks.then(|| self.noise(5, [1, heads]).row_vector());
        let sinks = sinks.as_ref();
        // Two products over the scores that are seen.
        let hidden = window.map_or(0, |window| length.saturating_sub(window));
        let seen = ((length * length - hidden * hidden) / 2) as f64;
        let forward = (2 * 2 * documents * heads * head_dim) as f64 * seen;
        let name = |pass: &str| format!("attention {pass} {documents} x {length}{model}");
        self.time(rows, name("forward"), Work::Flops(forward), "attention", || {
            attention::forward(&q, &k, &v, sinks, layout, &plan, 0);
        })?;
        let (o, lse) = attention::forward(&q, &k, &v, sinks, layout, &plan, 0);
        let saved = attention::Saved { q, k, v, o, lse };
        self.time(rows, name("backward"), Work::Flops(2.5 * forward), "attention", || {
            attention::backward(&d_o, &saved, None, layout, &plan, 0);
        })
    }

    fn bandwidth(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        let (hidden, wide) = ([TOKENS, HIDDEN], [TOKENS, INTERMEDIATE]);
        let passes = |n: usize, [rows, cols]: [usize; 2]| Work::Bytes((2 * n * rows * cols) as f64);
        let (x, dy) = (self.noise(1, hidden), self.noise(2, hidden));
        let gain = Gain::Plain(self.noise(3, [1, HIDDEN]).row_vector());
        self.time(rows, "rms_norm forward", passes(2, hidden), "", || {
            rms_norm::forward(&x, &gain, 1e-6, 0);
        })?;
        // The sum is written to a copy, which is not timed.
        self.time(rows, "rms_norm forward with residual", passes(4, hidden), "rms_norm", || {
            rms_norm::add_forward(&x, dy.clone().detached(), &gain, 1e-6, 0);
        })?;
        let (_, rstd) = rms_norm::forward(&x, &gain, 1e-6, 0);
        self.time(rows, "rms_norm backward with residual", passes(4, hidden), "rms_norm", || {
            rms_norm::backward(&dy, &x, &gain, &rstd, Some(dy.clone().detached()), 0);
        })?;
        let one_plus = [7, 8].map(|seed| Gain::OnePlus(self.noise(seed, [1, HIDDEN]).row_vector()));
        let [first, second] = one_plus.each_ref().map(|gain| GainEps { gain, eps: 1e-6 });
        self.time(rows, "rms_norm around a residual addition", passes(4, hidden), "", || {
            rms_norm::forward_add_forward(&x, first, &dy, second, 0);
        })?;
        let [gate, up, dact] = [4, 5, 6].map(|seed| self.noise(seed, wide));
        for (name, activation) in [("SwiGLU", Activation::Silu), ("GeGLU", Activation::GeluTanh)] {
            self.time(rows, format!("{name} forward"), passes(3, wide), "", || {
                gated_activation::forward(activation, &gate, &up, 0);
            })?;
            self.time(rows, format!("{name} backward, with act"), passes(6, wide), "gated_activation", || {
                gated_activation::backward(activation, dact.clone(), gate.clone(), up.clone());
            })?;
        }
        drop((gate, up, dact));
        self.rope(rows)?;
        self.loss(rows)?;
        self.optimizer(rows)?;
        for kind in [Kind::FourBit, Kind::Int8, Kind::Fp8(Fp8Scaling::Row), Kind::Fp8(Fp8Scaling::Block)] {
            let packed = QuantizedWeight::new(kind.codes([INTERMEDIATE, HIDDEN]), self.device);
            let (codes, scales) = packed.bytes();
            let bytes = (codes + scales + 2 * INTERMEDIATE * HIDDEN) as f64;
            self.time(rows, kind.name(), Work::Bytes(bytes), "dequant", || {
                packed.decode(DType::BF16);
            })?;
        }
        for (name, elements, bytes) in BLOCK_FORMATS {
            let codec = BlockCodec { name, elements, bytes, decode: |_, _| unreachable!("decoded on the device") };
            let data = QuantizedData::block_zeros([INTERMEDIATE, HIDDEN], codec);
            let stored = QuantizedWeight::new(data, self.device);
            let bytes = (stored.bytes().0 + 2 * INTERMEDIATE * HIDDEN) as f64;
            self.time(rows, format!("decode {name}"), Work::Bytes(bytes), "dequant", || {
                stored.decode(DType::BF16);
            })?;
        }
        let large = self.noise(7, [8 * TOKENS, 16 * 1024]);
        self.time(rows, "copy", passes(2, [8 * TOKENS, 16 * 1024]), "copy", || {
            let _ = large.clone().detached();
        })
    }

    fn rope(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        let Heads { heads, kv_heads, head_dim, .. } = HEADS;
        let half = head_dim / 2;
        let table = |f: fn(f32) -> f32| (0..2048 * half).map(|i| f(i as f32)).collect::<Vec<_>>();
        let tables = RopeTables::new(table(f32::cos), table(f32::sin), half, self.device);
        let positions: Vec<u32> = (0..TOKENS as u32).map(|t| t % 2048).collect();
        let angles = tables.angles(&positions);
        let norms = [8, 9].map(|seed| self.noise(seed, [1, head_dim]).row_vector());
        let norms = norms.map(|weight| HeadNorm { gain: Gain::Plain(weight), eps: 1e-6 });
        let rotation = Some(Rotation { angles: &angles, interleaved: false });
        let (q, k) = (self.noise(1, [TOKENS, heads * head_dim]), self.noise(2, [TOKENS, kv_heads * head_dim]));
        let v = self.noise(3, [TOKENS, 1]);
        let bytes = (2 * TOKENS * (heads + kv_heads) * head_dim) as f64;
        self.time(rows, "q/k norm and rope forward", Work::Bytes(2.0 * bytes), "", || {
            rope::forward_qk(q.clone(), k.clone(), &v, head_dim, Some(&norms), rotation);
        })?;
        let [(_, rstd_q), (_, rstd_k)] = rope::forward_qk(q.clone(), k.clone(), &v, head_dim, Some(&norms), rotation);
        let (rstd_q, rstd_k) = rstd_q.zip(rstd_k).ok_or("a norm leaves its rstd")?;
        self.time(rows, "q/k norm and rope backward", Work::Bytes(3.0 * bytes), "qk_norm", || {
            let saved = [(&norms[0], q.clone(), &rstd_q), (&norms[1], k.clone(), &rstd_k)];
            rope::backward_qk([q.clone(), k.clone()], &v, head_dim, Some(saved), rotation, false);
        })
    }

    fn loss(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        let (h, head) = (self.noise(1, [512, 64]), LmHead::new(self.noise(2, [VOCAB, 64])));
        let capped = LmHead { softcap: Some(30.0), ..head.clone() };
        let targets: Vec<i32> = (0..512).map(|t| t * 250 % VOCAB as i32).collect();
        let weights = TokenWeights::Uniform(1.0);
        // f32 logits are read, and their gradient is written in bf16.
        let bytes = (512 * VOCAB * 6) as f64;
        self.time(rows, "cross entropy, loss and gradient", Work::Bytes(bytes), "cross_entropy", || {
            linear_cross_entropy::forward_backward(&h, &head, &targets, weights, None);
        })?;
        self.time(
            rows,
            "cross entropy with a softcap, loss and gradient",
            Work::Bytes(bytes),
            "cross_entropy",
            || {
                linear_cross_entropy::forward_backward(&h, &capped, &targets, weights, None);
            },
        )?;
        let read = (512 * VOCAB * 4) as f64;
        self.time(rows, "log-probabilities", Work::Bytes(read), "cross_entropy", || {
            linear_cross_entropy::log_probs(&h, &head, &targets);
        })?;
        let saved = linear_cross_entropy::log_probs(&h, &head, &targets);
        self.time(rows, "log-probabilities, gradient", Work::Bytes(bytes), "cross_entropy", || {
            linear_cross_entropy::backward(&h, &head, &saved, weights, None);
        })
    }

    fn optimizer(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        let n = 64 << 20;
        let mut builder = ParamsBuilder::new(self.device, DType::BF16);
        builder.push("w", &[1024, n / 1024], true, &vec![0.01; n]);
        let mut params = builder.build();
        let mut grads = params.zero_grads();
        // Random codes of all values.
        grads.add(params.infos()[0].at, self.noise(1, [1024, n / 1024]));
        let rule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
        let step = UpdateStep { t: 1, rates: 1e-4.into(), weight_decay: 0.01 };
        let clip = Clip::of(&grads, 1.0, 0.0);
        for (name, format, bytes) in [
            ("adamw", StateFormat::F32, 28.0),
            ("adamw_8bit", StateFormat::Blockwise8, 16.0 + 4.0 / 64.0),
            ("adamw_8bit, state in host memory", StateFormat::Host8, 16.0 + 4.0 / 64.0),
        ] {
            let mut state = OptimizerState::new(params.infos(), self.device, rule, format);
            self.time(rows, name, Work::Bytes(bytes * n as f64), "adamw", || {
                optimizer::apply(&mut params, &grads, &mut state, &step, &clip);
            })?;
        }
        Ok(())
    }

    fn products(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        for [m, n, k] in PRODUCTS {
            let (x, w, dy) = (self.noise(1, [m, k]), self.noise(2, [n, k]), self.noise(3, [m, n]));
            let flops = || Work::Flops((2 * m * n * k) as f64);
            self.time(rows, format!("product nt {m} x {n} x {k}"), flops(), "", || {
                matmul::nt(&x, &w);
            })?;
            self.time(rows, format!("product nn {m} x {k} x {n}"), flops(), "", || {
                matmul::nn(&dy, &w);
            })?;
        }
        Ok(())
    }

    fn experts(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        for (experts, [n, k]) in EXPERTS {
            // Nearly even, with borders anywhere.
            let chosen: Vec<u32> = (0..EXPERT_ROWS as u32)
                .map(|s| s.wrapping_mul(2_654_435_761) >> 16)
                .map(|hash| hash % experts as u32)
                .collect();
            let dispatch = Dispatch::of(&chosen, experts, 1, self.device);
            let [x, dy] = [(1, k), (2, n)].map(|(seed, width)| self.noise(seed, [EXPERT_ROWS, width]));
            let w = self.noise(3, [experts * n, k]);
            let flops = || Work::Flops((2 * EXPERT_ROWS * n * k) as f64);
            let name = |form: &str, n: usize, k: usize| format!("grouped {form} {n} x {k}, {experts} experts");
            self.time(rows, name("nt", n, k), flops(), "grouped", || {
                grouped::nt(GroupedRows::Sorted(&x), &w, &dispatch);
            })?;
            self.time(rows, name("nn", k, n), flops(), "grouped", || {
                grouped::nn(GroupedRows::Sorted(&dy), &w, &dispatch);
            })?;
            if k != EXPERTS[0].1[1] {
                continue;
            }
            let mut builder = ParamsBuilder::new(self.device, DType::BF16);
            let at = builder.push("w", &[experts * n, k], true, &vec![0.0; experts * n * k]);
            let mut grads = builder.build().zero_grads();
            self.time(rows, name("tn", n, k), flops(), "grouped", || {
                grads.add_grouped_tn(at, 1.0, GroupedRows::Sorted(&dy), GroupedRows::Sorted(&x), &dispatch);
            })?;
        }
        self.routing(rows)
    }

    /// The gated delta rule with its gates and the norms of queries and keys.
    fn delta(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        let cu_seqlens: Vec<u32> = (0..=4).map(|i| (i * TOKENS / 4) as u32).collect();
        let sequences = Sequences::new(&cu_seqlens, self.device);
        let gates = [TOKENS, DELTA.value_heads];
        let vector = |seed| self.noise(seed, [1, DELTA.value_heads]).row_vector();
        let inputs = DeltaInputs {
            qkv: self.noise(1, [TOKENS, DELTA.width()]),
            b: self.noise(2, gates),
            a: self.noise(3, gates),
            a_log: vector(4),
            dt_bias: vector(5),
        };
        let d_o = self.noise(6, [TOKENS, DELTA.value_width()]);
        // The operands are read and the results written once.
        let bytes = |width: usize| Work::Bytes((2 * TOKENS * width) as f64);
        let [width, values] = [DELTA.width(), DELTA.value_width()];
        self.time(rows, "gated delta rule forward 4 x 2048", bytes(width + values), "", || {
            gated_delta::forward(&inputs, DELTA, &sequences);
        })?;
        self.time(rows, "gated delta rule backward 4 x 2048", bytes(2 * width + values), "", || {
            gated_delta::backward(&d_o, &inputs, DELTA, &sequences);
        })
    }

    /// The operations between the products of Qwen3-30B-A3B's experts.
    fn routing(&self, rows: &mut Vec<Row>) -> Result<(), Box<dyn Error>> {
        const TOP_K: usize = 8;
        let (experts, [width, hidden]) = EXPERTS[0];
        let tokens = EXPERT_ROWS / TOP_K;
        let logits = self.noise(1, [tokens, experts]);
        let form = RoutingForm::SoftmaxTopK { normalize: true };
        let bytes = |values: usize| Work::Bytes(2.0 * values as f64);
        self.time(rows, "router and sort by expert", bytes(tokens * experts), "", || {
            routing::forward(logits.clone(), TOP_K, form);
        })?;
        let routing::Routing { weights, dispatch, .. } = routing::forward(logits.clone(), TOP_K, form);
        let (y, onto) = (self.noise(2, [EXPERT_ROWS, hidden]), self.noise(3, [tokens, hidden]));
        self.time(rows, "sum over a token's experts", bytes((EXPERT_ROWS + 2 * tokens) * hidden), "", || {
            routing::sum_slots(&y, &dispatch, Some(&onto));
        })?;
        drop(y);
        let (gate_up, dact) = (self.noise(4, [EXPERT_ROWS, width]), self.noise(5, [EXPERT_ROWS, width / 2]));
        let values = EXPERT_ROWS * width;
        self.time(rows, "expert activation forward", bytes(values + values / 2), "", || {
            expert_act::forward(&gate_up, &weights, &dispatch, ExpertActivation::Silu);
        })?;
        self.time(rows, "expert activation backward", bytes(3 * values), "expert_act", || {
            expert_act::backward(dact.clone(), gate_up.clone(), &weights, &dispatch, ExpertActivation::Silu);
        })?;
        let bias = self.noise(6, [experts, width]);
        let clamped = ExpertActivation::ClampedSwiglu(ClampedSwiglu { alpha: 1.702, limit: 7.0, bias: &bias });
        self.time(rows, "clamped expert activation forward", bytes(values + values / 2), "", || {
            expert_act::forward(&gate_up, &weights, &dispatch, clamped);
        })?;
        self.time(rows, "clamped expert activation backward", bytes(3 * values), "", || {
            expert_act::backward(dact.clone(), gate_up.clone(), &weights, &dispatch, clamped);
        })
    }

    /// Returns random bf16 numbers in (-1, 1).
    fn noise(&self, seed: u64, dims: [usize; 2]) -> Tensor<2> {
        // Repeats a table, because generating gigabytes of random numbers would dominate the run time.
        const TABLE: usize = (1 << 20) - 3;
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        };
        let n = dims[0] * dims[1];
        if n <= TABLE {
            return from_f32((0..n).map(|_| next()).collect(), dims, self.device, DType::BF16);
        }
        // The upper half of an f32 is a bf16.
        let table: Vec<u8> = (0..TABLE).flat_map(|_| ((next().to_bits() >> 16) as u16).to_le_bytes()).collect();
        let bytes: Vec<u8> = table.iter().copied().cycle().take(2 * n).collect();
        from_le_bytes(&bytes, dims, self.device, DType::BF16)
    }
}

#[derive(Clone, Copy)]
enum Kind {
    FourBit,
    Int8,
    Fp8(Fp8Scaling),
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::FourBit => "NF4 decode, double quantization",
            Self::Int8 => "int8 decode",
            Self::Fp8(Fp8Scaling::Block) => "fp8 decode, scales by block",
            Self::Fp8(_) => "fp8 decode, scales by row",
        }
    }

    fn codes(self, dims: [usize; 2]) -> QuantizedData {
        let n = dims[0] * dims[1];
        let byte = |i: usize| (i.wrapping_mul(2_654_435_761) >> 11) as u8;
        let format = match self {
            Self::Int8 => {
                let codes = (0..n).map(|i| byte(i).cast_signed()).collect();
                QuantizedFormat::Int8 { codes, scales: vec![0.5; dims[0]], factor: 1.0 / 127.0 }
            }
            Self::Fp8(scaling) => QuantizedFormat::Fp8 {
                codes: (0..n).map(|i| byte(i) & 0xf7).collect(),
                scales: vec![0.5; scaling.scales(dims)],
                scaling,
                section: dims[0],
            },
            Self::FourBit => QuantizedFormat::FourBit {
                codes: (0..n / 2).map(byte).collect(),
                table: core::array::from_fn(|i| i as f32 / 8.0 - 1.0),
                blocksize: 64,
                absmax: Absmax::Double {
                    codes: (0..n / 64).map(byte).collect(),
                    map: Box::new(core::array::from_fn(|i| i as f32 / 128.0 - 1.0)),
                    nested: vec![0.1; n / 64 / 256],
                    blocksize: 256,
                    offsets: vec![0.05],
                },
            },
        };
        QuantizedData { dims, format }
    }
}
