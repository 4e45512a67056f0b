//! Measures the throughput of the codecs in GB/s of dense data, on one thread and on all.
//!
//! Run with `cargo bench -p rekindle-quant --bench codec`; prefix it with `taskset -c 1` to measure one core.

use std::hint::black_box;
use std::time::{Duration, Instant};

use half::bf16;
use rekindle_quant::{Blocksize, DynamicMap, Element, Int8Tensor, QuantType, blockwise, four_bit};

/// 64 MiB of f32, which exceeds a core's share of the caches.
const ELEMENTS: usize = 1 << 24;

fn main() {
    let all = std::thread::available_parallelism().map_or(1, usize::from);
    for threads in [1, all] {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a thread pool starts");
        println!("{threads} threads");
        pool.install(|| {
            run::<f32>("f32");
            run::<bf16>("bf16");
            products();
        });
    }
}

fn run<T: Element>(dtype: &str) {
    let dense: Vec<T> = (0..ELEMENTS as u32)
        .map(|i| T::from_f32((i.wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 24) as f32 - 0.5))
        .collect();
    let mut out = vec![T::default(); ELEMENTS];
    let bytes = size_of_val(dense.as_slice());
    for quant_type in QuantType::ALL {
        let name = quant_type.name();
        report(&format!("{dtype} {name} encode"), bytes, || {
            black_box(four_bit::encode(black_box(&dense), quant_type, Blocksize::B64));
        });
        let (codes, absmax) = four_bit::encode(&dense, quant_type, Blocksize::B64);
        report(&format!("{dtype} {name} decode"), bytes, || {
            four_bit::decode(black_box(&codes), &absmax, quant_type, Blocksize::B64, black_box(&mut out));
        });
    }
    let map = DynamicMap::signed();
    report(&format!("{dtype} dynamic encode"), bytes, || {
        black_box(blockwise::encode(black_box(&dense), &map, Blocksize::B256));
    });
    let (codes, absmax) = blockwise::encode(&dense, &map, Blocksize::B256);
    report(&format!("{dtype} dynamic decode"), bytes, || {
        blockwise::decode(black_box(&codes), &absmax, &map, Blocksize::B256, black_box(&mut out));
    });
    let shape = [ELEMENTS / 4096, 4096];
    report(&format!("{dtype} int8 encode"), bytes, || {
        black_box(Int8Tensor::quantize(black_box(&dense), shape).expect("shape fits"));
    });
    let int8 = Int8Tensor::quantize(&dense, shape).expect("shape fits");
    report(&format!("{dtype} int8 decode"), bytes, || int8.dequantize_into(black_box(&mut out)));
}

/// Measures the product of 8-bit weights and activations with four outlier columns.
fn products() {
    let [rows, columns] = [4096, 4096];
    let weight: Vec<f32> = (0..rows * columns).map(|i| (i as f32 * 0.37).sin() * 0.02).collect();
    let weight = Int8Tensor::quantize(&weight, [rows, columns]).expect("shape fits");
    for tokens in [1, 16, 128] {
        let mut x: Vec<f32> = (0..tokens * columns).map(|i| (i as f32 * 0.71).sin() * 3.0).collect();
        for column in [3, 99, 1000, 4000] {
            x[column] = 20.0;
        }
        let mut out = vec![0.0f32; tokens * rows];
        let best = best(|| weight.matmul(black_box(&x), 6.0, black_box(&mut out)));
        let operations = 2.0 * (tokens * rows * columns) as f64;
        println!("  int8 product, {tokens:>3} tokens {:6.1} GOP/s", operations / best.as_secs_f64() / 1e9);
    }
}

fn report(name: &str, bytes: usize, work: impl FnMut()) {
    println!("  {name:<20} {:6.2} GB/s", bytes as f64 / best(work).as_secs_f64() / 1e9);
}

/// Returns the best time of seven runs after a warm-up run.
fn best(mut work: impl FnMut()) -> Duration {
    work();
    let mut time = || {
        let start = Instant::now();
        work();
        start.elapsed()
    };
    (0..7).map(|_| time()).min().unwrap_or(Duration::ZERO)
}
