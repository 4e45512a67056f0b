//! The memory that [`Device::Meta`] counts against what an allocator counts while the CPU computes the same.
//!
//! A binary of its own: nothing else may allocate while it measures.

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use burn::tensor::DType;
use rekindle_kernels::attention::{self, Documents, Heads, Saved};
use rekindle_kernels::dropout::{self, Dropout, Token, Tokens};
use rekindle_kernels::gated_activation::{self, Activation};
use rekindle_kernels::gated_delta::{self, DeltaHeads, DeltaInputs, Sequences};
use rekindle_kernels::linear_cross_entropy::{self, LmHead, TokenWeights};
use rekindle_kernels::optimizer::{
    OptimizerState, StateFormat, UpdateRule, UpdateStep, clipped_range_step, clipped_step,
};
use rekindle_kernels::paged_attention::{self, KvPages, PagedBatch};
use rekindle_kernels::quantized::QuantizedData;
use rekindle_kernels::rms_norm::{self, Gain};
use rekindle_kernels::rope::{self, HeadNorm, RopeTables, Rotation};
use rekindle_kernels::{
    Device, Group, ParamsBuilder, QuantizedWeight, RngKey, Tensor, causal_conv, center, embedding, from_f32,
    gated_norm, matmul, output_gate, router_probabilities,
};

/// Counts what is allocated, and the most of it.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

fn more(bytes: usize) {
    MOST.fetch_max(NOW.fetch_add(bytes, Relaxed) + bytes, Relaxed);
}

// SAFETY: every call is the system allocator's own.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        more(layout.size());
        // SAFETY: the caller's promise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) };
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The share by which the two may differ: tasks on other threads need not all hold their scratch memory at once, and
/// index lists are not counted.
const TOLERANCE: f64 = 0.05;

/// Steady runs of a long operation, and of a short one.
const RUNS: usize = 6;
const MANY_RUNS: usize = 100;

/// The time after which an operation is long.
const LONG: Duration = Duration::from_millis(500);

/// The least bytes that a pool of scratch memory has; queues of the thread pool grow by less.
const POOL: usize = 16 << 10;

type Operation = fn(&Device, &mut dyn FnMut());

const TOKENS: usize = 300;
const WIDTH: usize = 512;

fn matrix(device: &Device, rows: usize, cols: usize) -> Tensor<2> {
    let values = (0..rows * cols).map(|i| ((i * 7919 + 13) % 1009) as f32 / 1009.0 - 0.5).collect();
    from_f32(values, [rows, cols], device, DType::F32)
}

fn vector(device: &Device, n: usize) -> Tensor<1> {
    from_f32(vec![0.5; n], [n], device, DType::F32)
}

/// Makes its operands, calls `begin`, and computes. Operands that the operation takes over are made before as well.
const OPERATIONS: &[(&str, Operation)] = &[
    ("products", |device, begin| {
        let (x, w) = (matrix(device, TOKENS, WIDTH), matrix(device, 384, WIDTH));
        begin();
        let y = matmul::nt(&x, &w);
        let dx = matmul::nn(&y, &w);
        let dw = matmul::tn(&y, &x);
        drop((dx, dw));
        drop(matmul::nt_add(y, 2.0, &x, &w));
    }),
    ("a product with the rows of few results turned", |device, begin| {
        let (x, w) = (matrix(device, 40, 4096), matrix(device, 6, 4096));
        begin();
        drop(matmul::nt(&x, &w));
    }),
    ("a product of few rows", |device, begin| {
        let (x, w) = (matrix(device, 12, 1024), matrix(device, 4096, 1024));
        begin();
        drop(matmul::nt(&x, &w));
    }),
    ("a product as wide as a vocabulary", |device, begin| {
        let (x, w) = (matrix(device, 128, WIDTH), matrix(device, 20_000, WIDTH));
        begin();
        let y = matmul::nt(&x, &w);
        drop(matmul::tn(&y, &x));
    }),
    ("columns of a product", |device, begin| {
        let (x, w) = (matrix(device, TOKENS, 64), matrix(device, 384, 64));
        begin();
        let y = matmul::nt(&x, &w);
        let (gate, up) = (y.columns(0, 192), y.columns(192, 192));
        drop(y);
        drop(gated_activation::forward(Activation::Silu, &gate, &up, 0));
    }),
    ("sums", |device, begin| {
        let (x, y) = (matrix(device, TOKENS, WIDTH), matrix(device, TOKENS, WIDTH));
        begin();
        let sum = x.plus(&y);
        let shared = sum.clone();
        drop(sum.scale(2.0));
        let row = vector(device, WIDTH);
        drop(shared.add_row(&row).scale_columns(&row));
        drop(Tensor::cat_columns(vec![y.clone(), y]));
    }),
    ("RMSNorm", |device, begin| {
        let (x, delta) = (matrix(device, TOKENS, WIDTH), matrix(device, TOKENS, WIDTH));
        let gain = Gain::OnePlus(vector(device, WIDTH));
        begin();
        let (sum, y, rstd) = rms_norm::add_forward(&x, delta, &gain, 1e-6, 0);
        let again = rms_norm::recompute(&sum, &gain, &rstd);
        let dw = rms_norm::weight_grad(&y, &sum, &rstd);
        let dx = rms_norm::backward(&y, &sum, &gain, &rstd, Some(again), 0);
        drop((dx, dw));
    }),
    ("gated activation", |device, begin| {
        let [gate, up, dact] = [(); 3].map(|()| matrix(device, TOKENS, WIDTH));
        begin();
        let act = gated_activation::forward(Activation::Silu, &gate, &up, 0);
        drop(act);
        drop(gated_activation::backward(Activation::GeluTanh, dact, gate, up));
    }),
    ("RoPE", |device, begin| {
        let tables = RopeTables::new(vec![0.5; TOKENS * 32], vec![0.5; TOKENS * 32], 32, device);
        let [q, k, v] = [WIDTH, 256, 256].map(|width| matrix(device, TOKENS, width));
        let norms = [(); 2].map(|()| HeadNorm { gain: Gain::Plain(vector(device, 64)), eps: 1e-6 });
        begin();
        let angles = tables.angles(&(0..TOKENS as u32).collect::<Vec<_>>());
        let rotation = Some(Rotation { angles: &angles, interleaved: false });
        let [(q2, rstd_q), (k2, rstd_k)] = rope::forward_qk(q.clone(), k.clone(), &v, 64, Some(&norms), rotation);
        let (rstd_q, rstd_k) = (rstd_q.expect("a norm"), rstd_k.expect("a norm"));
        let saved = [(&norms[0], q, &rstd_q), (&norms[1], k, &rstd_k)];
        drop(rope::backward_qk([q2, k2], &v, 64, Some(saved), rotation, true));
    }),
    ("attention", |device, begin| {
        attention(Heads::new(8, 4, 64, 0.125), false, device, begin);
    }),
    ("attention with a window and sinks", |device, begin| {
        attention(Heads::new(8, 4, 64, 0.125).with_window(200), true, device, begin);
    }),
    ("a causal convolution", |device, begin| {
        let (x, weight) = (matrix(device, TOKENS, WIDTH), matrix(device, WIDTH, 4));
        let sequences = Sequences::new(&[0, 100, TOKENS as u32], device);
        begin();
        let y = causal_conv::forward(&x, &weight, &sequences);
        drop(causal_conv::backward(&y, &x, &weight, &sequences, false));
        drop(causal_conv::backward(&y, &x, &weight, &sequences, true));
    }),
    ("the gated delta rule", |device, begin| {
        let heads = DeltaHeads { key_heads: 4, value_heads: 8, key_dim: 32, value_dim: 64 };
        let qkv = matrix(device, 600, heads.width());
        let [b, a] = [(); 2].map(|()| matrix(device, 600, 8));
        let inputs = DeltaInputs { qkv, b, a, a_log: vector(device, 8), dt_bias: vector(device, 8) };
        let sequences = Sequences::new(&[0, 400, 600], device);
        begin();
        let o = gated_delta::forward(&inputs, heads, &sequences);
        drop(gated_delta::backward(&o, &inputs, heads, &sequences));
    }),
    ("the gated norm", |device, begin| {
        let [x, z, dy] = [(); 3].map(|()| matrix(device, TOKENS, WIDTH));
        let weight = vector(device, 64);
        begin();
        drop(gated_norm::forward(&x, &z, &weight, 1e-6, 0));
        drop(gated_norm::weight_grad(&dy, &x, &z, &weight, 1e-6));
        drop(gated_norm::backward(&dy, &x, &z, &weight, 1e-6));
    }),
    ("the output gate", |device, begin| {
        let [o, dy, dq] = [(); 3].map(|()| matrix(device, TOKENS, WIDTH));
        let qg = matrix(device, TOKENS, 2 * WIDTH);
        begin();
        drop(output_gate::queries(&qg, 64));
        drop(output_gate::forward(&o, &qg, 64, 0));
        drop(output_gate::join(&dq, &dy, &o, &qg, 64));
    }),
    ("rows without their mean", |device, begin| {
        let x = matrix(device, TOKENS, WIDTH);
        begin();
        drop(center::backward(&center::forward(&x)));
    }),
    ("probabilities of experts", |device, begin| {
        let logits = matrix(device, TOKENS, WIDTH);
        begin();
        drop(router_probabilities::forward(&logits));
        drop(router_probabilities::backward(&logits, &[0.5; WIDTH]));
    }),
    ("attention over pages", |device, begin| {
        let heads = Heads::new(8, 4, 64, 0.125);
        let (q, k, v) = (matrix(device, 300, 512), matrix(device, 300, 256), matrix(device, 300, 256));
        begin();
        let mut pages = KvPages::new(70, heads, device, DType::F32).expect("not CUDA");
        let mut batch = PagedBatch::default();
        batch.push(0, 280, &(0..20).collect::<Vec<u32>>());
        batch.push(500, 20, &(20..60).collect::<Vec<u32>>());
        drop(paged_attention::forward([&q, &k, &v], None, heads, &mut pages, &batch, 0));
    }),
    ("embedding", |device, begin| {
        let mut builder = ParamsBuilder::new(device, DType::F32);
        let at = builder.push("table", &[2000, WIDTH], true, &vec![0.5; 2000 * WIDTH]);
        let params = builder.build();
        let mut grads = params.zero_grads();
        let ids: Vec<u32> = (0..TOKENS as u32).collect();
        begin();
        let h = embedding::forward(&params.matrix(at), &ids);
        embedding::backward(h, &ids, &mut grads, at);
    }),
    ("head and loss", |device, begin| {
        let mut builder = ParamsBuilder::new(device, DType::F32);
        let at = builder.push("head", &[20_000, 128], true, &vec![0.01; 20_000 * 128]);
        let params = builder.build();
        let mut grads = params.zero_grads();
        let h = matrix(device, 900, 128);
        let mut targets = vec![7; 900];
        begin();
        let head = LmHead::new(params.matrix(at));
        let weights = TokenWeights::Uniform(1.0);
        drop(linear_cross_entropy::forward(&h, &head, &targets));
        drop(linear_cross_entropy::forward_backward(&h, &head, &targets, weights, None));
        targets[500] = linear_cross_entropy::IGNORED;
        drop(linear_cross_entropy::forward_backward(&h, &head, &targets, weights, Some((&mut grads, at))));
    }),
    ("head and loss with weights that follow from log-probabilities", |device, begin| {
        let mut builder = ParamsBuilder::new(device, DType::F32);
        let at = builder.push("head", &[20_000, 128], true, &vec![0.01; 20_000 * 128]);
        let params = builder.build();
        let mut grads = params.zero_grads();
        let h = matrix(device, 900, 128);
        begin();
        let head = LmHead { softcap: Some(30.0), ..LmHead::new(params.matrix(at)) };
        let saved = linear_cross_entropy::log_probs(&h, &head, &vec![7; 900]);
        let weights = saved.values().log_probs;
        let weights = TokenWeights::from(&*weights);
        drop(linear_cross_entropy::backward(&h, &head, &saved, weights, Some((&mut grads, at))));
    }),
    ("dropout", |device, begin| {
        let x = matrix(device, TOKENS, WIDTH);
        let coordinates = (0..TOKENS as u32).map(|position| Token { row: 0, position }).collect();
        let tokens = Tokens::new(coordinates, device);
        begin();
        let key = RngKey { seed: 1, step: 1 };
        drop(dropout::apply(&x, Dropout { p: 0.1, key, tokens: &tokens }, 3));
    }),
    ("quantized weights", |device, begin| {
        let data =
            [QuantizedData::four_bit_zeros([1024, 2048], 1, 64, Some(256)), QuantizedData::int8_zeros([1024, 2048])];
        let weights = data.map(|data| QuantizedWeight::new(data, device));
        let x = matrix(device, TOKENS, 2048);
        begin();
        for weight in &weights {
            let y = weight.nt(&x, None);
            let dx = weight.nn(&y, None);
            drop(weight.nn(&y, Some(dx)));
            drop(weight.decode(DType::F32));
        }
    }),
    ("an optimizer step", |device, begin| optimizer_step(StateFormat::F32, device, begin)),
    ("an optimizer step with an 8-bit state", |device, begin| optimizer_step(StateFormat::Blockwise8, device, begin)),
    ("an optimizer step in place", |device, begin| {
        let mut builder = ParamsBuilder::in_place(device, DType::F32);
        builder.push("norm", &[512], false, &[1.0; 512]);
        let table = builder.push_bf16(Group::Embedding, "table", &[2000, 512], &vec![0; 2 * 2000 * 512]);
        for data in [QuantizedData::four_bit_zeros([512, 512], 1, 64, None), QuantizedData::int8_zeros([512, 512])] {
            builder.push_quantized("linear", QuantizedWeight::new(data, device));
        }
        let mut params = builder.build();
        begin();
        drop(matmul::nt(&matrix(device, 64, 512), &params.matrix(table)));
        let rule = UpdateRule::Sgd { momentum: 0.0 };
        let mut state = OptimizerState::new(params.infos(), device, rule, StateFormat::F32);
        let grads = params.zero_grads();
        let step = UpdateStep { t: 1, rates: 1e-3.into(), weight_decay: 0.0 };
        drop(clipped_step(&mut params, &grads, &mut state, &step, 1.0));
    }),
];

fn attention(heads: Heads, with_sinks: bool, device: &Device, begin: &mut dyn FnMut()) {
    let [q, k, v] = [WIDTH, 256, 256].map(|width| matrix(device, 900, width));
    let sinks = with_sinks.then(|| vector(device, 8));
    let documents = Documents::new(&[0, 700, 900], heads, device, DType::F32);
    begin();
    let (o, lse) = attention::forward(&q, &k, &v, sinks.as_ref(), heads, &documents, 0);
    let d_o = o.clone();
    let saved = Saved { q, k, v, o, lse };
    drop(attention::backward(&d_o, &saved, sinks.as_ref(), heads, &documents, 0));
}

fn optimizer_step(format: StateFormat, device: &Device, begin: &mut dyn FnMut()) {
    let mut builder = ParamsBuilder::new(device, DType::F32);
    for name in ["a", "b"] {
        builder.push(name, &[512, 512], true, &vec![0.5; 512 * 512]);
    }
    let mut params = builder.build();
    let second = params.infos()[1].at;
    let (dy, x) = (matrix(device, 64, 512), matrix(device, 64, 512));
    begin();
    let rule = UpdateRule::AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8 };
    let mut state = OptimizerState::new(params.infos(), device, rule, format);
    let step = UpdateStep { t: 1, rates: 1e-3.into(), weight_decay: 0.1 };
    let mut grads = params.zero_grads();
    grads.add_tn(second, 1.0, &dy, &x);
    drop(clipped_step(&mut params, &grads, &mut state, &step, 1.0));
    let grads = params.zero_grads_of([second.range()]);
    drop(clipped_range_step(&mut params, second.range(), &grads, &mut state, &step, 1.0));
}

/// Returns the peak of an operation beyond what was allocated when it began, and whether the run was steady: a pool of
/// threads or of scratch memory that it created would be part of the peak, and stays allocated.
fn allocated(operation: Operation) -> (usize, bool) {
    let start = NOW.load(Relaxed);
    let mut before = 0;
    operation(&Device::cpu(), &mut || {
        before = NOW.load(Relaxed);
        MOST.store(before, Relaxed);
    });
    (MOST.load(Relaxed) - before, NOW.load(Relaxed) < start + POOL)
}

/// Returns the peak over steady runs: at least [`RUNS`], and more of a short operation. On a busy machine, tasks of different
/// threads seldom hold their scratch memory at the same time, and a thread that takes part for the first time creates its
/// pool.
fn steady_peak(operation: Operation) -> usize {
    let began = Instant::now();
    let (mut peak, mut steady) = (0, 0);
    for run in 0.. {
        assert!(run < 1000, "nearly every run creates a pool");
        let (allocated, is_steady) = allocated(operation);
        if is_steady {
            peak = allocated.max(peak);
            steady += 1;
        }
        if steady >= RUNS && (steady >= MANY_RUNS || began.elapsed() > LONG) {
            break;
        }
    }
    peak
}

/// The same as a device without values counts.
fn counted(operation: Operation) -> usize {
    let device = Device::meta();
    let mut before = 0;
    operation(&device, &mut || {
        before = device.memory_stats().in_use;
        device.reset_memory_stats();
    });
    device.memory_stats().high_water - before
}

#[test]
fn operations_take_what_is_counted() {
    let mut wrong = Vec::new();
    println!("{:<48}{:>12}{:>12}{:>8}", "", "counted", "allocated", "%");
    for &(name, operation) in OPERATIONS {
        let allocated = steady_peak(operation);
        let counted = counted(operation);
        let off = counted as f64 / allocated as f64 - 1.0;
        println!("{name:<48}{counted:>12}{allocated:>12}{:>8.2}", 100.0 * off);
        if off.abs() > TOLERANCE {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "further off than {TOLERANCE}: {wrong:?}");
}
