//! The layers on Burn's CUDA device.
//!
//! A program of its own: without a GPU it says so instead of passing. Without arguments it runs all checks;
//! `train ours|checkpointed|plain BATCH SEQ LAYERS` measures training steps of a model of Qwen3-0.6B's shape.

#![allow(missing_docs, clippy::unwrap_used)]
// Burn's backends are deep types.
#![recursion_limit = "256"]

mod chains;
#[path = "../common/mod.rs"]
mod common;
mod formulas;
mod model;
mod parity;

use burn::tensor::Device;

fn main() {
    match rekindle_kernels::runtime::first() {
        Ok(Some(0)) => {}
        found => return println!("not run: no CUDA device 0 of compute capability 8.0 or newer ({found:?})"),
    }
    let device = Device::cuda(0usize);
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse().ok()).expect("train KIND BATCH SEQ LAYERS");
    match arguments.first().map(String::as_str) {
        Some("train") => model::measure(&arguments[1], [number(2), number(3)], number(4), &device),
        Some("parity") => parity::run(&device),
        Some("chains") => chains::run(&device),
        _ => {
            parity::run(&device);
            chains::run(&device);
        }
    }
}
