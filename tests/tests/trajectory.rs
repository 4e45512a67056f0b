//! Optimizer steps against transformers and PEFT: accumulation, clipping, warm-up, decay.

use rekindle_tests::{Golden, Trajectory};

/// Trains as `train/NAME/trajectory.json` says and holds every step and the saved tensors against it.
fn check(golden: &str, name: &str, tensors_file: &str) {
    let golden = Golden::open(golden);
    let trajectory = Trajectory::open(&golden.dir.join("train").join(name));
    let mut model = match trajectory.adapter() {
        Some(adapter) => golden.load_adapted(adapter),
        None => golden.load_full(),
    };
    trajectory.check(&format!("{}/{name}", golden.name), &golden, &mut model, tensors_file);
}

#[test]
fn an_adapter_of_qwen3() {
    check("qwen3-tied", "lora", "adapter_model.safetensors");
}

#[test]
fn an_adapter_over_nf4_codes() {
    check("quantized/qwen3-tied-nf4-double", "lora", "adapter_model.safetensors");
}

#[test]
fn a_fresh_adapter_of_llama3() {
    check("llama3", "lora-fresh", "adapter_model.safetensors");
}

#[test]
fn all_weights_of_qwen2() {
    check("qwen2", "full", "model.safetensors");
}
