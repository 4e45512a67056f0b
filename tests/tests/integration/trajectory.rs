//! Compares optimizer steps with transformers and PEFT: accumulation, clipping, warm-up, decay.

use rekindle_tests::{Golden, Trajectory};

/// Trains as specified by `train/NAME/trajectory.json` and compares every step and the saved tensors.
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
fn an_adapter_of_qwen3_follows_the_golden_trajectory() {
    check("qwen3-tied", "lora", "adapter_model.safetensors");
}

#[test]
fn an_adapter_over_nf4_weights_follows_the_golden_trajectory() {
    check("quantized/qwen3-tied-nf4-double", "lora", "adapter_model.safetensors");
}

#[test]
fn a_new_adapter_of_llama3_follows_the_golden_trajectory() {
    check("llama3", "lora-fresh", "adapter_model.safetensors");
}

#[test]
fn full_finetuning_of_qwen2_follows_the_golden_trajectory() {
    check("qwen2", "full", "model.safetensors");
}
