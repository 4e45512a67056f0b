//! Optimizer steps against transformers and PEFT: accumulation, clipping, warm-up, decay.

use rekindle_hub::Dtype;
use rekindle_models::{Batch, CausalLm};
use rekindle_tests::{Golden, read_json, relative_distance, tensors};
use rekindle_train::{AdamW, LrSchedulerType, Optimizer, lr_factor, save_result};
use serde_json::Value;

// Ten times the goldens' own spread over attention implementations, padding and float64 weights (`spread` in
// trajectory.json: up to 1.5e-7 for losses, 3e-7 for gradient norms, 2e-6 for tensors). Measured: 6e-8, 3e-7, 3e-6.
// The tolerances with which goldens/README.md says which mistakes are caught are 50 and more times wider.
const LOSS: f64 = 1.5e-6;
const GRAD_NORM: f64 = 3e-6;
const FINAL: f64 = 2e-5;

/// Trains as `train/NAME/trajectory.json` says and holds every step and the saved tensors against it.
fn check(golden: &str, name: &str, tensors_file: &str) {
    let golden = Golden::open(golden);
    let dir = golden.dir.join("train").join(name);
    let trajectory = read_json(&dir.join("trajectory.json"));
    let mut model = match trajectory["adapter"].as_str() {
        Some(adapter) => golden.load_adapted(adapter.trim_start_matches("adapters/")),
        None => golden.load_full(),
    };
    train(&format!("{}/{name}", golden.name), &golden, &mut model, &trajectory);

    let out = tempfile::tempdir().expect("a temporary directory");
    let saved = out.path().join("result");
    save_result(&model, &saved, &[], Dtype::F32).expect("the disk has room");
    let (got, want) = (tensors(&saved.join(tensors_file)), tensors(&dir.join("final.safetensors")));
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>());
    let mut worst = 0.0f64;
    for ((key, (shape, got)), (want_shape, want)) in got.iter().zip(want.values()) {
        assert_eq!(shape, want_shape, "{key}");
        let error = relative_distance(got, want);
        worst = worst.max(error);
        assert!(error <= FINAL, "{}/{name}: {key} is off by {error:e}", golden.name);
    }
    println!("{}/{name}: tensors off by {worst:.1e}", golden.name);
}

fn train(what: &str, golden: &Golden, model: &mut CausalLm, trajectory: &Value) {
    let run = &trajectory["run"];
    let float = |value: &Value| value.as_f64().expect("a number");
    let size = |value: &Value| value.as_u64().expect("a count") as usize;
    let adamw = AdamW {
        beta1: float(&run["adam_beta1"]),
        beta2: float(&run["adam_beta2"]),
        eps: float(&run["adam_epsilon"]),
        weight_decay: float(&run["weight_decay"]),
        max_grad_norm: float(&run["max_grad_norm"]),
    };
    let kind: LrSchedulerType = serde_json::from_value(run["lr_scheduler_type"].clone()).expect("a known schedule");
    let mut optimizer = Optimizer::new(model, adamw, 0).expect("something is trained");
    let steps = trajectory["steps"].as_array().expect("a list of steps");
    assert_eq!(steps.len(), size(&run["max_steps"]));
    for (number, expected) in steps.iter().enumerate() {
        let micro_batches = expected["rows"].as_array().expect("rows by micro-batch");
        let batches: Vec<Batch> = micro_batches
            .iter()
            .map(|rows| golden.batch(&rows.as_array().expect("rows").iter().map(&size).collect::<Vec<_>>()))
            .collect();
        let lr = float(&run["learning_rate"]) * lr_factor(kind, number, size(&run["warmup_steps"]), steps.len());
        let want_lr = float(&expected["learning_rate"]);
        assert!((lr - want_lr).abs() <= 1e-12 * want_lr, "step {}: learning rate {lr}, not {want_lr}", number + 1);
        let result = optimizer.step(model, &batches, lr).expect("golden rows fit");
        assert_eq!(result.counted, size(&expected["tokens"]));
        for (part, got, tolerance) in [("loss", result.loss, LOSS), ("grad_norm", result.grad_norm, GRAD_NORM)] {
            let want = float(&expected[part]);
            let error = (got / want - 1.0).abs();
            println!("{what}: step {} {part} off by {error:.1e}", number + 1);
            assert!(error <= tolerance, "{what}: step {} {part} is {got}, not {want}: off by {error:e}", number + 1);
        }
    }
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
